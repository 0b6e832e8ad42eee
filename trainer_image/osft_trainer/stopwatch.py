"""How long steps take, from one to the next.

Lives here: the time between steps without what is no step. Used by `loop`. Must never wait for a
device: that would cost what it measures.

A device still works on a step when the host is through with it: the optimizer and the projection
of values are only queued then. So a step's time is no span inside of it but the one from the end
of the step before, as the host sees both: the rest of that step is in it, its own is in the next
one's. Where something else lies between that waits for the device (a save, a validation), the rest
is counted with that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Runs from lap to lap, and stands where it is told to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """The first lap begins; `clock` is in seconds."""
        self._clock = clock
        self._since = clock()

    def lap(self) -> float:
        """Seconds of the lap that ends; the next one begins."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        return seconds

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What is done inside belongs to no lap."""
        began = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - began
