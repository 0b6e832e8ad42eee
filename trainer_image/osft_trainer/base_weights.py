"""The weights of a base folder as its files hold them, one at a time.

Called by `dense` on the first rank, and by `masters` on every rank. Must never: hold more than the
tensor that is asked for, or read pickles.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class BaseWeights:
    """By the names in the files that transformers loads."""

    def __init__(self, folder: Path) -> None:
        """Headers alone are read."""
        self._files: dict[str, Path] = {}
        self._kinds: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        for path in _loaded_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    self._files[name] = path
                    self._kinds[name] = (_FLOATS.get(part.get_dtype()), tuple(part.get_shape()))

    def has(self, name: str, shape: torch.Size) -> bool:
        """Whether there is a tensor of this name and shape, of floating-point numbers."""
        dtype, found = self._kinds.get(name, (None, ()))
        return dtype is not None and found == tuple(shape)

    def loses(self, name: str, dtype: torch.dtype) -> bool:
        """Whether loading a tensor as `dtype` has rounded its numbers."""
        held, _ = self._kinds.get(name, (None, ()))
        return held is not None and torch.promote_types(held, dtype) != dtype

    def loses_some(self, dtype: torch.dtype) -> bool:
        """Whether loading everything as `dtype` has rounded anything."""
        return dtype.is_floating_point and any(self.loses(name, dtype) for name in self._kinds)

    def read(self, name: str) -> Tensor:
        """The tensor, in the type of its file."""
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def names_in_files(hf: PreTrainedModel, shapes: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What these tensors of the model are in the files: shapes and types, without numbers.

    None where a conversion needs others with them: a foreign one may say so in any of these ways.
    """
    if not shapes:
        return {}
    try:
        return dict(revert_weight_conversion(hf, shapes))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return None


def _loaded_files(folder: Path) -> list[Path]:
    """As transformers chooses them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(parts))]
    return sorted(folder.glob("*.safetensors"))
