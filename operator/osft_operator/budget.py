"""A bound on how often something may happen, for all jobs together.

Used by reconcile for the status writes that could wait. Knows nothing of what it bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Budget:
    """So many per second, and as many at once after a pause; who comes too early gets a place."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._interval = 1 / per_second
        self._at_once = per_second
        self._clock = clock
        self._next = clock()
        self._places: dict[Hashable, float] = {}

    def take(self, key: Hashable) -> float:
        """Use one.

        Args:
            key: who asks; its place is kept until it comes again, so that thousands who wait come
                one after the other and not all again and again.

        Returns:
            0 when it was there; else after how many seconds to come again.
        """
        now = self._clock()
        place = self._places.get(key)
        if place is None:
            # The rate that is used up evenly, less what may come at once.
            slot = max(self._next, now)
            self._next = slot + self._interval
            place = slot - (self._at_once - 1) * self._interval
        if place <= now:
            self._places.pop(key, None)
            return 0.0
        self._places[key] = place
        return place - now

    def forget(self, key: Hashable) -> None:
        """Give up a place."""
        self._places.pop(key, None)
