"""A reconciler on a real API server whose passes the test begins, one by one.

Called by the tests of reconcile and of crashes. No watches: its cache is filled by lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from osft_operator.actions import PollTarget
from osft_operator.cache import Cache
from osft_operator.cluster import Cluster
from osft_operator.events import Recorder
from osft_operator.kinds import EVENTS, OSFTJOBS, Kind
from osft_operator.places import Places
from osft_operator.polling import Heard
from osft_operator.queue import Key
from osft_operator.reconcile import Reconciler
from osft_operator.resync import Resync
from osft_operator.settings import Settings
from osft_trainer.report import Progress


class Told:
    """What pods have told; the real poller is tested over HTTP in test_polling."""

    def __init__(self) -> None:
        self.answer: Progress | None = None

    def heard(self, _: Key) -> Heard:
        return Heard(self.answer, "pod" if self.answer else None, None, 60.0)

    def crowd(self, _: str) -> int:
        return 1

    def watch(self, key: Key, targets: Sequence[PollTarget]) -> None:
        pass


class Scene:
    """A reconciler whose cache is filled by lists, pass by pass."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.cache = Cache()
        self.told = Told()
        self.now = 1000.0
        self.waits: float | None = None
        self._resync = Resync(cluster, self.cache, Places([namespace]))
        self.reconciler = Reconciler(
            Settings(progress_write_seconds=30),
            cluster,
            self.cache,
            self.told,  # type: ignore[arg-type]
            Recorder(cluster, "test"),
            serves=lambda kind: kind in self._resync.present,
            clock=lambda: self.now,
        )

    async def one_pass(self, name: str = "run") -> float | None:
        """List, then one pass."""
        await self._resync.run()
        return await self.reconciler.reconcile(Key(self.namespace, name))

    async def settle(self, name: str = "run") -> None:
        """Passes until nothing is due at once."""
        for _ in range(10):
            if await self.one_pass(name) != 0:
                return
        raise AssertionError("passes without end")

    async def job(self, name: str = "run") -> dict[str, Any]:
        return await self.cluster.get(OSFTJOBS, self.namespace, name)

    async def names(self, kind: Kind) -> list[str]:
        listing = await self.cluster.list_all(kind, self.namespace)
        return [item["metadata"]["name"] for item in listing.items]

    async def said(self) -> dict[str, int]:
        """Events by reason, with their counts."""
        listing = await self.cluster.list_all(EVENTS, self.namespace)
        return {item["reason"]: item["count"] for item in listing.items}

    async def condition(self, kind: str) -> dict[str, Any]:
        conditions = (await self.job())["status"]["conditions"]
        found: dict[str, Any] = next(each for each in conditions if each["type"] == kind)
        return found
