"""Folders and files that a crash leaves whole, under their names or not at all.

Lives here: forcing bytes to disk, exchanging a folder for a new one, and what to do when a disk
does not take them. Called by whatever writes what must outlive a crash: `shards`, `checkpoint`,
`saving`, `export`, `data`, `decomposition`, `importance`, `retention`; and by `identity`, which
mends what an earlier attempt has left. Must never: import torch, or know what is in a folder.

A folder `NAME` is written as `.NAME.TOKEN.writing`, its marker included, and only then gets its
name; an older one is `.NAME.old` meanwhile. The token is that of the claim on the run's folder, so
an attempt that has been overtaken writes into a folder of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from osft_trainer.report import COMPLETE, write_atomically

_WRITING = ".writing"
_OLD = ".old"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_ROOM = "free or add space on this volume"


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Write a file at once, so that from now on it is there, whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    sync(path.parent)


def is_full(error: Exception) -> bool:
    """Whether a disk or a quota has no room; safetensors tells it in its message only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(number) in str(error) for number in _FULL)


def told(error: Exception) -> str:
    """What a failure to write says, of which file, and what to do, as far as they are known."""
    words = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        words = error.strerror or str(error)
        words += f": {error.filename}" if error.filename is not None else ""
        if error.errno == errno.EROFS:
            return f"{words}; this volume must be writable"
    return f"{words}; {_ROOM}" if is_full(error) and _ROOM not in words else words


def work_folder(out: Path, token: str) -> Path:
    """Where the content of `out` is written first."""
    return out.with_name(f".{out.name}.{token or 'now'}{_WRITING}")


def complete(folder: Path) -> None:
    """Make a folder durable with all that is in it, marker and all, before it gets its name."""
    (folder / COMPLETE).touch()
    for path in [*sorted(folder.rglob("*")), folder]:
        sync(path)


def put_in_place(work: Path, out: Path) -> None:
    """Give a complete folder its name; an older one of that name goes."""
    old = out.with_name(f".{out.name}{_OLD}")
    if old.exists():
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    work.rename(out)
    sync(out.parent)
    if old.exists():
        shutil.rmtree(old)


def put_back(parent: Path, name: str) -> None:
    """Undo an exchange in `parent` that a crash has cut in two; the name may be a pattern.

    The older folder has its name again, unless the new one came to it.
    """
    for old in parent.glob(f".{name}{_OLD}"):
        out = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def remove_unfinished(parent: Path, name: str) -> None:
    """Remove what crashes have left half written; it may be as large as a model."""
    for work in parent.glob(f".{name}.*{_WRITING}"):
        shutil.rmtree(work)
