"""Liger kernels: which ones a model takes, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import liger_kernel.transformers
import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from osft_trainer.blocks import enable_activation_checkpointing
from osft_trainer.liger import apply_liger
from osft_trainer.model import convert
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
"""Patching runs nothing: it can be told that it is for CUDA on any machine."""
PATCH = "_apply_liger_kernel_to_instance"


def test_liger_says_why_it_is_off() -> None:
    model = tiny_model("llama")
    assert "use_liger is false" in str(apply_liger(model, False, CPU))
    assert "need CUDA" in str(apply_liger(model, True, CPU))
    assert "none for gpt2" in str(apply_liger(tiny_model("gpt2"), True, CUDA))


class _RotatesInPlace(torch.autograd.Function):
    """As Liger's kernel: writes into the memory of its input, and torch counts no change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated, _ = _ROTATE(x, x, cos, sin)
        x.data.copy_(rotated)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _ROTATE(gradients[0], gradients[0], cos, -sin)[0], None, None


_ROTATE = modeling_llama.apply_rotary_pos_emb


def _rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(_RotatesInPlace.apply(x, cos, sin) for x in (q, k))


@pytest.fixture
def rope_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger with this one kernel, and without Triton."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _ROTATE)

    def patch(model: object, rope: bool = True, **_: bool) -> None:
        if rope:
            modeling_llama.apply_rotary_pos_emb = _rotate_in_place

    monkeypatch.setattr(liger_kernel.transformers, PATCH, patch)


def _gradients(kept: str, selective_liger: bool | None) -> dict[str, Tensor]:
    """Of a tiny model whose blocks keep everything, their input, or products as well."""
    hf = tiny_model("llama").train()
    if selective_liger is not None:
        assert apply_liger(hf, True, CUDA, selective_liger) is None
    if kept != "all":
        enable_activation_checkpointing(hf, selective=kept == "products")
    model = convert(hf, plan_targets(hf, 0.5))
    model(**packed_batch([9, 16, 5])).backward()
    return {name: p.grad.clone() for name, p in model.trainables().items()}


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The lowest cosine between gradients of one parameter."""
    assert found.keys() == wanted.keys()
    return min(
        float(torch.cosine_similarity(found[name].flatten(), wanted[name].flatten(), dim=0))
        for name in wanted
    )


@pytest.mark.usefixtures("rope_in_place")
@pytest.mark.parametrize("kept", ["all", "inputs"])
def test_rotation_in_place_is_right_where_no_product_is_kept(kept: str) -> None:
    wanted = _gradients("all", None)
    assert _worst(_gradients(kept, selective_liger=False), wanted) > 0.99999
    assert modeling_llama.apply_rotary_pos_emb is _rotate_in_place


@pytest.mark.usefixtures("rope_in_place")
def test_where_products_are_kept_nothing_is_rotated_in_place() -> None:
    wanted = _gradients("all", None)
    assert _worst(_gradients("products", selective_liger=True), wanted) > 0.99999
    # What it is for: a kept product would be rotated twice.
    assert _worst(_gradients("products", selective_liger=False), wanted) < 0.9


def test_ligers_own_rotation_writes_into_its_input() -> None:
    """In Triton's interpreter. When this fails, `selective` can have Liger's rotation, too."""
    code = (
        "import torch\n"
        "from liger_kernel.ops.rope import LigerRopeFunction\n"
        "q, k = torch.ones(1, 5, 2, 8), torch.ones(1, 5, 1, 8)\n"
        "angle = torch.full((1, 5, 8), 0.5)\n"
        "LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), angle, angle)\n"
        "assert not torch.equal(q, torch.ones_like(q)) and q._version == 0\n"
    )
    environ = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=300)
