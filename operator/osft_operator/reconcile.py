"""One pass over one OSFTJob: observe, decide, act, write the status once, then say it in events.

Called by service's workers with a key. What there is to see comes from the cache, what to do from
`decide`, which is pure; this module only carries it out, so that a crash between any two steps
leaves something the next pass understands. Errors go back to the worker, which tries again later;
a refusal of the API server becomes a condition. Must never judge a job itself.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
from collections.abc import Callable
from typing import Any

from osft_operator import internal_error, isolation, job_metrics, metrics, transitions
from osft_operator.actions import (
    Action,
    CreateClaim,
    CreatePyTorchJob,
    Decision,
    DeleteOSFTJob,
    DeletePyTorchJob,
    Event,
    SuspendPyTorchJob,
)
from osft_operator.budget import Budget
from osft_operator.cache import Cache
from osft_operator.cluster import (
    AlreadyExists,
    Cluster,
    ClusterError,
    Forbidden,
    KindMissing,
    NotFound,
    Refused,
)
from osft_operator.decide import decide, refused
from osft_operator.events import Recorder
from osft_operator.failed_calls import TRIES, not_done, not_read
from osft_operator.kinds import CLAIMS, OSFTJOBS, PYTORCHJOBS, Kind, Object
from osft_operator.leader import LeaseLost
from osft_operator.merge_patch import merge_patch
from osft_operator.observer import Observer
from osft_operator.older_definition import OlderDefinition
from osft_operator.polling import Poller
from osft_operator.queue import Key
from osft_operator.settings import Settings
from osft_operator.status import STARTING

logger = logging.getLogger(__name__)

WRITES_PER_SECOND = 20.0
"""Status writes of all jobs together that tell nothing but how far a run is."""
QUIET = ("progress", "countedPods", "pyTorchJobUID", "waitingFor")
"""Parts of the status that can wait; a condition's words can, too, and how far a start is. A job
whose pods soon run is so written three times: as it begins, runs and ends."""
KEPT = (CreateClaim, CreatePyTorchJob, SuspendPyTorchJob)
"""Actions whose result is put in the cache at once."""
LOOK_AGAIN_SECONDS = 1.0
"""Wait after a name was found taken."""


class Reconciler:
    """Carries out decisions."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        cache: Cache,
        poller: Poller,
        recorder: Recorder,
        *,
        serves: Callable[[Kind], bool],
        covers: Callable[[str], bool] = lambda _: True,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write_seconds = settings.progress_write_seconds
        self._cluster = cluster
        self._cache = cache
        self._poller = poller
        self._recorder = recorder
        self._observer = Observer(settings, cluster, cache, poller, serves)
        self._older = OlderDefinition(clock=clock)
        self._covers = covers
        self._now = now
        self._clock = clock
        self._written: dict[Key, float] = {}
        self._milestones: set[Key] = set()
        self._made: dict[Key, tuple[str, str]] = {}
        self._failures: dict[Key, int] = {}
        self._budget = Budget(WRITES_PER_SECOND, clock)

    def progressed(self, key: Key, milestone: bool) -> float:
        """A pod told something new.

        Returns:
            After how many seconds a pass is due.
        """
        if milestone:
            self._milestones.add(key)
            return 0.0
        return self._until_write(key)

    async def reconcile(self, key: Key) -> float | None:
        """One pass.

        Returns:
            After how many seconds the next pass is due; None when only news makes one necessary.

        Raises:
            ClusterError: when the API server could not be reached or changed meanwhile.
            Exception: a bug that this job brings out; its author has been told.
        """
        try:
            return await self._pass(key)
        except (ClusterError, LeaseLost):
            raise
        except Exception as error:
            await self._tell_of_bug(key, error)
            raise

    async def _tell_of_bug(self, key: Key, error: Exception) -> None:
        """Say in the status what keeps the job from being judged; nothing else is done for it."""
        job = self._cache.get(OSFTJOBS, *key)
        if job is None:
            return
        try:
            await self._write(key, job, internal_error.verdict(job, error, self._now()))
        except LeaseLost:
            raise
        except Exception as unsaid:
            # the bug itself is raised, and both are tried again
            text = "The author could not be told of a bug: %s"
            logger.warning(text, internal_error.words(unsaid), extra={"osftjob": str(key)})

    async def _pass(self, key: Key) -> float | None:
        if not self._covers(key.namespace):
            # Of a job that cannot be seen whole nothing is decided; its namespace's return is news.
            self._forget(key)
            return None
        job = self._cache.get(OSFTJOBS, *key)
        if job is None or job["metadata"].get("deletionTimestamp"):
            # What was made for it goes by its ownerReferences.
            self._forget(key)
            return None
        decision, failure = await self._carry_out(key, job)
        if decision is None:
            return LOOK_AGAIN_SECONDS
        if any(isinstance(action, DeleteOSFTJob) for action in decision.actions):
            self._forget(key)
            return None
        try:
            wait = await self._write(key, job, decision)
        except KindMissing:
            raise
        except NotFound:
            # deleted meanwhile; the watches tell so
            self._forget(key)
            return None
        self._poller.watch(key, decision.poll)
        if failure is not None:
            raise failure
        # What our own writes put in the cache is no news to the watches any more.
        again = 0.0 if any(isinstance(action, KEPT) for action in decision.actions) else None
        waits = (decision.requeue_after, wait, again)
        return min((seconds for seconds in waits if seconds is not None), default=None)

    async def _carry_out(
        self, key: Key, job: Object
    ) -> tuple[Decision | None, ClusterError | None]:
        """Observe, decide and act.

        Returns:
            What the status is to say, and the error of a call that failed again; no decision when
            a name was found taken.

        Raises:
            ClusterError: when a call failed, and not often enough to tell.
        """
        now, decision, action = self._now(), None, None
        try:
            observed = await self._observer.observe(key, self._known(key, job), now)
            decision = decide(observed, now)
            for action in decision.actions:
                await self._do(key, action)
        except AlreadyExists:
            # Ours from an earlier life, or somebody else's: the next pass sees whose it is.
            assert action is not None
            await self._look(key, action)
            return None, None
        except ClusterError as error:
            if action is not None and decision is not None and isinstance(error, Refused):
                return self._refused(decision, job, action, error, now), None
            self._failures[key] = self._failures.get(key, 0) + 1
            if self._failures[key] < TRIES:
                raise
            if decision is None or action is None:
                return not_read(self._observer.alone(job), str(error), now), error
            return not_done(decision, job, action, str(error), now), error
        self._failures.pop(key, None)
        return decision, None

    def _refused(
        self,
        decision: Decision,
        job: Object,
        action: Action,
        error: Refused,
        now: datetime.datetime,
    ) -> Decision:
        """What was refused of something that is there is said where it was to be changed, too."""
        if not isinstance(action, CreateClaim | CreatePyTorchJob):
            noted = not_done(decision, job, action, str(error), now)
            decision = dataclasses.replace(decision, status=noted.status)
        return refused(decision, job, str(error), now)

    def _known(self, key: Key, job: Object) -> Object:
        """The OSFTJob with what was not worth a write of its own: which PyTorchJob was made."""
        status = job.get("status") or {}
        name, uid = self._made.get(key, ("", ""))
        if not uid or status.get("pyTorchJobName") != name or "pyTorchJobUID" in status:
            self._made.pop(key, None)
            return job
        return {**job, "status": {**status, "pyTorchJobUID": uid}}

    async def _do(self, key: Key, action: Action) -> None:
        namespace = key.namespace
        match action:
            case CreateClaim(manifest):
                made = await self._cluster.create(CLAIMS, namespace, manifest)
                self._cache.put(CLAIMS, made)
            case CreatePyTorchJob(manifest):
                made = await self._cluster.create(PYTORCHJOBS, namespace, manifest)
                self._cache.put(PYTORCHJOBS, made)
                job_metrics.created.inc()
                name = made["metadata"]["name"]
                self._made[key] = (name, made["metadata"]["uid"])
                logger.info("Created the PyTorchJob %s", name, extra={"osftjob": str(key)})
            case SuspendPyTorchJob(name, uid, suspend):
                # With the uid it cannot hit another object that took the name meanwhile.
                change = {"metadata": {"uid": uid}, "spec": {"runPolicy": {"suspend": suspend}}}
                made = await self._cluster.patch(PYTORCHJOBS, namespace, name, change)
                self._cache.put(PYTORCHJOBS, made)
            case DeletePyTorchJob(name, uid):
                await self._cluster.delete(
                    PYTORCHJOBS, namespace, name, uid=uid, propagation="Foreground"
                )
            case DeleteOSFTJob(uid):
                await self._cluster.delete(OSFTJOBS, namespace, key.name, uid=uid)

    async def _look(self, key: Key, action: Action) -> None:
        assert isinstance(action, CreateClaim | CreatePyTorchJob)
        kind = CLAIMS if isinstance(action, CreateClaim) else PYTORCHJOBS
        name = action.manifest["metadata"]["name"]
        try:
            self._cache.put(kind, await self._cluster.get(kind, key.namespace, name))
        except NotFound:
            return

    async def _write(self, key: Key, job: Object, decision: Decision) -> float | None:
        """Write the status if it differs, then the events.

        Returns:
            After how many seconds progress that was held back is due.
        """
        recorded, status = job.get("status") or {}, self._older.fit(decision.status)
        change = merge_patch(recorded, status)
        if change and not decision.events and says_little(recorded, status):
            wait = self._until_write(key) if key not in self._milestones else 0.0
            wait = wait or self._budget.take(key)
            if wait > 0:
                return wait
        if change:
            version = job["metadata"]["resourceVersion"]
            patch = {"metadata": {"resourceVersion": version}, "status": change}
            written = await self._patch_status(key, job, patch, status)
            self._cache.put(OSFTJOBS, written)
            metrics.status_writes.inc()
            self._milestones.discard(key)
            self._budget.forget(key)
            self._written[key] = self._clock()
            with isolation.set_aside("status", key):
                transitions.tell(key, recorded, status)
        for event in decision.events:
            await self._recorder.record(job, event)
        return None

    async def _patch_status(self, key: Key, job: Object, patch: Object, status: Object) -> Object:
        try:
            return await self._older.write(self._cluster, key, patch, status)
        except Forbidden:
            raise
        except Refused as error:
            # as of an object that a newer definition would not take: its author is told another way
            isolation.count("status")
            text = f"the API server does not take the job's status: {error}"
            await self._recorder.record(job, Event("Warning", internal_error.REASON, text))
            raise

    def _until_write(self, key: Key) -> float:
        last = self._written.get(key, float("-inf"))
        interval = max(self._write_seconds, self._poller.crowd(key.namespace) / WRITES_PER_SECOND)
        return max(0.0, last + interval - self._clock())

    def _forget(self, key: Key) -> None:
        self._poller.watch(key, ())
        self._made.pop(key, None)
        self._failures.pop(key, None)
        self._written.pop(key, None)
        self._milestones.discard(key)
        self._budget.forget(key)


def says_little(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two statuses differ in nothing that somebody waits for."""
    return _loud(old) == _loud(new)


def _loud(status: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in status.items() if name not in QUIET}
    kept["conditions"] = [
        {name: value for name, value in condition.items() if name != "message"}
        for condition in status.get("conditions") or []
    ]
    for said in (kept, *kept["conditions"]):
        if said.get("reason") in STARTING:
            said["reason"] = STARTING[0]
    return kept
