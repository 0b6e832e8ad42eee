"""Another run's results, moved to `previous-<n>/` of the run folder, and what crashes leave there.

Called by `identity` for a claim, by one process at a time. Must never: delete results, touch files
that no run wrote, or decide whose the folder is.
"""

from __future__ import annotations

import os
from pathlib import Path

from osft_trainer.durable import put_back, remove_unfinished
from osft_trainer.report import RunFolder, write_atomically

_MOVING = "MOVING"
"""File in `previous-<n>/` while things are moved there: a crash in between is made good by it."""


def has_results(folder: RunFolder) -> bool:
    """Whether there is anything that took training to make."""
    exports = folder.export_of_epoch(1).parent
    return (
        bool(folder.complete_checkpoints())
        or RunFolder.is_complete(folder.final)
        or (exports.is_dir() and any(exports.iterdir()))
    )


def set_aside(folder: RunFolder) -> None:
    """Move the old run to the next `previous-<n>/`; a crash at any point loses nothing."""
    _put_back(folder)
    number = 1
    while folder.previous(number).exists():
        number += 1
    target = folder.previous(number)
    target.mkdir()
    write_atomically(target / _MOVING, "")
    _move(folder, target)


def mend_exports(folder: RunFolder) -> None:
    """Make good what a crash has left half exchanged, and remove what it has left half written."""
    _put_back(folder)
    for parent, name in _exchanged(folder):
        remove_unfinished(parent, name)


def _put_back(folder: RunFolder) -> None:
    """Make good what a crash has left half exchanged."""
    for parent, name in _exchanged(folder):
        put_back(parent, name)


def _exchanged(folder: RunFolder) -> list[tuple[Path, str]]:
    """Where model folders lie that a later one may replace: parent and name, or pattern."""
    return [(folder.root, folder.final.name), (folder.best_export.parent, "*")]


def finish_setting_aside(folder: RunFolder) -> None:
    """Go on where a crash has interrupted `set_aside`."""
    for target in folder.root.glob("previous-*"):
        if (target / _MOVING).is_file():
            _move(folder, target)


def _move(folder: RunFolder, target: Path) -> None:
    for path in _belongings(folder):
        if path.exists():
            os.rename(path, target / path.name)
    (target / _MOVING).unlink()


def _belongings(folder: RunFolder) -> list[Path]:
    """What a run leaves in its folder, OWNER last. The cache is by content and stays for all."""
    return [
        folder.checkpoints,
        folder.export_of_epoch(1).parent,
        folder.final,
        folder.metrics,
        folder.progress,
        folder.plan,
        folder.logs,
        folder.root / "wandb",
        folder.verdict,
        folder.owner,
    ]
