"""The model folders of a run: final/, exports/epoch-NNNN/, exports/best/.

Lives here: what they are called, who may write them, what stands in their osft.json. The writing
itself is `export`'s. Called by `train` and, through it, by `loop`, by all ranks together. Must
never: write into a folder that another run has taken.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osft_trainer.agreement import from_first_rank
from osft_trainer.checkpoint import Position
from osft_trainer.config import TrainingParameters
from osft_trainer.export import OSFT_FILE, export_hf
from osft_trainer.identity import Claim, check_owner
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World
from osft_trainer.report import Retention, RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """The model folders of one run."""

    training: TrainingParameters
    folder: RunFolder
    claim: Claim
    world: World

    def write_final(
        self, model: OSFTModel, position: Position, retention: Retention | None
    ) -> Path:
        """Write the trained model."""
        self._export(model, self.folder.final, position, retention)
        return self.folder.final

    def write_epoch(self, model: OSFTModel, position: Position) -> None:
        """Write the model at the end of an epoch."""
        self._export(model, self.folder.export_of_epoch(position.epoch + 1), position)

    def write_best(self, model: OSFTModel, position: Position) -> None:
        """Write the model with the lowest validation loss so far, in the place of the one before.

        The older one has its name until the new one is whole and on disk.
        """
        self._export(model, self.folder.best_export, position)

    def facts_of_final(self) -> dict[str, Any]:
        """What final/ says about itself in osft.json, given to every rank."""
        path = self.folder.final / OSFT_FILE
        text = from_first_rank(self.world, lambda: path.read_text(encoding="utf-8"))
        facts: dict[str, Any] = json.loads(text)
        return facts

    def facts(self, position: Position, retention: Retention | None) -> dict[str, object]:
        """What a model folder of this run says of the run."""
        return facts_of(position, self.claim.run_id, self.claim.fingerprint, retention)

    def _export(
        self, model: OSFTModel, out: Path, position: Position, retention: Retention | None = None
    ) -> None:
        training = self.training
        from_first_rank(self.world, self._checked_owner)
        try:
            export_hf(
                model,
                training.model_path,
                out,
                self.world,
                None if training.save_dtype is None else getattr(torch, training.save_dtype),
                self.facts(position, retention),
                digest=self.claim.base_digest,
                token=self.claim.token,
                # Again: the writing may take minutes, in which the folder may become another's.
                before_exchange=lambda: check_owner(self.folder, self.claim),
            )
        except OSError:
            # The next owner removes what it finds half written, so it may be its doing.
            from_first_rank(self.world, self._checked_owner)
            raise
        if self.world.rank == 0:
            logger.info("wrote the model after step %d to %s", position.step, out)

    def _checked_owner(self) -> str:
        check_owner(self.folder, self.claim)
        return ""


def facts_of(
    position: Position, run_id: str, fingerprint: str, retention: Retention | None = None
) -> dict[str, object]:
    """What osft.json says of the run that a model comes from; what was not measured is left out."""
    found: dict[str, object] = {
        "run_id": run_id,
        "fingerprint": fingerprint,
        "steps": position.step,
        "loss": position.loss,
        "loss_tokens": position.loss_tokens,
        "validation_loss": position.validation_loss,
        "best_validation_loss": position.best_validation_loss,
    }
    if retention is not None:
        found["retention"] = retention.model_dump(by_alias=True, exclude_none=True)
    return {name: value for name, value in found.items() if value is not None}
