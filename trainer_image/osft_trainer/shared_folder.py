"""Whether ckptOutputDir can be written, and is one folder for all ranks.

The trainer's first act, before a model is read. Called by `worker` on every rank. Must never leave
a file behind, or touch anything that lies in the folder.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from pathlib import Path

from osft_trainer.agreement import any_rank, barrier, from_first_rank, raise_together
from osft_trainer.parallel import World

PATIENCE_SECONDS = 10.0
"""How long a network file system may take to show another node's new file."""

_BAD_PLACES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
"""What stays as it is when tried again. A full or failing disk does not count: it may recover."""


def probe(root: Path, world: World, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Make the folder, write into it, and see the first rank's file there. Collective.

    Raises:
        ValueError: on every rank; the folder cannot be written, or ranks have different folders.
        OSError: on every rank; the disk is full or fails.
    """
    token = from_first_rank(world, lambda: _announce(root))
    seen = world.rank == 0 or _sees(root / token, patience_seconds)
    missing = any_rank(not seen, world)
    failure: ValueError | OSError | None = None
    if seen and world.rank != 0:
        try:
            problem = _problem(root, f"{token}-{world.rank}")
            failure = None if problem is None else ValueError(problem)
        except OSError as error:
            failure = error
    barrier(world)
    if world.rank == 0:
        (root / token).unlink(missing_ok=True)
    if missing:
        raise ValueError(
            f"ckpt_output_dir: {root} is not the same folder on all nodes: rank {world.rank} "
            + ("sees" if seen else "does not see")
            + " what rank 0 wrote there; mount one shared (ReadWriteMany) volume on every node"
        )
    raise_together(failure, world, f"ckpt_output_dir: another rank cannot write in {root}")


def _announce(root: Path) -> str:
    """Write the token file; its name is what the others look for."""
    token = f".probe-{secrets.token_hex(8)}"
    problem = _problem(root, token, keep=True)
    if problem is not None:
        raise ValueError(problem)
    return token


def _problem(root: Path, name: str, keep: bool = False) -> str | None:
    """Try to write; None when it went well, else what is wrong and what to do."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / name, "w", encoding="utf-8") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        if not keep:
            os.unlink(root / name)
    except OSError as error:
        if error.errno not in _BAD_PLACES:
            raise
        return (
            f"ckpt_output_dir: user {os.getuid()}, group {os.getgid()} cannot write in {root}: "
            f"{error.strerror} ({error.filename}); give that user the folder (in Kubernetes by "
            "fsGroup), or choose another one"
        )
    return None


def _sees(path: Path, patience_seconds: float) -> bool:
    end = time.monotonic() + patience_seconds
    while not path.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
