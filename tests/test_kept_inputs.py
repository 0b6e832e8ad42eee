"""Of a matrix's input the part in the free directions is kept: same gradients, less memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from osft_trainer.blocks import keep_free_parts
from osft_trainer.kept_inputs import free_part
from osft_trainer.model import OSFTModel, convert
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch, shared_bases, tiny_model

LENGTHS = [9, 16, 5]


def by_core(family: str) -> OSFTModel:
    hf = tiny_model(family)
    return convert(hf, plan_targets(hf, 0.3, "core"))


def by_activations(family: str) -> OSFTModel:
    return shared_bases(family, 0.3)


def gradients(model: OSFTModel) -> tuple[dict[str, Tensor], int, int]:
    """Of one pass; the bytes that it keeps for backward, and the number of matrix products."""
    model.train()
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
        return tensor

    with Products() as products:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**packed_batch(LENGTHS))
        size = sum(kept.values())
        loss.backward()
    return {n: p.grad for n, p in model.trainables().items()}, size, products.count  # type: ignore[misc]


class Products(TorchDispatchMode):
    """Counts products of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [by_core, by_activations])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_the_same_and_less_is_kept(make: Any, family: str) -> None:
    whole = make(family)
    saving = copy.deepcopy(whole)
    keep_free_parts(saving)
    expected, whole_bytes, whole_products = gradients(whole)
    found, saving_bytes, saving_products = gradients(saving)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert any(gradient.any() for gradient in found.values())
    assert saving_bytes < 0.9 * whole_bytes
    # q, k and v have one product with their basis, gate and up another.
    spared = 3 if (make, family) == (by_activations, "llama") else 0
    layers = whole.hf.config.num_hidden_layers
    assert whole_products - saving_products == spared * layers


@pytest.mark.parametrize("parameterization", ["exact", "factored", "dense"])
def test_inputs_stay_whole_where_some_matrix_needs_them_whole(parameterization: str) -> None:
    hf = tiny_model("llama")
    model = convert(hf, plan_targets(hf, 0.3, parameterization))
    keep_free_parts(model)
    assert not any(subspace.keeps_free_part for _, subspace in model.subspaces())


def test_core_keeps_parts_only_where_three_of_them_are_less_than_the_input() -> None:
    kept = {}
    for ratio in (0.3, 0.5):
        hf = tiny_model("llama")
        model = convert(hf, plan_targets(hf, ratio, "core"))
        keep_free_parts(model)
        chosen = {n.split(".")[-2] for n, s in model.subspaces() if s.keeps_free_part}
        kept[ratio] = chosen & {"q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"}
    # k and v have half as many rows as columns here, and down_proj's input is wider than the rest.
    assert kept[0.3] == {"q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"}
    assert kept[0.5] == {"k_proj", "v_proj", "down_proj"}


def test_nothing_is_made_where_no_gradient_is_wanted() -> None:
    model = by_core("llama")
    counts = []
    for keeps in (False, True):
        if keeps:
            keep_free_parts(model)
        with torch.no_grad(), Products() as products:
            model(**packed_batch(LENGTHS))
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


def test_a_part_is_shared_only_by_what_it_was_made_of() -> None:
    x, basis = torch.randn(2, 3, 8), torch.randn(4, 8)
    part = free_part(x, basis, in_rows=True)
    assert torch.equal(part, x.flatten(0, 1) @ basis.T)
    assert free_part(x, basis, in_rows=True) is part
    assert free_part(x, basis.clone(), in_rows=True) is not part
    again = free_part(x, basis, in_rows=True)
    x.add_(1)
    changed = free_part(x, basis, in_rows=True)
    assert torch.equal(changed, x.flatten(0, 1) @ basis.T)
    assert not torch.equal(changed, again)
    expected = changed.clone()
    gone = [weakref.ref(tensor) for tensor in (changed, x, basis)]
    del changed
    assert gone[0]() is None
    assert torch.equal(free_part(x, basis, in_rows=True), expected)
    del x, basis
    assert [ref() for ref in gone] == [None] * 3
