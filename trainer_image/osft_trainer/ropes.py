"""Rotary embeddings that remember the longest row they have seen.

Lives here: making them forget it, so that a sample is turned as it is alone. Called by `forward`
before each pass. Must never: touch an embedding whose frequencies are fixed.

transformers' `dynamic` embedding keeps the frequencies of the longest sample so far for all that
follow: what a sample is computed to would depend on those before it, and a resumed run would differ
from an undisturbed one.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer.layout import layout_of

_SEEN = "max_seq_len_cached"


def reset_ropes(hf: PreTrainedModel) -> None:
    """Give `dynamic` embeddings the frequencies of short samples, as a new model has them."""
    if layout_of(hf.config).beyond == "alike":
        return
    for module in hf.modules():
        if hasattr(module, "original_max_seq_len") and hasattr(module, _SEEN):
            _reset(module)


def _reset(module: nn.Module) -> None:
    """By kind of layer, where the attributes have it in front of their names."""
    for name in [name for name in vars(module) if name.endswith(_SEEN)]:
        prefix = name.removesuffix(_SEEN)
        original = getattr(module, f"{prefix}original_inv_freq", None)
        current = getattr(module, f"{prefix}inv_freq", None)
        if isinstance(original, Tensor) and isinstance(current, Tensor):
            fresh = original.to(current.device, copy=True)
            module.register_buffer(f"{prefix}inv_freq", fresh, persistent=False)
        setattr(module, name, module.original_max_seq_len)
