"""How decoder blocks run, recomputed or compiled: the gradients are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode

from osft_trainer.blocks import (
    compile_blocks,
    costly_operations,
    enable_activation_checkpointing,
    keep_free_parts,
)
from osft_trainer.model import OSFTModel, convert
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch, shared_bases, tiny_model

LENGTHS = [9, 16, 5]
CPU = torch.device("cpu")


def converted(family: str, ratio: float) -> OSFTModel:
    hf = tiny_model(family)
    return convert(hf, plan_targets(hf, ratio))


def gradients(model: OSFTModel, lengths: list[int]) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**packed_batch(lengths)).backward()
    return {name: p.grad.clone() for name, p in model.trainables().items() if p.grad is not None}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_activation_checkpointing_changes_no_gradient(family: str, selective: bool) -> None:
    plain, saving = converted(family, 0.3), converted(family, 0.3)
    enable_activation_checkpointing(saving.hf, selective)
    for model in (plain, saving):
        model.train()
        model(**packed_batch(LENGTHS)).backward()
    for name, p in plain.trainables().items():
        assert torch.allclose(saving.trainables()[name].grad, p.grad, atol=1e-6), name


def test_selective_checkpointing_computes_no_product_twice() -> None:
    """Counts matrix products and attention that run in a step."""
    counts = {}
    for selective in (False, True):
        model = converted("llama", 0.3)
        model.train()
        enable_activation_checkpointing(model.hf, selective)
        with Counting() as counted:
            model(**packed_batch(LENGTHS)).backward()
        counts[selective] = counted.costly
    again = 7 + 1  # products of a block, and its attention
    assert counts[False] - counts[True] == again * model.hf.config.num_hidden_layers


class Counting(TorchDispatchMode):
    """Counts the operations that selective checkpointing is about."""

    def __init__(self) -> None:
        super().__init__()
        self.costly = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.costly += func in costly_operations()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    # Nothing trained lies below the first block, so that its input has no gradient of its own.
    ("selective", "split_by", "graphs"),
    [
        (None, "weights", 2),
        (None, "activations", 2),
        (False, "weights", 1),
        (True, "weights", 1),
    ],
)
def test_compiled_blocks_give_the_same_gradients_for_rows_of_any_length(
    selective: bool | None, split_by: str, graphs: int
) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    plain = converted("llama", 0.3) if split_by == "weights" else shared_bases("llama", 0.3)
    compiled = copy.deepcopy(plain)
    if selective is None:
        keep_free_parts(compiled)
    else:
        enable_activation_checkpointing(compiled.hf, selective)
    compile_blocks(compiled.hf, CPU)
    for lengths in (LENGTHS, [3, 4], [20, 1, 30]):
        expected, found = gradients(plain, lengths), gradients(compiled, lengths)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == graphs, "rows and blocks share what there is"
    assert not counters["graph_break"]


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"torch_compile: .* no no-such-compiler: install"):
        compile_blocks(tiny_model("llama"), CPU)
