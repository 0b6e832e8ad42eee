"""One line per optimizer step: metrics.jsonl, and whatever service follows it.

Called by `loop` on the first rank alone. Must never: write what is no JSON (NaN, infinity), keep
lines of steps that a resumed run does again (the file reads like that of one undisturbed run), or
end a training because a service fails.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from osft_trainer.report import metric_lines, write_atomically
from osft_trainer.trackers import Row, Service

logger = logging.getLogger(__name__)


class Tracker:
    """Writes the rows of one run."""

    def __init__(self, path: Path, done_steps: int, services: Sequence[Service] = ()) -> None:
        """Open the file and cut off what lies behind `done_steps`."""
        kept = metric_lines(path) if path.is_file() else []
        lines = [_line(row) for row in kept if row["step"] <= done_steps]
        write_atomically(path, "".join(lines))
        # A line a step, so that `tail -f` shows the run as it is.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._services = list(services)

    def write(self, row: Row) -> None:
        """Append a step's numbers."""
        self._file.write(_line(row))
        for service in list(self._services):
            try:
                service.log(row)
            # Whatever a service raises: the training is worth more than being watched.
            except Exception:
                name = type(service).__name__.lstrip("_")
                logger.warning("%s takes no more metrics", name, exc_info=True)
                self._services.remove(service)

    def sync(self) -> None:
        """Force the lines to disk; before a state counts that follows them. From any thread."""
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
        """Close the file, and tell the services how it ended."""
        self._file.close()
        for service in self._services:
            try:
                service.close(failed=kind is not None)
            except Exception:
                name = type(service).__name__.lstrip("_")
                logger.warning("%s was not closed", name, exc_info=True)


def _line(row: Row) -> str:
    return json.dumps(dict(row), allow_nan=False) + "\n"
