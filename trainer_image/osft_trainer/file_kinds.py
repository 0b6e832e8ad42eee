"""What kind of data a file holds, by its name and, where that says nothing, by its beginning.

Lives here: suffixes, compressions, and what looks like data and is not read, with the cure. Must
never: read rows (`sources` does), or choose among files (`data_files` does).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from osft_trainer.compression import COMPRESSIONS, open_decompressed

KINDS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Kinds of data files by their suffix, in lower case."""

_COMPRESSED_KINDS = frozenset({"jsonl", "json"})
"""The others are compressed inside."""

_CONVERT = "write its rows as JSON Lines, one object a line"
_UNPACK = "unpack it"

_REFUSED: Mapping[str, str] = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".avro", ".orc", ".feather"), _CONVERT),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz", ".mdb", ".db", ".sqlite"), _CONVERT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".snappy"), _UNPACK),
}
"""Suffixes of files that hold data, which nobody here reads; with the cure."""

_PART = re.compile(r"part-\d+")
_MAGIC_BYTES = 1 << 16


class Unreadable(ValueError):
    """A file that looks like data and cannot be read; the text says what to do."""


@dataclass(frozen=True)
class DataFile:
    """One file that is read."""

    path: Path
    name: str
    """For messages to the user: the path below the folder that was given."""
    kind: str
    """jsonl, json, parquet or arrow."""
    compression: str | None = None
    """Its suffix, for instance .gz."""

    @classmethod
    def named(cls, path: Path) -> DataFile:
        """A file that a user names: JSON Lines where neither name nor content says what it is.

        Raises:
            ValueError: it is of a kind that cannot be read.
        """
        try:
            check_readable(path)
        except Unreadable as error:
            raise ValueError(f"data_path {str(path)!r} cannot be read: {error}") from error
        kind, compression = kind_of(path)
        return cls(path, path.name, kind or "jsonl", compression)

    def open(self) -> BinaryIO:
        """Its content, decompressed."""
        return open_decompressed(self.path, self.compression)

    @property
    def stem(self) -> str:
        """The name without the suffixes of kind and compression."""
        stem = self.name.removesuffix(self.path.suffix) if self.compression else self.name
        suffix = Path(stem).suffix
        return stem.removesuffix(suffix) if suffix.lower() in KINDS else stem


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """Kind and compression, each None where neither name nor content says it."""
    suffix, compression = path.suffix.lower(), None
    if suffix in COMPRESSIONS:
        suffix, compression = Path(path.stem).suffix.lower(), suffix
    kind = KINDS.get(suffix)
    # Spark writes part-00001, and part-00001-<id>.c000.
    if kind is None and compression is None and (not suffix or _PART.match(path.name)):
        kind = _kind_by_content(path)
    return kind, compression


def check_readable(path: Path) -> None:
    """Refuse what holds data by its name, and is of no kind that is read.

    Raises:
        Unreadable: with the cure.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    for suffix in reversed(suffixes):
        if suffix in _REFUSED:
            raise Unreadable(f"{suffix} is not read here: {_REFUSED[suffix]}")
        if suffix not in COMPRESSIONS:
            break
    kind = KINDS.get(suffixes[0]) if len(suffixes) == 2 and suffixes[1] in COMPRESSIONS else None
    if kind is not None and kind not in _COMPRESSED_KINDS:
        raise Unreadable(f"a compressed {kind} file is not read here: {_UNPACK}")


def _kind_by_content(path: Path) -> str | None:
    """For names without a suffix, as Spark writes them."""
    with path.open("rb") as file:
        start = file.read(_MAGIC_BYTES)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return "json"
    return "jsonl" if text.startswith(b"{") else None
