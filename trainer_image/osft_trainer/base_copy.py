"""A copy of the base's weight files in which some tensors are others.

Lives here: files of the same names that hold the same tensors in the same order, written in place
as they come, and the rest copied byte for byte. Called by `export` on the first rank. Must never:
hold more than one tensor, or leave out a tensor of the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from osft_trainer.base_weights import (
    FLOATS,
    INDEX,
    BaseWeights,
    Entry,
    Header,
    entries_of,
    new_header,
    read_header,
)

_PIECE_BYTES = 16 * 2**20
_SPELLED = {dtype: name for name, dtype in FLOATS.items()}


class BaseCopy:
    """The weight files of an exported folder while they come into being.

    They stay open until `finish` or `release`: on a network's disk each closing waits for it.
    """

    def __init__(self, base: Path, folder: Path, save_dtype: torch.dtype | None) -> None:
        """Make the files, full length, with their headers.

        Args:
            base: folder of the base.
            folder: to write into; what is there of an earlier try goes.
            save_dtype: takes the place of the type that most of the base's numbers have; tensors
                that the base holds in another type keep it. None keeps all.
        """
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        self.base, self.folder = base, folder
        self.weights = BaseWeights(base)
        self._new: dict[str, Entry] = {}
        self._open = ExitStack()
        self._targets: dict[Path, BinaryIO] = {}
        self._written: set[str] = set()
        main = self.weights.main_dtype()
        self._types = {} if save_dtype is None else {_SPELLED[main]: _SPELLED[save_dtype]}
        for path in self.weights.files:
            self._begin(path)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors, by their names in the files, where the base has its own."""
        for name, tensor in tensors.items():
            entry = self._new[name]
            assert tuple(tensor.shape) == entry.shape, f"{name} has another shape in the base"
            assert entry.float_type is not None, f"{name} is no floating-point tensor in the base"
            raw = _bytes_of(tensor.to(entry.float_type))
            file = self._targets[entry.path]
            file.seek(entry.start)
            file.write(raw)
            self._written.add(name)

    def finish(self) -> None:
        """Take everything that was not written from the base."""
        for path in self.weights.files:
            with path.open("rb") as source:
                self._take_rest(path, source)
        self.release()
        index = self.base / INDEX
        if index.is_file() and self.base / "model.safetensors" not in self.weights.files:
            self._write_index(index)

    def release(self) -> None:
        """Close the files, whole or not."""
        self._open.close()

    def _take_rest(self, path: Path, source: BinaryIO) -> None:
        for name, old in self.weights.entries.items():
            if old.path != path or name in self._written:
                continue
            new = self._new[name]
            if new.dtype != old.dtype:
                self.write({name: self.weights.read(name)})
                continue
            target = self._targets[new.path]
            source.seek(old.start)
            target.seek(new.start)
            _copy(source, target, old.stop - old.start)

    def _begin(self, path: Path) -> None:
        header = self._header(read_header(path))
        target = self.folder / path.name
        entries = entries_of(target, header)
        file = self._open.enter_context(target.open("wb"))
        file.write(header.raw)
        file.truncate(max((e.stop for e in entries.values()), default=len(header.raw)))
        self._targets[target] = file
        self._new.update(entries)

    def _header(self, old: Header) -> Header:
        """The base's own, byte for byte, unless types change."""
        if all(spelled == other for spelled, other in self._types.items()):
            return old
        document: dict[str, object] = {}
        if "__metadata__" in old.document:
            document["__metadata__"] = old.document["__metadata__"]
        end = 0
        for name, entry in entries_of(Path(), old).items():
            dtype = self._types.get(entry.dtype, entry.dtype)
            size = entry.stop - entry.start
            if dtype != entry.dtype:
                size = prod(entry.shape) * FLOATS[dtype].itemsize
            document[name] = {
                "dtype": dtype,
                "shape": list(entry.shape),
                "data_offsets": [end, end + size],
            }
            end += size
        return new_header(document)

    def _write_index(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        if self._types and isinstance(document.get("metadata"), dict):
            sizes = (entry.stop - entry.start for entry in self._new.values())
            document["metadata"]["total_size"] = sum(sizes)
            text = json.dumps(document, indent=2) + "\n"
            (self.folder / path.name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, self.folder / path.name)


def _bytes_of(tensor: Tensor) -> memoryview:
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = whole.view(torch.uint8).numpy()
    return array.data


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count > 0:
        piece = source.read(min(count, _PIECE_BYTES))
        if not piece:
            raise OSError(f"{source.name} has become shorter while it was read")
        target.write(piece)
        count -= len(piece)
