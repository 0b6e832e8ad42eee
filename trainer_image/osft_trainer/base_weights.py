"""The weights of a base folder as its files hold them, one at a time.

Lives here: which files are read, and where in them each tensor lies. Called by `base_layout`,
`base_copy`, `dense` and `unused_weights` on the first rank, and by `masters` on every rank. Must
never: hold more than the tensor that is asked for, or read pickles.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Names in safetensors of the types whose numbers mean what they are."""

_LENGTH_BYTES = 8
"""At the beginning of a safetensors file: how long the header behind it is."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    path: Path
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the beginning of the file."""
    stop: int

    @property
    def float_type(self) -> torch.dtype | None:
        """None where its numbers mean something only beside others, or are no floating-point."""
        return FLOATS.get(self.dtype)


@dataclass(frozen=True)
class Header:
    """What stands at the beginning of a safetensors file."""

    raw: bytes
    """With the length in front: all bytes before the first tensor's."""
    document: dict[str, object]


class BaseWeights:
    """By the names in the files that transformers loads."""

    def __init__(self, folder: Path) -> None:
        """Headers alone are read.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no safetensors file.
        """
        self.files = loaded_files(folder)
        self.entries: dict[str, Entry] = {}
        for path in self.files:
            self.entries.update(entries_of(path, read_header(path)))

    def loses(self, name: str, dtype: torch.dtype) -> bool:
        """Whether loading a tensor as `dtype` has rounded its numbers."""
        held = self.entries[name].float_type
        return held is not None and torch.promote_types(held, dtype) != dtype

    def loses_some(self, dtype: torch.dtype) -> bool:
        """Whether loading everything as `dtype` has rounded anything."""
        return dtype.is_floating_point and any(self.loses(name, dtype) for name in self.entries)

    def read(self, name: str) -> Tensor:
        """The tensor, in the type of its file."""
        with safe_open(self.entries[name].path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def main_dtype(self) -> torch.dtype:
        """The floating-point type of most of the numbers."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            if entry.float_type is not None:
                sizes[entry.float_type] += prod(entry.shape)
        return max(sizes, key=sizes.__getitem__, default=torch.float32)


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change, ns, of each weight file: what tells that one is another."""
    stats = {path.name: path.stat() for path in loaded_files(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def loaded_files(folder: Path) -> list[Path]:
    """As transformers chooses them."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return [whole]
    if index.is_file():
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(parts))]
    return sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> Header:
    """Of a safetensors file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or is cut off.
    """
    try:
        with safe_open(path, framework="pt"):  # checks it, sizes and offsets included
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error})") from error
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        text = file.read(int.from_bytes(length, "little"))
    return Header(length + text, json.loads(text))


def entries_of(path: Path, header: Header) -> dict[str, Entry]:
    """Its tensors, in the order in which they lie there."""
    found = []
    for name, told in header.document.items():
        if name == "__metadata__" or not isinstance(told, dict):
            continue
        first, last = (len(header.raw) + offset for offset in told["data_offsets"])
        found.append((name, Entry(path, told["dtype"], tuple(told["shape"]), first, last)))
    return dict(sorted(found, key=lambda item: item[1].start))


def new_header(document: dict[str, object]) -> Header:
    """The header that says this, padded as the format asks for."""
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 8)
    return Header(len(text).to_bytes(_LENGTH_BYTES, "little") + text, document)
