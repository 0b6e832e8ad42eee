"""States to resume from: `checkpoints/step-NNNNNNNN/`, there whole or not at all.

Lives here: giving a written state its name, finding the newest one that is intact, loading it on
any number of ranks, and removing old ones. Called by `train` (loading, by all ranks together),
`saving` and `export_checkpoint` (reading one state). Must never: use pickle, leave a half-written
folder under a name that counts, or remove the newest state.

A folder holds `state.json` (where the run stands and whose it is), per rank the files of `shards`,
and COMPLETE, written last. There is no state of random numbers or of the schedule: both follow from
the step (`loop`, `schedule`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from osft_trainer.agreement import any_rank, from_first_rank, raise_together
from osft_trainer.durable import sync
from osft_trainer.parallel import World
from osft_trainer.report import COMPLETE, RunFolder
from osft_trainer.shards import Trainables, open_shard, read_rows

FORMAT = 2
"""Raised when the files change; a state of a format that is not readable is refused."""
ELEMENTWISE = 1
"""The format of states whose second moments are those of single numbers, made of gradients that
were not projected."""
READABLE = (ELEMENTWISE, FORMAT)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a run stands: after `step` optimizer steps, with (epoch, batch) the next one."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_tokens: int = 0
    """Loss tokens of all steps so far."""
    loss: float | None = None
    """Of the last step."""
    validation_data: str = ""
    """Digest of the data that the next two belong to."""
    validation_loss: float | None = None
    """As last measured."""
    best_validation_loss: float | None = None
    """The lowest by more than the threshold."""


@dataclass(frozen=True)
class State:
    """What is saved and restored, besides the position."""

    trainables: Trainables
    optimizer: torch.optim.Optimizer
    decomposition: str
    """Digest of the bases that the trainables are factors of."""
    project_momentum: Callable[[], None] = lambda: None
    """Takes kept directions out of first moments; collective."""


@dataclass(frozen=True)
class Checkpoints:
    """The states of one run folder, as one attempt of the run sees them."""

    folder: RunFolder
    world: World
    attempt: int
    keep: int
    check_owner: Callable[[], None]
    """Raises Superseded when a newer attempt owns the folder; called on the first rank."""
    token: str
    """Of the claim: no other process writes into a work folder of this name."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What `export_checkpoint` must know of the run, as JSON values."""

    def make_work_folder(self, position: Position) -> Path:
        """An empty folder for the rows of every rank. Collective; the first rank makes it.

        Raises:
            OSError: on every rank, when it cannot be made.
        """
        name = f".{self.folder.checkpoint(position.step).name}.{self.token}.partial"
        work = self.folder.checkpoints / name
        from_first_rank(self.world, partial(_make_empty, work))
        return work

    def publish(self, work: Path, position: Position, decomposition: str) -> str:
        """Give the rows of all ranks their name, durably; then remove older states.

        On the first rank alone, when every rank's rows are on disk; talks to no other rank.

        Raises:
            Superseded: a newer attempt owns the folder.
            OSError: it cannot be written.
        """
        target = self.folder.checkpoint(position.step)
        meta = {
            "format": FORMAT,
            "worldSize": self.world.size,
            "attempt": self.attempt,
            "decomposition": decomposition,
            "position": asdict(position),
            "run": dict(self.run),
        }
        (work / "state.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        sync(work / "state.json")
        sync(work)
        self.check_owner()
        if target.exists():  # without COMPLETE: a crash fell between rename and marker
            _remove(target)
        work.rename(target)
        sync(target.parent)
        name = mark_complete(target)
        # Once more: the next owner may have begun to read an older one.
        self.check_owner()
        for old in self.folder.complete_checkpoints()[: -self.keep]:
            _remove(old)
        return name

    def load(self, state: State) -> Position | None:
        """Restore the newest intact state, in place; None when there is none.

        A damaged state is set aside with a warning and the one before is taken. Damage is a file
        that is missing, cut or changed. One that cannot be read now may be whole: the run ends, and
        another try finds out.

        Raises:
            ValueError: the newest intact state belongs to another model or decomposition, or is of
                another format.
            OSError: on every rank, when one cannot read a file.
        """
        names = from_first_rank(self.world, self._names)
        for name in reversed(names.split()):
            path = self.folder.checkpoints / name
            if not self._is_intact_everywhere(path):
                from_first_rank(self.world, partial(_set_aside, path))
                continue
            return self._restore(path, state)
        return None

    def _is_intact_everywhere(self, path: Path) -> bool:
        """Whether every rank finds its share of a state's files as they were written."""
        intact, failure = False, None
        try:
            intact = self._is_intact(path)
        except (ValueError, OSError) as error:
            failure = error
        raise_together(failure, self.world, f"checkpoint {path}: another rank could not read it")
        return not any_rank(not intact, self.world, patient=True)

    def _restore(self, path: Path, state: State) -> Position:
        saved = read_meta(path)
        assert saved is not None, "is_intact has read it"
        if saved["decomposition"] != state.decomposition:
            raise ValueError(
                f"checkpoint {path} belongs to another decomposition "
                f"({saved['decomposition']}, here {state.decomposition}): the base model, "
                "unfreeze_rank_ratio, parameterization, target_patterns, split_by, "
                "rank_allocation, the retention text (retention_data_path, retention_tokens) or "
                "the type of the weights (compute_dtype: auto is bfloat16 on a GPU, float32 on a "
                "CPU) is not what it was; set it back, or give the run another ckpt_output_dir or "
                "run_id"
            )
        found = [open_shard(path, rank) for rank in range(saved["worldSize"])]
        shards = [shard for shard in found if shard is not None]
        # A rank's rows left out would stay what they are: fresh factors among trained ones.
        assert len(shards) == len(found), "is_intact has read them all"
        is_elementwise = saved["format"] == ELEMENTWISE
        read_rows(shards, state.trainables, state.optimizer, is_elementwise)
        if is_elementwise:
            # What their gradients had in kept directions would move them.
            state.project_momentum()
        return Position(**saved["position"])

    def _names(self) -> str:
        """Complete states, oldest first; remains of interrupted saves are removed on the way."""
        if self.folder.checkpoints.is_dir():
            for path in self.folder.checkpoints.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)
        return " ".join(path.name for path in self.folder.complete_checkpoints())

    def _is_intact(self, path: Path) -> bool:
        """Whether this rank's share of the files is what was written; all are read once."""
        saved = read_meta(path)
        if saved is None:
            return False
        for rank in range(int(saved["worldSize"])):
            shard = open_shard(path, rank)
            if shard is None:
                return False
            if rank % self.world.size == self.world.rank and not shard.is_intact():
                return False
        return True


def mark_complete(folder: Path) -> str:
    """Write the marker that makes a folder count, durably; return the folder's path."""
    marker = folder / COMPLETE
    marker.touch()
    sync(marker)
    sync(folder)
    return str(folder)


def _make_empty(folder: Path) -> str:
    """A new folder; what an interrupted save left under this name goes."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return str(folder)


def _remove(path: Path) -> None:
    """Remove a state, by rename first: half-removed it must not look complete."""
    gone = path.with_name(f".{path.name}.removed")
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def _set_aside(path: Path) -> str:
    """Take a damaged state out of the sequence, so that it is never counted as the newest."""
    aside = path.with_name(f"{path.name}.damaged")
    logger.warning(
        "checkpoint %s is damaged (a file is cut or changed) and is not used; it is kept as %s",
        path,
        aside.name,
    )
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    return str(aside)


def read_meta(path: Path) -> dict[str, Any] | None:
    """state.json of a state; None when it is missing or damaged.

    Raises:
        ValueError: another version of the trainer wrote it, in another format.
        OSError: it cannot be read now.
    """
    try:
        found = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    number = found.get("format") if isinstance(found, dict) else None
    if not isinstance(number, int):
        return None
    if number not in READABLE:
        raise ValueError(
            f"checkpoint {path} is of format {number}, and this version of the trainer reads "
            f"formats {ELEMENTWISE} and {FORMAT}: use the version that wrote it, or begin anew "
            "with another ckpt_output_dir or run_id"
        )
    assert isinstance(found, dict)
    return found
