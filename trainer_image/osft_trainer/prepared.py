"""The form of prepared data: flat arrays, written piece by piece, read by memory map.

Lives here: the files of a prepared folder, writing one array piece by piece, reading samples.
Called by `data` (writing), `packing` and the training loop (reading). Must never: hold the data
set in memory, or unpickle anything.

A folder holds, little-endian: input_ids.npy int32 [tokens], loss_mask.npy bool [tokens],
offsets.npy int64 [samples + 1] (sample i is offsets[i]:offsets[i + 1]), loss_counts.npy int32
[samples], meta.json (with the largest id, for which nobody has to read the ids again), and
COMPLETE, written last. Where samples hold several pieces that must not see one another, pieces.npy
int64 [pieces + 1] holds their offsets, as offsets.npy the samples'. While it is written it also
holds the lock of `leftovers`.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

NO_LOSS = -100
"""Label of a position without loss, as torch's cross entropy ignores it."""


PIECES = "pieces.npy"


@dataclass(frozen=True)
class DataCounts:
    """What became of the data. `samples` is what training sees; the others explain it."""

    rows: int = 0
    """Rows that could be used: conversations, documents, or lists of token ids."""
    samples: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    dropped_empty: int = 0
    """Without a token to learn."""
    skipped_bad: int = 0
    """Rows that could not be used."""
    tokens: int = 0
    loss_tokens: int = 0


class PreparedData:
    """A prepared folder, read by memory map: opening costs nothing, samples are read when asked."""

    def __init__(self, folder: Path) -> None:
        """Open a complete folder; see `open_prepared` for folders that may be faulty."""
        meta = json.loads((folder / "meta.json").read_text())
        self.folder = folder
        self.digest: str = meta["digest"]
        self.counts = DataCounts(**meta["counts"])
        self.largest_id: int = meta["largest_id"]
        # Plain arrays over the maps: slicing np.memmap itself costs several times as much.
        self._ids, self._mask, self._offsets = (
            np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))
            for name in ("input_ids.npy", "loss_mask.npy", "offsets.npy")
        )
        loss_counts = np.load(folder / "loss_counts.npy", allow_pickle=False)
        pieces = folder / PIECES
        self._pieces = np.load(pieces, allow_pickle=False) if pieces.is_file() else None
        self.lengths: npt.NDArray[np.int64] = np.diff(self._offsets)
        whole = self.lengths if self._pieces is None else np.diff(self._pieces)
        self.longest = int(whole.max(initial=0))
        """Tokens of the longest piece: positions are counted inside one."""
        self.loss_counts: npt.NDArray[np.int64] = loss_counts.astype(np.int64)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(input_ids, labels)`, both int64 [length].

        labels[t] belongs to input_ids[t] (the model shifts them); -100 where there is no loss,
        and always at position 0.
        """
        part = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        ids = torch.from_numpy(self._ids[part].astype(np.int64))
        mask = torch.from_numpy(np.array(self._mask[part]))
        return ids, ids.masked_fill(~mask, NO_LOSS)

    def pieces(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The sample, cut where attention must not pass: most have one piece."""
        parts = (torch.split(whole, self.piece_lengths(index)) for whole in self.sample(index))
        return list(zip(*parts, strict=True))

    def piece_lengths(self, index: int) -> list[int]:
        """Tokens of each piece of the sample; nothing of them is read."""
        if self._pieces is None:
            return [int(self.lengths[index])]
        start, end = self._offsets[index : index + 2]
        first, last = np.searchsorted(self._pieces, (start, end))
        lengths: list[int] = np.diff(self._pieces[first : last + 1]).tolist()
        return lengths

    def whole(self) -> PreparedPart:
        """All samples, as something that parts can be taken of."""
        return PreparedPart(self, np.arange(len(self)))


class PreparedPart:
    """Some samples of prepared data, in an order of their own; read like the whole."""

    def __init__(self, data: PreparedData, indices: npt.NDArray[np.int64]) -> None:
        """`indices`: positions in `data`."""
        self._data = data
        self._indices = indices
        self.lengths = data.lengths[indices]
        self.loss_counts = data.loss_counts[indices]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._indices)

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PreparedData.sample`."""
        return self._data.sample(int(self._indices[index]))

    def pieces(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As `PreparedData.pieces`."""
        return self._data.pieces(int(self._indices[index]))

    def piece_lengths(self, index: int) -> list[int]:
        """As `PreparedData.piece_lengths`."""
        return self._data.piece_lengths(int(self._indices[index]))

    def part(self, indices: npt.NDArray[np.int64]) -> PreparedPart:
        """Some of these samples; `indices`: positions among them."""
        return PreparedPart(self._data, self._indices[indices])


Samples = PreparedData | PreparedPart
"""What can be packed and measured."""


def open_prepared(folder: str | Path) -> PreparedData:
    """Open a folder that `prepare` has finished.

    Raises:
        ValueError: the folder is not complete, or its files do not belong together.
    """
    folder = Path(folder)
    if not (folder / "COMPLETE").is_file():
        raise ValueError(f"prepared data {str(folder)!r} is not complete: remove it, start again")
    data = PreparedData(folder)
    tokens, samples = data.counts.tokens, data.counts.samples
    sizes = (len(data._ids), len(data._mask), int(data._offsets[-1]), len(data.loss_counts))
    if sizes != (tokens, tokens, tokens, samples) or len(data) != samples:
        raise ValueError(f"prepared data {str(folder)!r} is damaged: remove it, start again")
    return data


class PreparedWriter:
    """Writes the arrays of a folder sample by sample."""

    def __init__(self, folder: Path) -> None:
        """Start empty arrays in a folder that is there."""
        self._folder = folder
        self._files = contextlib.ExitStack()
        self._tokens = 0
        self.largest_id = -1
        """Of all tokens so far."""
        self._whole = True
        """No sample has had more than one piece."""
        names = {"input_ids": "<i4", "loss_mask": "|b1", "offsets": "<i8", "loss_counts": "<i4"}
        self._ids, self._mask, self._offsets, self._loss_counts, self._pieces = (
            self._files.enter_context(GrowingArray(folder / name, dtype))
            for name, dtype in (*((f"{n}.npy", d) for n, d in names.items()), (PIECES, "<i8"))
        )
        self._offsets.append([0])
        self._pieces.append([0])

    def append(
        self,
        input_ids: npt.NDArray[np.int32],
        loss_mask: npt.NDArray[np.bool_],
        lengths: tuple[int, ...],
    ) -> int:
        """Add a sample, with the lengths of its pieces; gives the number of its targets."""
        targets = int(loss_mask.sum())
        self._ids.append(input_ids)
        self._mask.append(loss_mask)
        self._pieces.append(self._tokens + np.cumsum(lengths or (len(input_ids),)))
        self._tokens += len(input_ids)
        self.largest_id = max(self.largest_id, int(input_ids.max(initial=-1)))
        self._offsets.append([self._tokens])
        self._loss_counts.append([targets])
        self._whole = self._whole and len(lengths) <= 1
        return targets

    def __enter__(self) -> Self:
        """Hand out the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the arrays; the one of pieces goes when it says nothing new."""
        self._files.close()
        if self._whole:
            (self._folder / PIECES).unlink()


class GrowingArray:
    """A one-dimensional .npy file written piece by piece; its header is filled in at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        """Start an empty file; `dtype` as numpy spells it, byte order included."""
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._header()

    def append(self, values: npt.ArrayLike) -> None:
        """Add values at the end."""
        piece = np.ascontiguousarray(values, dtype=self._dtype)
        self._file.write(piece.tobytes())
        self._length += len(piece)

    def _header(self) -> None:
        # numpy leaves room for the length to grow, so both headers have one size.
        self._file.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> Self:
        """Hand out the open array."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the final length and close."""
        with self._file:
            self._header()
