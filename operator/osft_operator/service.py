"""The operator as a whole: starts its parts in order, runs the workers, ends in order.

Called by __main__ and by tests. Order matters: probes first, then the Lease, then the first list,
then the workers, so that nothing is decided by a replica that may not, or that does not know yet
what is there. Any part that ends ends all: the kubelet starts the process anew. Must never look
into a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from osft_operator import isolation, logs, metrics, probes
from osft_operator.cache import Cache
from osft_operator.cluster import Cluster, ClusterError, Conflict, Unavailable
from osft_operator.events import Backlog
from osft_operator.informer import Informer
from osft_operator.job_metrics import Survey
from osft_operator.kinds import OSFTJOBS, Object
from osft_operator.leader import Leader, LeaseLost
from osft_operator.polling import Poller
from osft_operator.queue import Key, WorkQueue
from osft_operator.reconcile import Reconciler
from osft_operator.settings import Settings

logger = logging.getLogger(__name__)

FINISH_SECONDS = 10.0
"""Passes under way get so long to end before the process does."""
AWAY_SECONDS = 15.0
"""Longest wait between tries while the API server does not answer, or refuses: soon after that is
over, all jobs have been looked at."""
SAY_SECONDS = 3.0
"""Events that wait get so long to be written before the process ends."""
ROUNDS = 4
"""So many passes over one OSFTJob at most before it is another's turn."""
COUNT_SECONDS = 15.0
"""How often the gauges of all jobs are set."""


class Service:
    """One replica."""

    def __init__(self, settings: Settings, cluster: Cluster) -> None:
        self._settings = settings
        self._cluster = cluster
        self._cache = Cache()
        self._health = probes.Health(settings)
        self._leader = Leader(cluster, settings)
        self._queue = WorkQueue(
            backoff_initial_seconds=settings.backoff_initial_seconds,
            backoff_max_seconds=settings.backoff_max_seconds,
        )
        self._informer = Informer(
            settings,
            cluster,
            self._cache,
            news=self._queue.add,
            old=self._queue.add_unhurried,
            resynced=self._health.resynced,
            listed=self._health.listed,
        )
        self._health.remarks = lambda: self._informer.places.remarks
        self._tasks: set[asyncio.Task[Any]] = set()
        self._passes: set[asyncio.Task[None]] = set()
        self._started: dict[Key, float] = {}
        self._reconciler: Reconciler
        self._events: Backlog
        self.ports: dict[str, int] = {}
        """Where probes and metrics are served, once they are."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set.

        Raises:
            LeaseLost: when another replica may be the leader.
            WatchEnded: when a watch died.
        """
        self._events = Backlog(self._cluster, self._settings.instance_name)
        async with self._servers(), self._lease(stop), self._poller() as poller:
            self._reconciler = Reconciler(
                self._settings,
                self._cluster,
                self._cache,
                poller,
                self._events,
                serves=self._informer.serves,
                covers=self._informer.places.serves,
            )
            await self._until(stop, self._informer.sync())
            if stop.is_set():
                return
            self._health.ready = True
            parts = [self._informer.run(), poller.run(), self._count(), self._events.run()]
            parts += [self._work() for _ in range(self._settings.workers)]
            for part in parts:
                self._start(part)
            try:
                await self._until(stop, asyncio.Event().wait())
            finally:
                await self._finish()

    @contextlib.asynccontextmanager
    async def _servers(self) -> AsyncIterator[None]:
        address = probes.usable(self._settings.bind_address)
        closing: list[Callable[[], None]] = []
        try:
            port, close = probes.serve(self._health, address, self._settings.probe_port)
            closing.append(close)
            self.ports["probes"] = port
            port, close = metrics.serve(address, self._settings.metrics_port)
            closing.append(close)
            self.ports["metrics"] = port
            self._measure_passes()
            logger.info("Serving", extra={"ports": dict(self.ports)})
            self._start(
                self._health.keep_beating(
                    self._queue.stalled_seconds, self._informer.behind_seconds
                )
            )
            yield
        finally:
            await self._cancel(self._tasks)
            for close in closing:
                close()

    @contextlib.asynccontextmanager
    async def _lease(self, stop: asyncio.Event) -> AsyncIterator[None]:
        """Hold the Lease; without an election, hold nothing."""
        if not self._settings.leader_election:
            metrics.leader.labels(self._settings.lease_name).set(1)
            yield
            return
        await self._until(stop, self._leader.acquire(self._stand_by))
        self._health.ready = False
        self._cluster.before_write = self._leader.check
        try:
            if not stop.is_set():
                self._start(self._leader.keep())
            yield
        finally:
            await self._cancel(self._tasks)
            await self._leader.release()

    def _stand_by(self) -> None:
        """A standby is ready: it is there for the case that the leader is not."""
        self._health.ready = True

    def _poller(self) -> Poller:
        def news(key: Key, milestone: bool) -> None:
            self._queue.add_after(key, self._reconciler.progressed(key, milestone))

        return Poller(self._settings, news)

    def _start(self, part: Coroutine[Any, Any, Any]) -> None:
        self._tasks.add(asyncio.create_task(part))

    async def _until(self, stop: asyncio.Event, part: Coroutine[Any, Any, Any]) -> None:
        """Wait for `part` or `stop`; a started part that ends before is an error, and raised."""
        waiting = asyncio.create_task(part)
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait(
                {waiting, stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
            assert done & {waiting, stopping}, "a part ended without an error"
        finally:
            await self._cancel({waiting, stopping})

    async def _finish(self) -> None:
        """Take no more keys, let the passes under way end, and say what is still to be said."""
        await self._cancel(self._tasks)
        if self._passes:
            await asyncio.wait(self._passes, timeout=FINISH_SECONDS)
        await self._cancel(self._passes)
        with contextlib.suppress(LeaseLost, TimeoutError):
            async with asyncio.timeout(SAY_SECONDS):
                await self._events.drain()

    async def _cancel(self, tasks: set[asyncio.Task[Any]]) -> None:
        ending = set(tasks)
        for task in ending:
            task.cancel()
        # Gathered, so that an error of a part that ends anyway is not reported as unheard.
        await asyncio.gather(*ending, return_exceptions=True)
        tasks -= ending

    async def _work(self) -> None:
        """Take keys, one after the other; the pass itself outlives a cancelled worker."""
        while True:
            key = await self._queue.get()
            task = asyncio.create_task(self._pass(key))
            self._passes.add(task)
            task.add_done_callback(self._passes.discard)
            await asyncio.shield(task)

    async def _pass(self, key: Key) -> None:
        with logs.about(osftjob=str(key), reconcile_id=f"{random.getrandbits(48):012x}"):
            self._started[key] = time.monotonic()
            result = "success"
            try:
                requeue = await self._rounds(key)
            except LeaseLost:
                raise
            except Exception as error:
                result = "error"
                self._failed(key, error)
            else:
                self._queue.forget(key)
                if requeue is not None:
                    result = "requeue_after"
                    self._queue.add_after(key, requeue)
            finally:
                seconds = time.monotonic() - self._started.pop(key)
                self._queue.done(key)
            metrics.reconciles.labels(metrics.CONTROLLER, result).inc()
            metrics.reconcile_seconds.labels(metrics.CONTROLLER).observe(seconds)
            metrics.work_seconds.labels(metrics.CONTROLLER).observe(seconds)

    async def _rounds(self, key: Key) -> float | None:
        """Passes while one calls for the next at once: a job that has begun waits in no queue."""
        for _ in range(ROUNDS):
            requeue = await self._reconciler.reconcile(key)
            if requeue != 0:
                break
        return requeue

    def _under_way(self) -> list[float]:
        """For how long each pass under way has run; also called by scrapes, on their thread."""
        now = time.monotonic()
        return [now - started for started in list(self._started.values())]

    def _measure_passes(self) -> None:
        longest = metrics.longest_work.labels(metrics.CONTROLLER)
        longest.set_function(lambda: max(self._under_way(), default=0.0))
        together = metrics.unfinished_work.labels(metrics.CONTROLLER)
        together.set_function(lambda: sum(self._under_way()))

    def _failed(self, key: Key, error: Exception) -> None:
        """Try again later. A bug that one job brings out must not stop the others."""
        metrics.reconcile_errors.labels(metrics.CONTROLLER).inc()
        at_least, at_most = 0.0, float("inf")
        if isinstance(error, ClusterError):
            # no watch tells when it is over, also when a right comes back
            at_most = AWAY_SECONDS
        if isinstance(error, Unavailable):
            at_least = error.retry_after or 0.0
        wait = self._queue.retry(key, at_least=at_least, at_most=at_most)
        about = {"wait_seconds": round(wait, 1)}
        if isinstance(error, Conflict):
            logger.debug("Changed meanwhile, again soon: %s", error, extra=about)
        elif isinstance(error, ClusterError):
            logger.warning("Trying again later: %s", error, extra=about)
        else:
            isolation.count("decision")
            logger.error("A bug; trying again later", exc_info=error, extra=about)

    def _known_jobs(self) -> Iterator[Object]:
        """Every OSFTJob that can still be seen."""
        serves = self._informer.places.serves
        for job in self._cache.all(OSFTJOBS):
            if serves(job["metadata"]["namespace"]):
                yield job

    async def _count(self) -> None:
        survey = Survey(per_job=self._settings.metrics_per_job)
        metrics.registry.register(survey)
        try:
            while True:
                with isolation.set_aside("survey", "the survey"):
                    survey.take(self._known_jobs(), datetime.datetime.now(datetime.UTC))
                metrics.queue_oldest.set(self._queue.oldest_seconds())
                await asyncio.sleep(COUNT_SECONDS)
        finally:
            metrics.registry.unregister(survey)
