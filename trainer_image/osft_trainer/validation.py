"""Validation: which samples are held back, when their loss is measured, and which model is best.

Called by `train` (the data) and `loop` (between steps), by all ranks together. Must never: train on
a sample that is held back, or take a number for the best that is none. What must survive a resume
is in `checkpoint.Position`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from osft_trainer.agreement import any_rank
from osft_trainer.checkpoint import Position
from osft_trainer.config import TrainingParameters
from osft_trainer.evaluation import mean_loss
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedData
from osft_trainer.progress import Reporter

logger = logging.getLogger(__name__)


class Selection(PreparedData):
    """Some samples of a prepared folder, under numbers of their own."""

    def __init__(self, whole: PreparedData, members: npt.NDArray[np.int64], name: str) -> None:
        """`members` are numbers of samples of `whole`; `name` tells this selection from others."""
        self._whole = whole
        self._members = members
        self.folder: Path = whole.folder
        self.digest = f"{whole.digest}-{name}"
        self.largest_id, self.longest = whole.largest_id, whole.longest
        self.lengths = whole.lengths[members]
        self.loss_counts = whole.loss_counts[members]
        self.counts = replace(
            whole.counts,
            samples=len(members),
            tokens=int(self.lengths.sum()),
            loss_tokens=int(self.loss_counts.sum()),
        )

    def sample(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the whole data."""
        return self._whole.sample(int(self._members[index]))

    def pieces(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As of the whole data."""
        return self._whole.pieces(int(self._members[index]))

    def piece_lengths(self, index: int) -> list[int]:
        """As of the whole data."""
        return self._whole.piece_lengths(int(self._members[index]))


def split_off(prepared: PreparedData, share: float) -> tuple[Selection, Selection]:
    """The samples to train on, and about this share of all to validate on.

    A sample's side follows from its tokens alone: not from its place, the seed or the others. So
    equal samples are on one side, and what was held back stays so when data is added.

    Raises:
        ValueError: one of the sides would be empty.
    """
    below = int(share * 2**64)
    held = np.array([_hash(prepared.sample(i)[0]) < below for i in range(len(prepared))])
    if held.all() or not held.any():
        which = "no sample to train on" if held.all() else "no sample to validate on"
        raise ValueError(
            f"validation_split {share} of {len(prepared)} samples leaves {which}: change it, add "
            "data, or give validation_data_path instead"
        )
    name = f"{share:g}"
    return (
        Selection(prepared, np.flatnonzero(~held), f"without-{name}"),
        Selection(prepared, np.flatnonzero(held), name),
    )


def _hash(input_ids: torch.Tensor) -> int:
    """64 bits of the tokens' sha256, the same on every machine."""
    raw = input_ids.numpy().astype("<i4").tobytes()
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


@dataclass(frozen=True)
class Validation:
    """The validation of one run."""

    training: TrainingParameters
    world: World
    model: OSFTModel
    data: PreparedData
    reporter: Reporter
    export_best: Callable[[OSFTModel, Position], None]
    """Writes the model to exports/best; collective."""

    def is_due(self, step: int, epoch_ends: bool, run_ends: bool) -> bool:
        """Whether the loss is measured after this step."""
        every = self.training.validation_frequency
        return (
            (every is not None and step % every == 0)
            or (epoch_ends and self.training.validate_at_epoch)
            or (run_ends and self.training.validate_at_final)
        )

    def measure(self, position: Position, before_export: Callable[[], None]) -> Position:
        """Measure after the position's step, and write the model if it is the best. Collective.

        The export comes before any state that says so: a run killed in between does it again.
        `before_export` is called by every rank just before it.
        """
        loss = mean_loss(
            self.model,
            self.data,
            max_tokens_per_gpu=self.training.max_tokens_per_gpu,
            world=self.world,
        )
        best = position.best_validation_loss
        if not math.isfinite(loss):
            self.reporter.measured(validationLoss=None)
            if self.world.rank == 0:
                told = "the validation loss after step %d is %s and is left out"
                logger.warning(told, position.step, loss)
            return replace(position, validation_loss=None)
        threshold = self.training.val_loss_improvement_threshold
        is_best = best is None or loss < best - threshold
        # The first rank decides: no rounding of another may keep it out of the export.
        is_best = any_rank(is_best and self.world.rank == 0, self.world)
        best = loss if is_best else best
        self._say(position.step, loss, best)
        position = replace(position, validation_loss=loss, best_validation_loss=best)
        if is_best and self.training.save_best_val_loss:
            before_export()
            self.export_best(self.model, position)
        return position

    def tell(self, position: Position) -> None:
        """Report what an earlier attempt has measured."""
        self.reporter.measured(
            validationLoss=position.validation_loss,
            bestValidationLoss=position.best_validation_loss,
        )

    def _say(self, step: int, loss: float, best: float | None) -> None:
        self.reporter.measured(validationLoss=loss, bestValidationLoss=best)
        if self.world.rank == 0:
            told = "none before" if best is None else f"{best:.4f}"
            logger.info("validation loss after step %d: %.4f (lowest: %s)", step, loss, told)


def for_data(position: Position, validation: Validation | None) -> Position:
    """The position of a saved state without what was measured on other data than these."""
    digest = "" if validation is None else validation.data.digest
    if position.validation_data == digest:
        return position
    return replace(
        position, validation_data=digest, validation_loss=None, best_validation_loss=None
    )
