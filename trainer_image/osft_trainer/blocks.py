"""How decoder blocks run: what they keep between forward and backward, and whether compiled.

Lives here: switching recomputation on, whole or selective, what is kept without it, and
torch.compile. Called by `assembly` before the model is sharded. Must never: change a result beyond
the rounding of compiled kernels, and beyond the numbers that dropout draws in them.

A block that keeps only its input runs its forward pass twice. Most of that time goes into a few
operations, matrix products and attention, whose results are a part of what a block would keep.
Selective recomputation keeps these and computes the rest again: norms, rotary embedding,
activation functions, residuals (Korthikanti et al., 2022, arXiv:2205.05198, section 5, keeps the
products and recomputes attention; here attention is kept, too, which with kernels that hold no
T x T matrix costs one hidden state). Nothing may write into what is kept: kernels that work in
place stay out of such blocks (`liger`).
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operation
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from osft_trainer.linear import SubspaceLinear
from osft_trainer.model import OSFTModel
from osft_trainer.targets import decoder_blocks

_ATEN = torch.ops.aten

_COSTLY = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Operations whose results are kept by selective recomputation."""

_FED_ONE_TENSOR = 3
"""Most matrices of a block that one tensor is fed to: q, k and v."""


def enable_activation_checkpointing(model: PreTrainedModel, selective: bool = False) -> None:
    """Recompute each block's activations in backward instead of keeping them.

    Args:
        model: as transformers loads it.
        selective: keep the results of matrix products and attention, and recompute the rest.

    Raises:
        ValueError: if the model's code does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"activation checkpointing: {type(model).__name__} does not support it; switch it off"
        )
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, costly_operations())
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how)
    else:
        # Its name in older versions of transformers; newer ones warn about it.
        model.gradient_checkpointing_enable(how)


def keep_free_parts(model: OSFTModel) -> None:
    """Keep of the targets' inputs only what their gradients need; where nothing is recomputed.

    Where the split is by activations, matrices that are fed one tensor share its part. With `core`
    each makes its own of a basis of its own: three small parts (q, k, v) take less than the input.
    With `exact` some matrices have no basis there and keep the input whole.
    """
    shares = model.plan.split_by == "activations"
    if not shares and model.plan.parameterization != "core":
        return
    for module in model.hf.modules():
        if isinstance(module, SubspaceLinear):
            subspace = module.subspace
            is_small = _FED_ONE_TENSOR * subspace.factor.shape[-1] <= module.in_features
            subspace.keeps_free_part = shares or is_small


def costly_operations() -> list[torch._ops.OpOverload]:
    """What selective recomputation keeps, with torch's variable-length attention."""
    return [*_COSTLY, torch.ops.torch_attn._varlen_attn.default]


def compile_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """Let torch compile each decoder block when it first runs; after `convert`, before sharding.

    Blocks of one shape share what is compiled, and rows of any length do.

    Raises:
        ValueError: if there is no compiler to do it with.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"torch_compile: on CPU it needs a C++ compiler, and there is no {compiler}: install "
            "one, or unset torch_compile"
        )
    _, blocks = decoder_blocks(model)
    for block in blocks:
        # Packed rows differ in length: one graph for all of them, also for those after a restart.
        block.compile(dynamic=True)
