"""Folders that are being written, and what is left of those whose writer was killed.

Lives here: making such a folder, holding it, and telling one that is held from one that is not.
Called by `data`. Must never: remove what a process is writing, or know what is in a folder.

A writer holds a lock (flock) on the file WRITING in its folder, which the system lets go when the
process ends, however it ends. The file gets its name when it is locked, so a folder without it is
just being made, or lies where nothing can be locked: it stays. So does one whose lock cannot be
had. Where a network file system keeps locks on each machine for itself (NFS mounted with nolock or
local_lock), a writer on another machine would lose its folder: it fails to finish, and is tried
again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

WRITING = "WRITING"
"""The file in a folder that its writer holds."""


@contextlib.contextmanager
def written_folder(root: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `root` to write in; removed at the end, if it lies there still."""
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        with _held(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _held(work: Path) -> Iterator[None]:
    new = work / f"{WRITING}.new"
    with new.open("wb") as file:
        if _locked(file.fileno()):
            os.replace(new, work / WRITING)
        else:
            new.unlink()
        yield


def remove_leftovers(root: Path, prefix: str) -> None:
    """Remove the folders of this prefix in `root` whose writer is no more."""
    for work in root.glob(f"{prefix}*"):
        try:
            file = (work / WRITING).open("r+b")
        except OSError:
            continue
        with file:
            dead = _locked(file.fileno())
            if dead:
                shutil.rmtree(work, ignore_errors=True)
        if dead:
            # On NFS a file that is open stays under another name until it is closed.
            shutil.rmtree(work, ignore_errors=True)


def _locked(descriptor: int) -> bool:
    """Whether the lock could be had; not, where somebody has it or there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
