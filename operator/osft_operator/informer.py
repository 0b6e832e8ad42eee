"""Keeps the cache like the cluster: one first list, watches, and a list again from time to time.

Called by service. `sync` must have ended before anything is decided, or a child that is there would
be missed; what can not be read then, or later, is left out (places) and tried again, and the rest
is served. A kind that comes or goes (the PyTorchJob's definition) is noticed here, and the watches
start anew with the kinds that exist. A watch that dies otherwise ends the process: better restarted
than blind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED, Cache, job_of
from osft_operator.cluster import Cluster, ClusterError, Gone, KindMissing, Unavailable
from osft_operator.endings import is_finished
from osft_operator.freshness import Freshness
from osft_operator.handlers import Watches
from osft_operator.isolation import set_aside
from osft_operator.kinds import OSFTJOBS, Kind, Object
from osft_operator.places import Place, Places
from osft_operator.queue import Key
from osft_operator.resync import Resync
from osft_operator.settings import WATCH_LOOKS, Settings

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0
"""Longest wait between tries of a list."""
SYNC_TRIES = 3
"""So often the first list is tried before what cannot be read is left out: an API server that
starts refuses for a moment what it grants."""
TICK_SECONDS = 1.0
"""How often it is looked how far the watches are behind."""
SHORTEST_PATIENCE_SECONDS = 5.0
"""What happened during a check is told by the watches after less than that."""


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
        resynced: Callable[[bool], None],
        listed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare it.

        Args:
            settings: where to look, and how often.
            cluster: the API server.
            cache: takes what is found.
            news: called with each OSFTJob to look at.
            old: the same for those without hurry.
            resynced: called when everything was listed, with whether all that is served was read.
            listed: called with each list that was read to its end.
            clock: seconds.
        """
        self._settings = settings
        self._cache = cache
        self._news = news
        self._old = old or news
        self._resynced = resynced
        self._told_of_list = listed
        self._clock = clock
        self.places = Places(settings.namespaces)
        """What is served of where it should look."""
        self._resync = Resync(cluster, cache, self.places, listed=self._listed, clock=clock)
        self._freshness = Freshness(cluster, cache, news, clock=clock)
        self._unused: set[Place] = set()

    def serves(self, kind: Kind) -> bool:
        """Whether the API server had this kind when last asked."""
        return kind in self._resync.present

    def behind_seconds(self) -> float:
        """For how long the watches have owed what the API server told otherwise."""
        return self._freshness.behind_seconds()

    async def sync(self) -> None:
        """List everything, and try until there is something to work on.

        Every OSFTJob is news then. What could not be read by then is left out.
        """
        wait, tries = 1.0, 1
        while True:
            await self._list()
            enough = self.places.is_any_served if tries >= SYNC_TRIES else self.places.are_served
            if enough:
                return
            await asyncio.sleep(wait)
            wait, tries = min(2 * wait, MAX_WAIT_SECONDS), tries + 1

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
        parts = (self._until_other_kinds(kinds), self._until_silent(), self._check_on(watched))
        tasks = [asyncio.create_task(part) for part in (watches.ended(), *parts)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            died = tasks[0].done()
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

    async def _until_silent(self) -> None:
        """Wait until the watches have owed something for too long since they were opened."""
        patience = max(SHORTEST_PATIENCE_SECONDS, WATCH_LOOKS * self._settings.watch_check_seconds)
        opened = self._clock()
        while min(self._freshness.behind_seconds(), self._clock() - opened) < patience:
            await asyncio.sleep(TICK_SECONDS)
        logger.warning("The watches are silent; they start anew")

    async def _check_on(self, kinds: Iterable[Kind]) -> None:
        """Check the watches from time to time, and try again what could not be read."""
        while True:
            await asyncio.sleep(self._settings.watch_check_seconds)
            errors = await self._freshness.check(self.places.all(kinds))
            refused = {place for place, error in errors.items() if _is_refusal(error)}
            again = {*self.places.failing, *errors} - refused
            for place in refused:
                self.places.failed(place, errors[place])
                self._freshness.forgive(place)
            if again:
                await self._list(list(again))
            for place in again & errors.keys():
                # A server that answers lists and no watches is none that tells us anything.
                if not isinstance(errors[place], Gone) and not self.places.has_failed(place):
                    self._freshness.mute(place)
            self._settle()
            self._resync.settle()

    async def _is_outdated(self) -> bool:
        try:
            return await self._resync.is_outdated()
        except ClusterError as error:
            logger.warning("The kinds could not be looked up: %s", error)
            return False

    async def _list(self, only: Sequence[Place] | None = None) -> bool:
        """List everything once, or some places; False when nobody answered."""
        try:
            changed = await self._resync.run(only)
        except ClusterError as error:
            logger.warning("The lists could not be read: %s", error)
            return False
        finally:
            self._settle()
        # After a list of all, every job is looked at again, changed or not: whatever was missed is
        # found here. Only what is over and as it was stays so.
        for key in self._cache.jobs():
            if key in changed or (only is None and not self._is_finished(key)):
                self._tell(key)
        if only is None:
            self._resynced(self.places.are_fresh)
        return True

    def _settle(self) -> None:
        """Look at all jobs of a namespace that was left out and is served again."""
        back = self.places.settle()
        for key in self._cache.jobs() if back else ():
            if back & {None, key.namespace}:
                self._tell(key)

    def _tell(self, key: Key) -> None:
        """Let a job be looked at; what is over, as most are when this process starts, can wait."""
        (self._old if self._is_finished(key) else self._news)(key)

    def _is_finished(self, key: Key) -> bool:
        job = self._cache.get(OSFTJOBS, *key) or {}
        with set_aside("list", key):
            return is_finished(job.get("status") or {})
        return False

    def _listed(self, place: Place, version: str) -> None:
        """A list was read to its end."""
        self._freshness.listed(place, version)
        self._unused.add(place)
        self._told_of_list()

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
            except ClusterError:
                self._settle()
                await asyncio.sleep(wait)
                wait = min(2 * wait, MAX_WAIT_SECONDS)
                continue
            self._settle()
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
        with set_aside("watch", f"{kind.kind} {body['metadata'].get('name')}"):
            change = self._cache.remove if event == "DELETED" else self._cache.put
            key = change(kind, body)
            if (job := job_of(kind, body)) is not None:
                self._resync.told(kind, job)
            if key is not None:
                self._news(key)
        metrics.watch_timestamp.labels(kind.plural).set_to_current_time()


def _is_refusal(error: ClusterError) -> bool:
    """Whether a place was refused: no outage, and no kind that does not exist."""
    return not isinstance(error, Unavailable | KindMissing)
