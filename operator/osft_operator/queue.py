"""Which OSFTJob is worked on next: a keyed queue, nothing about what the work is.

Informer, polling and the workers of `service` add keys, the workers take them. A key waits at most
once and is worked on by one worker at a time; added meanwhile, it comes again after. Failures wait
longer each time. Unhurried keys come when nothing else waits. Namespaces take turns, so one with a
thousand jobs cannot starve another. Used from one event loop only; must never know a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from osft_operator import metrics

UNHURRIED_TURNS = 8
"""Of so many keys that are taken, one is of those without hurry, whatever else waits."""


class Key(NamedTuple):
    """An OSFTJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class WorkQueue:
    """Keys that wait, that are delayed, and that are being worked on."""

    def __init__(
        self,
        *,
        backoff_initial_seconds: float = 1.0,
        backoff_max_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._backoff_initial = backoff_initial_seconds
        self._backoff_max = backoff_max_seconds
        self._clock = clock
        self._chance = chance
        # Per namespace the waiting keys with the time they came; the first namespace is next.
        self._waiting: OrderedDict[str, OrderedDict[Key, float]] = OrderedDict()
        self._length = 0
        self._unhurried: OrderedDict[Key, None] = OrderedDict()
        self._turns = 0
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._delayed: list[tuple[float, Key]] = []
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()
        self._taken = clock()

    def __len__(self) -> int:
        return self._length

    def add(self, key: Key) -> None:
        """Let the key be worked on as soon as possible."""
        self._due.pop(key, None)
        self._unhurried.pop(key, None)
        if key in self._working:
            self._again.add(key)
            return
        keys = self._waiting.setdefault(key.namespace, OrderedDict())
        if key in keys:
            return
        keys[key] = self._clock()
        self._length += 1
        metrics.queue_adds.labels(metrics.CONTROLLER).inc()
        metrics.queue_depth.labels(metrics.CONTROLLER).set(len(self))
        self._changed.set()

    def add_unhurried(self, key: Key) -> None:
        """Let the key be worked on when nothing else waits, or at every so many turns."""
        if key in self._working:
            # it may have read the cache before this news came
            self._again.add(key)
        elif key not in self._waiting.get(key.namespace, ()):
            self._unhurried[key] = None
            self._changed.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """Let the key be worked on after so long, or at its earlier appointment."""
        due = self._clock() + max(0.0, seconds)
        if self._due.get(key, float("inf")) <= due:
            return
        # An entry of the heap counts only while it agrees with _due.
        self._due[key] = due
        heapq.heappush(self._delayed, (due, key))
        self._changed.set()

    def retry(self, key: Key, *, at_least: float = 0.0, at_most: float = float("inf")) -> float:
        """Let a failed key come again, later with every failure.

        Args:
            key: what failed.
            at_least: shortest wait in seconds; wins over `at_most`.
            at_most: longest wait in seconds, where the queue's own is longer.

        Returns:
            The wait in seconds.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # 2**30 seconds are beyond any maximum; more doublings would overflow at last.
        longest = min(at_most, self._backoff_max, self._backoff_initial * 2.0 ** min(failures, 30))
        # Half of the wait is chance, so that keys that failed together do not come together.
        wait = max(at_least, longest * (0.5 + 0.5 * self._chance()))
        metrics.queue_retries.labels(metrics.CONTROLLER).inc()
        self.add_after(key, wait)
        return wait

    def forget(self, key: Key) -> None:
        """Forget a key's failures: it went well, or it is gone."""
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """The next key; `done` must follow."""
        while True:
            self._move_due()
            if self._waiting or self._unhurried:
                return self._take()
            self._changed.clear()
            await self._wait()

    def done(self, key: Key) -> None:
        """The work on a key ended, well or not."""
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def oldest_seconds(self) -> float:
        """How long the key that waits longest is due."""
        times = [time for keys in self._waiting.values() for time in keys.values()]
        return self._clock() - min(times) if times else 0.0

    def stalled_seconds(self) -> float:
        """For how long keys are due and none is taken; a long queue that moves is none."""
        return min(self.oldest_seconds(), self._clock() - self._taken)

    def _move_due(self) -> None:
        while self._delayed and self._delayed[0][0] <= self._clock():
            due, key = heapq.heappop(self._delayed)
            if self._due.get(key) == due:
                self.add(key)

    def _take(self) -> Key:
        self._turns += 1
        self._taken = self._clock()
        if self._unhurried and (not self._waiting or self._turns % UNHURRIED_TURNS == 0):
            unhurried, _ = self._unhurried.popitem(last=False)
            self._working.add(unhurried)
            return unhurried
        namespace, keys = self._waiting.popitem(last=False)
        key, since = keys.popitem(last=False)
        if keys:
            self._waiting[namespace] = keys
        self._length -= 1
        self._working.add(key)
        metrics.queue_depth.labels(metrics.CONTROLLER).set(len(self))
        metrics.queue_seconds.labels(metrics.CONTROLLER).observe(self._clock() - since)
        return key

    async def _wait(self) -> None:
        """Until something is added or a delayed key is due."""
        if not self._delayed:
            await self._changed.wait()
            return
        seconds = max(0.0, self._delayed[0][0] - self._clock())
        # not wait_for: when the wait is cancelled just as it ends, that forgets the cancellation
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
