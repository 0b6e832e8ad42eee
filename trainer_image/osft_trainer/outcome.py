"""How a training run ends.

Lives here: the result of a run that reached its end, and one exception per other end that a caller
must tell apart. Raised by `train` and its parts, mapped to exit codes by `worker`. Bad input is a
ValueError; an exception that is neither is a crash and worth another try. Must never import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from osft_trainer.report import Retention


class Diverged(RuntimeError):
    """Loss or gradient is no finite number any more; a retry would end the same way."""


class NoLossTokens(ValueError):
    """An optimizer step has nothing to learn from; a retry would end the same way."""


class OutOfMemory(RuntimeError):
    """A device or the host has no memory left for a step. Another try may find more of it."""


class Preempted(RuntimeError):
    """A stop was asked for; what can be resumed is saved."""


class Superseded(RuntimeError):
    """A newer attempt of the run owns the folder; this one must not write there."""


class VersionSkew(ValueError):
    """An operator of another version wrote arguments that this trainer does not take."""


@dataclass(frozen=True)
class TrainResult:
    """A run that reached its end."""

    final_dir: Path | None
    """Hugging Face folder of the trained model; None with save_final_checkpoint off."""
    steps: int
    """Optimizer steps of the whole run, also those of earlier attempts."""
    loss: float | None
    """Mean loss per counted token in the last step; None when there was no step."""
    leak: float | None
    """Part of the update inside the kept subspaces, relative to the update; see `linear`."""
    retention: Retention | None = None
    """Loss on text of the old skills before and after; None without such text."""
    leak_exported: float | None = None
    """The same after rounding to the type of the final folder's weights; None without it."""
    validation_loss: float | None = None
    """Mean loss per token of the validation data, as last measured; None without such data."""
    best_validation_loss: float | None = None
    """The lowest measured, by more than val_loss_improvement_threshold."""
    already_finished: bool = False
    """Whether an earlier call had finished the run, so that nothing was trained now."""
