"""Liger kernels: which ones a model takes, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import liger_kernel.transformers
import pytest
import torch
from liger_kernel.transformers import functional
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_moe import modeling_qwen3_moe

import tiny
from osft_trainer import assembly, worker
from osft_trainer.blocks import enable_activation_checkpointing
from osft_trainer.liger import apply_liger, undone_afterwards
from osft_trainer.model import convert
from osft_trainer.parallel import start_world
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


def test_where_no_kernel_runs_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU on a machine without a C compiler."""
    model = tiny_model("llama")
    before = dict(vars(modeling_llama))

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please\nspecify")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", no_compiler)
    reason = apply_liger(model, True, CUDA)
    assert reason == (
        "Liger kernels are off: Triton cannot run them here (Failed to find C compiler. Please)"
    )
    assert not any("forward" in vars(module) for module in model.modules())
    assert vars(modeling_llama) == before


@pytest.mark.parametrize("others", ["frozen", "all"])
def test_the_gradient_of_a_trained_head_is_added_up_in_float32(
    others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, *_: Any, **named: Any) -> Tensor:
        told.update(named, weight=weight)
        return cross_entropy(hidden @ weight.T, targets, reduction="sum")

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", fused)
    hf = tiny_model("llama").to(torch.bfloat16)
    plan = plan_targets(hf, 0.5, other_parameters=others)
    convert(hf, plan, fused_loss=True)(**packed_batch([9, 16, 5])).backward()
    assert told["weight"].dtype == torch.bfloat16
    assert told["accum_dtype"] == (torch.float32 if others == "all" else None)


def _asked(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> dict[str, bool]:
    """What Liger is told for a model."""
    told: dict[str, bool] = {}
    monkeypatch.setattr(liger_kernel.transformers, PATCH, lambda model, **more: told.update(more))
    assert apply_liger(model, True, CUDA) is None
    return told


@pytest.mark.parametrize(
    ("family", "activation", "kernel"),
    [
        ("llama", {"hidden_act": "silu"}, "swiglu"),
        ("llama", {"hidden_act": "gelu"}, None),
        ("qwen3", {"hidden_act": "swish"}, "swiglu"),
        ("phi3", {"hidden_act": "relu"}, None),
        ("mixtral", {"hidden_act": "gelu"}, None),
        ("gemma", {"hidden_act": "gelu_pytorch_tanh"}, "geglu"),
        ("gemma2", {}, "geglu"),
        ("gemma2", {"hidden_activation": "silu"}, "swiglu"),  # an argument that it does not have
        ("gemma3", {"hidden_activation": "relu"}, None),
    ],
)
def test_a_gated_mlp_is_ligers_only_with_its_activation(
    family: str, activation: dict[str, str], kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = _asked(monkeypatch, tiny_model(family, **activation))
    off = {name for name, wanted in told.items() if not wanted}
    assert off & {"swiglu", "geglu"} == {"swiglu", "geglu"} - {kernel}
    # The defaults of a family stay what they are: some have no rotation by default.
    assert not any(told.values())


@pytest.mark.parametrize("blocks", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_experts_in_some_blocks_only_leave_the_model_unpatched(blocks: dict[str, Any]) -> None:
    model = tiny_model("qwen3_moe", **blocks)
    before = dict(vars(modeling_qwen3_moe))
    assert "blocks without experts" in str(apply_liger(model, True, CUDA))
    assert not any("forward" in vars(module) for module in model.modules())
    assert vars(modeling_qwen3_moe) == before


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "qwen3_moe"])
def test_the_familys_code_is_its_own_again_after_a_run(family: str) -> None:
    """With Liger's real patches, twice, as two runs of one process."""
    code = vars(sys.modules[type(tiny_model(family)).__module__])
    before = dict(code)
    for _ in range(2):
        with undone_afterwards():
            for model in (tiny_model(family), tiny_model(family)):
                assert apply_liger(model, True, CUDA) is None
            assert code["apply_rotary_pos_emb"] is not before["apply_rotary_pos_emb"]
        assert dict(code) == before


def test_a_run_undoes_what_it_has_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run on the CPU, patched with a rotation that it can compute."""
    data = tiny.data_file(tmp_path / "data.jsonl", conversations=8)
    told = tiny.arguments(tiny.model_folder(tmp_path / "model"), data, tmp_path / "run")
    rotated: list[int] = []

    def rotate(*given: Tensor) -> tuple[Tensor, ...]:
        rotated.append(1)
        return _ROTATE(*given)

    def patch(model: object, **_: bool) -> None:
        modeling_llama.apply_rotary_pos_emb = rotate

    def as_on_cuda(hf: PreTrainedModel, wanted: bool, *_: object) -> str:
        assert apply_liger(hf, wanted, CUDA) is None
        return "the fused loss needs CUDA"

    monkeypatch.setattr(liger_kernel.transformers, PATCH, patch)
    monkeypatch.setattr(assembly, "apply_liger", as_on_cuda)
    worker.run(told, start_world("cpu"), stop=threading.Event(), environ={})
    assert rotated
    assert modeling_llama.apply_rotary_pos_emb is _ROTATE


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
