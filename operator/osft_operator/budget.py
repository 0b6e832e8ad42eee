"""A bound on how often something may happen, for all jobs together, shared by namespaces.

Used by reconcile for the status writes that could wait. Knows nothing of what it bounds.
"""

from __future__ import annotations

from collections.abc import Callable

from osft_operator.queue import Key


class Budget:
    """So many per second, and as many at once after a pause; who comes too early gets a place.

    Namespaces that want some share what there is, so that a thousand jobs of one, which come in a
    burst, put off no other's. Where one comes while another's places are given away already, a
    little more than the bound is used for a while.
    """

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._interval = 1 / per_second
        self._at_once = per_second
        self._clock = clock
        self._next: dict[str, float] = {}
        self._places: dict[Key, float] = {}

    def take(self, key: Key) -> float:
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
            place = self._new_place(key.namespace, now)
        if place <= now:
            self._places.pop(key, None)
            return 0.0
        self._places[key] = place
        return place - now

    def forget(self, key: Key) -> None:
        """Give up a place."""
        self._places.pop(key, None)

    def _new_place(self, namespace: str, now: float) -> float:
        self._next = {each: slot for each, slot in self._next.items() if slot > now}
        # The rate that is used up evenly, less what may come at once.
        slot = self._next.get(namespace, now)
        sharing = len(self._next.keys() | {namespace})
        self._next[namespace] = slot + sharing * self._interval
        return slot - max(0.0, self._at_once - sharing) * self._interval
