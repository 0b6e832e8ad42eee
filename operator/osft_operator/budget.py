"""A bound on how often something may happen, for all jobs together.

Used by reconcile for the status writes that could wait. Knows nothing of what it bounds.
"""

from __future__ import annotations

from collections.abc import Callable


class Budget:
    """So many per second, and as many at once after a pause."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left = per_second
        self._since = clock()

    def take(self) -> float:
        """Use one.

        Returns:
            0 when it was there; else after how many seconds there will be one, and nothing is used.
        """
        now = self._clock()
        self._left = min(self._per_second, self._left + (now - self._since) * self._per_second)
        self._since = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._per_second
