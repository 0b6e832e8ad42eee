"""How far the run is, for a person who looks on: a bar on a terminal, lines in a log.

Made by `worker` on the first rank, fed by `progress.Reporter`. Must never: end a training (a
terminal may go away), or say one step twice.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from osft_trainer.report import Progress, duration, summary

DRAW_SECONDS = 0.1
"""Least time between two drawings of the bar."""

_BAR_CELLS = 24

logger = logging.getLogger(__name__)


class Display(Protocol):
    """Shows progress to a person."""

    def show(self, progress: Progress) -> None:
        """Take news; called after each of them."""

    def close(self) -> None:
        """Show no more."""


def display(stream: TextIO) -> Display:
    """A bar if the stream is a terminal, else lines in the log."""
    return Bar(stream) if stream.isatty() else Lines()


def headline(progress: Progress) -> str:
    """The numbers that matter, in one line: `42% 840/2000  loss 0.1234  9.8k tokens/s  3h25m`."""
    parts = [summary(progress)]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{_short(progress.tokens_per_second)} tokens/s")
    if progress.estimated_remaining_seconds is not None:
        parts.append(f"{duration(progress.estimated_remaining_seconds)} left")
    return "  ".join(parts)


class Lines:
    """One line of the log per step."""

    def __init__(self) -> None:
        """Nothing is said before the first step."""
        self._step: int | None = None

    def show(self, progress: Progress) -> None:
        """Say a step that is new."""
        if progress.phase != "Training" or progress.step == self._step:
            return
        self._step = progress.step
        logger.info("%s%s", headline(progress), _details(progress))

    def close(self) -> None:
        """Nothing is left to say."""


class Bar:
    """One line at the bottom of a terminal, drawn over itself; log lines go above it."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Log lines of this process push the bar aside from now on."""
        self._stream = stream
        self._clock = clock
        self._drawn_at = -math.inf
        self._is_drawn = False
        self._newest: Progress | None = None
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._make_way)

    def show(self, progress: Progress) -> None:
        """Draw it, unless it was drawn a moment ago and nothing but a step has happened."""
        before, self._newest = self._newest, progress
        same_phase = before is not None and before.phase == progress.phase
        if same_phase and self._clock() - self._drawn_at < DRAW_SECONDS:
            return
        self._drawn_at = self._clock()
        self._write("\r\x1b[K" + bar_line(progress, shutil.get_terminal_size().columns))
        self._is_drawn = True

    def close(self) -> None:
        """Leave the last state standing."""
        for handler in self._handlers:
            handler.removeFilter(self._make_way)
        if self._newest is not None:
            line = bar_line(self._newest, shutil.get_terminal_size().columns)
            self._write(f"\r\x1b[K{line}\n")

    def _make_way(self, record: logging.LogRecord) -> bool:
        """A filter that lets everything pass, on a line of its own."""
        if self._is_drawn:
            self._is_drawn = False
            self._write("\r\x1b[K")
        return True

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The terminal is gone, or the stream is closed; the training is not.
            self._is_drawn = False


def bar_line(progress: Progress, columns: int) -> str:
    """The bar, cut to the width of the terminal."""
    text = headline(progress)
    if progress.phase not in ("Training", "Done"):
        text = f"{progress.phase}  {text}"
    if not progress.total_steps:
        return text[: columns - 1]
    share = min(1.0, progress.step / progress.total_steps)
    full = int(share * _BAR_CELLS)
    return f"[{'=' * full}{' ' * (_BAR_CELLS - full)}] {text}"[: columns - 1]


def _details(progress: Progress) -> str:
    parts = []
    if progress.learning_rate is not None:
        parts.append(f"  learning rate {progress.learning_rate:.3g}")
    if progress.grad_norm is not None:
        parts.append(f"  gradient norm {progress.grad_norm:.3g}")
    return "".join(parts)


def _short(number: float) -> str:
    """Three digits and a unit: 950, 9.81k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
