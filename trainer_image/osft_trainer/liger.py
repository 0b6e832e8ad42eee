"""Liger's fused kernels in a transformers model, as far as they fit it.

Lives here: which of them a model takes, putting them in, and undoing what outlives the model.
Called by `assembly` before `convert`, and by `worker` around the run. Must never: fail where plain
torch would do, or change a result beyond rounding.

Liger works on the model's own objects and on names in the module of its family's code: a norm or an
MLP that is there gets another `forward`, and the name that attention looks up for rotary embedding
is bound to Liger's, for every model of the family in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from osft_trainer.targets import decoder_blocks

_GATED = {"swiglu": {"silu", "swish"}, "geglu": {"gelu_pytorch_tanh", "gelu_new"}}
"""Liger's gated MLPs, and what the one activation of each is called in configurations."""

_WANTS_EXPERTS = frozenset({"mixtral", "qwen3_moe", "hunyuan_v1_moe"})
"""Families of which Liger asks every block for its experts, those without any, too."""

_originals: dict[ModuleType, dict[str, Any]] = {}
"""What Liger has bound anew in modules of this process. It describes the process, as they do."""


def apply_liger(
    model: PreTrainedModel, use_liger: bool, device: torch.device, selective: bool = False
) -> str | None:
    """Patch the model with Liger kernels; before `convert`.

    Args:
        model: as transformers loads it.
        use_liger: parameter `use_liger`.
        device: where the model will run.
        selective: whether its blocks keep the results of matrix products, see `blocks`.

    Returns:
        None when they are on, else one line why they are off, for the caller to log.
    """
    if not use_liger:
        return "Liger kernels are off: use_liger is false"
    if device.type != "cuda":
        return f"Liger kernels are off: they need CUDA and this run uses {device.type}"
    try:
        # Imported here because Liger needs Triton, which machines without CUDA do not have.
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return f"Liger kernels are off: liger-kernel cannot be imported ({error})"
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger kernels are off: liger-kernel has none for {model.config.model_type}"
    if model.config.model_type in _WANTS_EXPERTS and _has_dense_blocks(model):
        return (
            "Liger kernels are off: liger-kernel cannot patch blocks without experts among others"
        )
    failure = _failure_of_kernels(device)
    if failure is not None:
        return f"Liger kernels are off: Triton cannot run them here ({failure})"
    with _noting_what_is_bound(model):
        _apply_liger_kernel_to_instance(model=model, **_unwanted(model.config, selective))
    return None


def _failure_of_kernels(device: torch.device) -> str | None:
    """Why no kernel runs, found out by a small one; None where there is no device to ask.

    Triton builds a part of its driver when the first one runs, with a C compiler and Python's
    headers: machines that train without Liger often lack one of them.
    """
    if not torch.cuda.is_available():
        return None
    try:
        from liger_kernel.ops import LigerSiLUMulFunction

        x = torch.zeros(1, 16, device=device)
        LigerSiLUMulFunction.apply(x, x)
        torch.cuda.synchronize(device)
    # A missing compiler, header, driver library or assembler: each raises a kind of its own; and
    # what is imported here has moved between Liger's versions.
    except Exception as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


@contextmanager
def undone_afterwards() -> Iterator[None]:
    """Around a run in somebody's process: models that are made later run their own code again."""
    try:
        yield
    finally:
        for module, names in _originals.items():
            vars(module).update(names)
        _originals.clear()


@contextmanager
def _noting_what_is_bound(model: PreTrainedModel) -> Iterator[None]:
    """Remember what the names were bound to that change inside, in the modules of the model."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    before = {module: dict(vars(module)) for module in modules}
    try:
        yield
    finally:
        for module, names in before.items():
            changed = {n: old for n, old in names.items() if vars(module)[n] is not old}
            if changed:
                # What an earlier model has noted is the original.
                _originals[module] = {**changed, **_originals.get(module, {})}


def _has_dense_blocks(model: PreTrainedModel) -> bool:
    return any(not hasattr(block.mlp, "experts") for block in decoder_blocks(model)[1])


def _activations(config: PreTrainedConfig) -> set[str]:
    """What the configuration calls the activation of its MLPs; families differ in the name."""
    text = config.get_text_config()
    told = (getattr(text, name, None) for name in ("hidden_act", "hidden_activation"))
    return {name for name in told if name is not None}


def _unwanted(config: PreTrainedConfig, selective: bool) -> dict[str, bool]:
    """The kernels to leave out, by the names of Liger's arguments; a family has its own defaults.

    What a family has no argument for is dropped by Liger.
    """
    # The cross entropy is `forward`'s business; patching the model's own would change nothing.
    # The squared ReLU goes into a table that all families share.
    off = ["fused_linear_cross_entropy", "cross_entropy", "relu_squared"]
    # A gated MLP of Liger's computes its own activation, whatever the configuration names.
    off += [name for name, meant in _GATED.items() if not _activations(config) <= meant]
    if selective:
        # Liger rotates queries and keys in the memory of the product that they are, unseen by
        # torch. Where that product is kept, the backward pass would rotate it once more, and the
        # gradients would be wrong without a word. Plain torch rotates into memory of its own.
        off.append("rope")
    return dict.fromkeys(off, False)
