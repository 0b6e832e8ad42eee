"""Liger's fused kernels in a transformers model, as far as they fit it.

Lives here: which of them a model takes, and putting them in. Called by `assembly` before `convert`.
Must never: fail where plain torch would do, or change a result beyond rounding.

Liger works on the model's own objects and on names in the module of its family's code: a norm or an
MLP that is there gets another `forward`, and the name that attention looks up for rotary embedding
is bound to Liger's.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


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
    _apply_liger_kernel_to_instance(model=model, **_unwanted(selective))
    return None


def _unwanted(selective: bool) -> dict[str, bool]:
    """The kernels to leave out, by the names of Liger's arguments; a family has its own defaults.

    What a family has no argument for is dropped by Liger.
    """
    # The cross entropy is `forward`'s business; patching the model's own would change nothing.
    off = ["fused_linear_cross_entropy", "cross_entropy"]
    if selective:
        # Liger rotates queries and keys in the memory of the product that they are, unseen by
        # torch. Where that product is kept, the backward pass would rotate it once more, and the
        # gradients would be wrong without a word. Plain torch rotates into memory of its own.
        off.append("rope")
    return dict.fromkeys(off, False)
