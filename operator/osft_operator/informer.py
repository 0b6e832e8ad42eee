"""Keeps the cache like the cluster: one first list, watches, and a list again from time to time.

Called by service. `sync` must have ended before anything is decided, or a child that is there would
be missed. A kind that comes or goes (the PyTorchJob's definition) is noticed here, and the watches
start anew with the kinds that exist. A watch that dies otherwise ends the process: better restarted
than blind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED, Cache, job_of
from osft_operator.cluster import Cluster, ClusterError, Gone, KindMissing
from osft_operator.endings import is_finished
from osft_operator.freshness import Freshness
from osft_operator.handlers import Watches
from osft_operator.kinds import OSFTJOBS, Kind, Object
from osft_operator.queue import Key
from osft_operator.resync import Place, Resync
from osft_operator.settings import WATCH_LOOKS, Settings

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0
"""Longest wait between tries of the first list."""
IN_FLIGHT_SECONDS = 2.0
"""What happened during a check is told by the watches after so long."""


class WatchEnded(Exception):
    """The operator no longer hears what happens."""


class Informer:
    """The cache's sources."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        cache: Cache,
        *,
        news: Callable[[Key], None],
        old: Callable[[Key], None] | None = None,
        resynced: Callable[[], None],
        behind: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._news = news
        self._old = old or news
        self._resynced = resynced
        self._behind = behind
        self._resync = Resync(cluster, cache, settings.namespaces)
        self._freshness = Freshness(cluster, cache, news)
        self._unused: set[Place] = set()

    def serves(self, kind: Kind) -> bool:
        """Whether the API server had this kind when last asked."""
        return kind in self._resync.present

    async def sync(self) -> None:
        """List everything, and try until that succeeds. Every OSFTJob is news then."""
        wait = 1.0
        while not await self._list():
            await asyncio.sleep(wait)
            wait = min(2 * wait, MAX_WAIT_SECONDS)

    async def run(self) -> None:
        """Watch and list until cancelled.

        Raises:
            WatchEnded: when a watch died.
            Exception: when what looks after them did, which is a bug.
        """
        while True:
            await self._watch(frozenset(filter(self.serves, WATCHED)))

    async def _watch(self, kinds: frozenset[Kind]) -> None:
        """Watch these kinds until others exist."""
        for kind in WATCHED:
            if kind not in kinds:
                logger.warning("The kind %s is not installed; looking for it", kind.kind)
        watched = [kind for kind in WATCHED if kind in kinds]
        watches = Watches(self._settings, watched, self._seen, self._begin)
        watches.start()
        ended = asyncio.create_task(watches.ended())
        others = asyncio.create_task(self._until_other_kinds(kinds))
        silent = asyncio.create_task(self._until_silent(kinds))
        tasks = (ended, others, silent)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            died = ended.done()
        finally:
            await watches.stop()
            for task in tasks:
                task.cancel()
            error, *failures = await asyncio.gather(*tasks, return_exceptions=True)
        for failure in failures:
            # Not one of the errors that are expected of the API server, so a bug: not to be hidden.
            if isinstance(failure, Exception):
                raise failure
        if not died:
            return
        # A kind whose definition was deleted ends its watch, and that alone is no reason to die.
        if not await self._list() or kinds == frozenset(filter(self.serves, WATCHED)):
            raise WatchEnded(f"a watch ended: {error!r}")

    async def _until_other_kinds(self, kinds: frozenset[Kind]) -> None:
        """List from time to time, until other kinds exist."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._settings.resync_seconds
        while kinds == frozenset(filter(self.serves, WATCHED)):
            # Not left to the watches: kopf does without a kind that it did not find at its start.
            pause = min(due - loop.time(), self._settings.kind_check_seconds)
            await asyncio.sleep(max(0.0, pause))
            if loop.time() >= due or await self._is_outdated():
                await self._list()
                due = loop.time() + self._settings.resync_seconds

    async def _until_silent(self, kinds: frozenset[Kind]) -> None:
        """Check the watches from time to time, until they owe something for too long."""
        namespaces: Sequence[str | None] = self._settings.namespaces or [None]
        places = [(kind, namespace) for kind in kinds for namespace in namespaces]
        behind = 0
        while behind < WATCH_LOOKS:
            await asyncio.sleep(self._settings.watch_check_seconds)
            is_behind = await self._is_behind(places)
            behind = behind + 1 if is_behind else 0
            self._behind(is_behind)
            self._resync.settle()
        logger.warning("The watches are silent; they start anew")

    async def _is_behind(self, places: Sequence[Place]) -> bool:
        """Whether the watches have not told what there is to tell."""
        try:
            await self._freshness.check(places)
        except Gone:
            await self._list()
        except ClusterError as error:
            logger.warning("The watches could not be checked: %s", error)
            # a server that answers lists and no watches is none that tells us anything
            return await self._list()
        await asyncio.sleep(IN_FLIGHT_SECONDS)
        return self._freshness.is_behind

    async def _is_outdated(self) -> bool:
        try:
            return await self._resync.is_outdated()
        except ClusterError as error:
            logger.warning("The kinds could not be looked up: %s", error)
            return False

    async def _list(self) -> bool:
        """List everything once; False when that failed."""
        try:
            changed = await self._resync.run()
        except ClusterError as error:
            logger.warning("The lists could not be read: %s", error)
            return False
        for place, version in self._resync.versions.items():
            self._freshness.listed(place, version)
            self._unused.add(place)
        # Every job is looked at again, changed or not: whatever was missed is found here. Only what
        # is over and as it was stays so; and what is over when this process starts has no hurry.
        for key in self._cache.jobs():
            job = self._cache.get(OSFTJOBS, *key) or {}
            if not is_finished(job.get("status") or {}):
                self._news(key)
            elif key in changed:
                self._old(key)
        self._resynced()
        return True

    async def _begin(self, kind: Kind, namespace: str | None) -> str:
        """From which version a watch goes on: that of the last list, or of one made now.

        Raises:
            KindMissing: when there is no such kind.
        """
        place = (kind, namespace)
        wait = 1.0
        while place not in self._unused:
            try:
                changed = await self._resync.take(kind, namespace)
            except KindMissing:
                raise
            except ClusterError as error:
                logger.warning("The list of %s could not be read: %s", kind.plural, error)
                await asyncio.sleep(wait)
                wait = min(2 * wait, MAX_WAIT_SECONDS)
                continue
            self._freshness.listed(place, self._resync.versions[place])
            self._unused.add(place)
            for key in changed:
                self._news(key)
        # If the server can not go on from it, it asks again and there is a list.
        self._unused.discard(place)
        self._freshness.begun(place, self._resync.versions[place])
        return self._resync.versions[place]

    def _seen(self, kind: Kind, event: str | None, body: Object) -> None:
        metrics.watch_events.labels(kind.plural).inc()
        namespace = body["metadata"]["namespace"] if self._settings.namespaces else None
        self._freshness.told((kind, namespace), body)
        change = self._cache.remove if event == "DELETED" else self._cache.put
        key = change(kind, body)
        if (job := job_of(kind, body)) is not None:
            self._resync.told(kind, job)
        if key is not None:
            self._news(key)
        metrics.watch_timestamp.labels(kind.plural).set_to_current_time()
