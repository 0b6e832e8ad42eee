"""One line per optimizer step: metrics.jsonl, and Weights & Biases when asked for.

Called by `loop` on the first rank alone. Must never: write what is no JSON (NaN, infinity), or keep
lines of steps that a resumed run does again: the file reads like that of one undisturbed run.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from osft_trainer.config import TrainingParameters
from osft_trainer.report import metric_lines, write_atomically

Row = Mapping[str, float | int | str]


class Tracker:
    """Writes the rows of one run."""

    def __init__(self, path: Path, done_steps: int, wandb_run: Any = None) -> None:
        """Open the file and cut off what lies behind `done_steps`."""
        kept = metric_lines(path) if path.is_file() else []
        lines = [_line(row) for row in kept if row["step"] <= done_steps]
        write_atomically(path, "".join(lines))
        # A line a step, so that `tail -f` shows the run as it is.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._wandb = wandb_run

    def write(self, row: Row) -> None:
        """Append a step's numbers."""
        self._file.write(_line(row))
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["step"])

    def sync(self) -> None:
        """Force the lines to disk; before a state is saved that follows them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        """The tracker itself; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, and tell Weights & Biases how it ended."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def start_wandb(training: TrainingParameters, run_id: str, folder: Path) -> Any:
    """A Weights & Biases run that later attempts continue; None when no project is given.

    Raises:
        ValueError: wandb is not installed, or has no key.
    """
    if training.wandb_project is None:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"wandb_project {training.wandb_project!r} needs the package wandb: install osft[wandb]"
        ) from error
    try:
        return wandb.init(
            project=training.wandb_project,
            entity=training.wandb_entity,
            name=training.wandb_run_name,
            id=run_id.replace("/", "-"),
            resume="allow",
            dir=str(folder),
            config=training.model_dump(mode="json"),
        )
    except wandb.errors.UsageError as error:
        raise ValueError(
            f"wandb_project {training.wandb_project!r}: {error}; set WANDB_API_KEY, or "
            "WANDB_MODE=offline"
        ) from error


def _line(row: Row) -> str:
    return json.dumps(dict(row), allow_nan=False) + "\n"
