"""Compressed files as streams of their content: gzip, bzip2, xz, Zstandard.

Lives here: which suffix is which compression, and a damaged stream as an error that names the file.
Must never: hold a file in memory, or end early without an error where a file was cut off.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes, in lower case."""


def open_decompressed(path: Path, compression: str | None) -> BinaryIO:
    """The content of a file; `compression` is one of COMPRESSIONS, None for a plain file.

    Raises:
        ValueError: a package is missing that reads it; says which.
        OSError: the file cannot be opened.
    """
    match compression:
        case None:
            return path.open("rb")
        case ".gz":
            return cast(BinaryIO, gzip.open(path))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path))
        case ".xz":
            return cast(BinaryIO, lzma.open(path))
    assert compression == ".zst", compression
    return _zstandard(path)


def _zstandard(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data_path: {path.name} needs the package pyarrow: pip install 'osft[data]', or "
            "compress it with gzip"
        ) from error
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


@contextlib.contextmanager
def damage_named(name: str, compression: str | None) -> Iterator[None]:
    """Turn what a decompressor says of a damaged file into our error.

    Raises:
        ValueError: the stream is damaged or was cut off.
        OSError: the file cannot be read now.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # A failure of the disk has a number, and may pass; a decompressor's refusal has none.
        if compression is None or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"data_path: {name} cannot be decompressed: {reason}; it is damaged or was cut off: "
            "make or copy it again"
        ) from error
