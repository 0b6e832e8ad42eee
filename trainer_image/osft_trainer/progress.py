"""The progress of one rank, kept for whoever asks.

Lives here: the latest `report.Progress`, its file progress.json, and the estimate of the time
left. Made by `worker`, fed by `train`, read by `server` from another thread. Must never stop the
training: a number that is not finite or a disk that fails is left out, not raised.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from osft_trainer.report import Metric, Progress, RunFolder, write_atomically

WRITE_INTERVAL_SECONDS = 1.0
"""progress.json is written at most this often, unless something of note happened."""

_OF_NOTE = ("phase", "latest_checkpoint", "final")
"""Changes of these are written at once."""

_SMOOTHING = 0.1
"""Weight of the newest step in the mean duration of steps."""

logger = logging.getLogger(__name__)


class Reporter:
    """Holds the progress of this rank; rank 0 also writes it to progress.json."""

    def __init__(
        self,
        folder: RunFolder,
        run_id: str,
        attempt: int,
        rank: int,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        show: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """Begin in phase Starting; nothing is written yet. `show` is called after each change."""
        self._folder = folder
        self._clock = clock
        self._monotonic = monotonic
        self._show = show
        self._owns_file = True
        self._written_at = -math.inf
        self._step_at: float | None = None
        self._seconds_per_step: float | None = None
        self._current = Progress(run_id=run_id, attempt=attempt, global_rank=rank)

    def current(self) -> Progress:
        """The latest progress; safe to call from any thread."""
        return self._current

    def update(self, **changes: Any) -> None:
        """Change fields of `report.Progress`; what is not finite becomes absent.

        `estimated_remaining_seconds` is worked out from the steps' durations unless it is given.
        """
        before = self._current
        assert set(changes) <= set(Progress.model_fields), f"unknown among {sorted(changes)}"
        changes = {name: _finite(value) for name, value in changes.items()}
        self._time_steps(changes)
        changes.setdefault("estimated_remaining_seconds", self._remaining(changes))
        changes["last_updated_time"] = _rfc3339(self._clock())
        # A new object each time: the server's thread never sees half a change.
        self._current = before.model_copy(update=changes)
        of_note = any(getattr(before, name) != getattr(self._current, name) for name in _OF_NOTE)
        if of_note or self._monotonic() - self._written_at >= WRITE_INTERVAL_SECONDS:
            self._write()
        self._show(self._current)

    def measured(self, **numbers: float | None) -> None:
        """Set further numbers by name, beside those that are there; None takes one away."""
        found = {metric.name: metric.value for metric in self._current.metrics}
        for name, number in numbers.items():
            found.pop(name, None)
            if number is not None and math.isfinite(number):
                found[name] = f"{number:.6g}"
        self.update(metrics=[Metric(name=n, value=v) for n, v in found.items()])

    def leave_file(self) -> None:
        """Write no more: the folder is another's."""
        self._owns_file = False

    def close(self) -> None:
        """Write the last state of things."""
        self._write()

    def _time_steps(self, changes: dict[str, Any]) -> None:
        steps = changes.get("step", self._current.step) - self._current.step
        if steps <= 0:
            return
        now = self._monotonic()
        # The step that follows a resume jumps: its count says nothing about time.
        if self._step_at is not None and self._current.phase == "Training":
            seconds = (now - self._step_at) / steps
            mean = self._seconds_per_step
            self._seconds_per_step = (
                seconds if mean is None else mean + _SMOOTHING * (seconds - mean)
            )
        self._step_at = now

    def _remaining(self, changes: dict[str, Any]) -> int | None:
        total: int | None = changes.get("total_steps", self._current.total_steps)
        step: int = changes.get("step", self._current.step)
        if total is None or self._seconds_per_step is None:
            return None
        return math.ceil(max(0, total - step) * self._seconds_per_step)

    def _write(self) -> None:
        self._written_at = self._monotonic()
        if self._current.global_rank != 0 or not self._owns_file:
            return
        try:
            write_atomically(self._folder.progress, self._current.to_json() + "\n")
        except OSError as error:
            logger.warning("progress.json is not written: %s", error)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
