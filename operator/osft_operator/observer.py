"""Gathers what one pass over an OSFTJob has to know, from the cache and a few small questions.

Called by reconcile. The questions are for what no watch tells: a user's own claim, the events about
what does not start, Kueue's Workload. They are asked for a job that does not run only. Must never
change anything, nor judge what it sees.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

from osft_operator import evidence, missing_pods, run_folder
from osft_operator.cache import Cache, job_of
from osft_operator.cluster import Cluster, KindMissing, NotFound
from osft_operator.definition import Definition
from osft_operator.kinds import CLAIMS, PODS, PYTORCHJOBS, Kind, Object
from osft_operator.names import JOB_LABEL, attempt_name, claim_name
from osft_operator.observed import Observed, Said, controller, is_deleting, time_of
from osft_operator.polling import Poller
from osft_operator.queue import Key
from osft_operator.resolved import RenderSettings
from osft_operator.settings import Settings
from osft_operator.workloads import Workloads

POD_LATE_SECONDS = 30.0
"""A pod that has not started for so long is asked about: an event says why."""
PODS_ASKED = 3
"""Of so many late pods at most."""
STOPPING_SECONDS = 60.0
"""For so long after the end it is made sure that nothing of the job runs on."""


class Observer:
    """Where a pass looks."""

    def __init__(
        self,
        settings: Settings,
        cluster: Cluster,
        cache: Cache,
        poller: Poller,
        serves: Callable[[Kind], bool],
    ) -> None:
        self._render = RenderSettings.of(settings)
        self._sidecar_grace_seconds = settings.sidecar_grace_seconds
        self._cluster = cluster
        self._cache = cache
        self._poller = poller
        self._serves = serves
        self._workloads = Workloads(cluster, wanted=settings.kueue)
        self._definition = Definition(cluster)

    def alone(self, job: Object) -> Observed:
        """One job of which nothing else is known."""
        return Observed(body=job, settings=self._render)

    async def observe(self, key: Key, job: Object, now: datetime.datetime) -> Observed:
        """One job with everything that belongs to it, or is in its way.

        Raises:
            ClusterError: when what no watch tells of could not be read.
        """
        job = await self._definition.understood(job)
        pytorch_jobs = await self._pytorch_jobs(key, job)
        pods = self._cache.children(PODS, key)
        pytorch_jobs += await self._unseen(key, job, pytorch_jobs, now)
        pods += await self._unseen_pods(key, job, pytorch_jobs, pods)
        late = [pod for pod in pods if _is_late(pod, now)]
        wanted = bool(late) or not _has_own(job, pytorch_jobs)
        claim = await self._claim(key, job, wanted=wanted)
        heard = self._poller.heard(key)
        return Observed(
            body=job,
            settings=self._render,
            pytorch_jobs=tuple(pytorch_jobs),
            pods=tuple(pods),
            neighbours=tuple(self._neighbours(key, job, pytorch_jobs)),
            failed_and_gone=tuple(self._cache.failed_and_gone(key)),
            claim=claim,
            progress=heard.progress,
            progress_pod=heard.pod,
            progress_since=heard.since,
            listening_seconds=heard.listening_seconds,
            pytorch_job_kind_present=self._serves(PYTORCHJOBS),
            refusal=await self._refusal(key, job, pytorch_jobs, pods, now),
            news=await self._news(key, late, claim) if late and not _is_over(job) else {},
            sidecar_grace_seconds=self._sidecar_grace_seconds,
            workload=await self._workloads.of(job, pytorch_jobs),
        )

    def _neighbours(self, key: Key, job: Object, pytorch_jobs: Sequence[Object]) -> list[Object]:
        """Who writes to the folder of a job whose next attempt is not there yet."""
        name = (job.get("status") or {}).get("pyTorchJobName")
        is_there = any(body["metadata"]["name"] == name for body in pytorch_jobs)
        if is_there or _is_over(job):
            return []
        found = self._cache.writers(key.namespace, run_folder.of_job(job))
        return [
            pod for pod in found if (pod["metadata"].get("labels") or {}).get(JOB_LABEL) != key.name
        ]

    async def _refusal(
        self,
        key: Key,
        job: Object,
        pytorch_jobs: Sequence[Object],
        pods: Sequence[Object],
        now: datetime.datetime,
    ) -> Said | None:
        """Why pods of the current attempt are not made, once they have been missing for long."""
        status = job.get("status") or {}
        name = status.get("pyTorchJobName")
        current = next((each for each in pytorch_jobs if each["metadata"]["name"] == name), None)
        if current is None or _is_over(job):
            return None
        uid = current["metadata"]["uid"]
        here = [pod for pod in pods if controller(pod).get("uid") == uid]
        since = missing_pods.since(status, current)
        if since is None or not missing_pods.count(current, here):
            return None
        began = time_of(since)
        if (now - began).total_seconds() < missing_pods.PODS_MISSING_SECONDS:
            return None
        return evidence.refusal(await evidence.about(self._cluster, key.namespace, uid), began)

    async def _news(
        self, key: Key, late: Sequence[Object], claim: Object | None
    ) -> dict[str, Said]:
        """What events say about pods that do not start, and about a claim that waits."""
        # of a pod without a node the scheduler has written into its status why
        alive = [pod for pod in late if not is_deleting(pod)]
        asked = sorted(alive, key=lambda pod: not (pod.get("spec") or {}).get("nodeName"))
        asked = asked[:PODS_ASKED]
        if claim is not None and (claim.get("status") or {}).get("phase") == "Pending":
            asked.append(claim)
        uids = [body["metadata"]["uid"] for body in asked]
        said = [
            (uid, evidence.telling(await evidence.about(self._cluster, key.namespace, uid)))
            for uid in uids
        ]
        return {uid: event for uid, event in said if event is not None}

    async def _pytorch_jobs(self, key: Key, job: Object) -> list[Object]:
        """All that bear our label, and others' that have a name we would give."""
        found = self._cache.children(PYTORCHJOBS, key)
        seen = {body["metadata"]["name"] for body in found}
        attempt = (job.get("status") or {}).get("attempt") or 1
        for name in (attempt_name(key.name, attempt), attempt_name(key.name, attempt + 1)):
            known = self._cache.get(PYTORCHJOBS, key.namespace, name)
            if known is None or name in seen:
                continue
            # what is over makes nothing, so that nothing is in its way
            other = known if _is_over(job) else await self._in_the_way(PYTORCHJOBS, key, name)
            if other is not None:
                found.append(other)
        return found

    async def _in_the_way(self, kind: Kind, key: Key, name: str) -> Object | None:
        """An object of the cache that has a name we would give.

        Of one without our label no watch tells, not even that it is gone, so it is read again.
        """
        known = self._cache.get(kind, key.namespace, name)
        if known is None or job_of(kind, known) is not None:
            return known
        found = await self._read(kind, key, name)
        if found is None:
            self._cache.remove(kind, known)
        else:
            self._cache.put(kind, found)
        return found

    async def _unseen(
        self, key: Key, job: Object, seen: Sequence[Object], now: datetime.datetime
    ) -> list[Object]:
        """The PyTorchJobs that should be there and of which no watch tells.

        Whoever takes our label off one hides it from the watches, and it runs on. So before an
        attempt is taken for gone, or another one is made beside it, the API server is asked.
        """
        status = job.get("status") or {}
        attempt = status.get("attempt") or 0
        if not self._serves(PYTORCHJOBS) or _ended_long_ago(job, now):
            return []
        # One that is not recorded as made is found when it is made.
        expected = [attempt] if "pyTorchJobUID" in status else [attempt - 1]
        names = {attempt_name(key.name, each) for each in expected if each > 0}
        missing = names - {body["metadata"]["name"] for body in seen}
        found = [await self._read(PYTORCHJOBS, key, name) for name in missing]
        return [body for body in found if body is not None]

    async def _unseen_pods(
        self, key: Key, job: Object, pytorch_jobs: Sequence[Object], seen: Sequence[Object]
    ) -> list[Object]:
        """Pods of earlier attempts, before another one is made and the watches tell of none.

        The watch of pods may be behind that of PyTorchJobs, and a pod that still saves must not be
        overlooked.
        """
        status = job.get("status") or {}
        name = status.get("pyTorchJobName")
        is_there = any(body["metadata"]["name"] == name for body in pytorch_jobs)
        if seen or is_there or (status.get("attempt") or 0) <= 1 or _is_over(job):
            return []
        labels = f"{JOB_LABEL}={key.name}"
        listing = await self._cluster.list_all(PODS, key.namespace, labels=labels)
        return listing.items

    async def _read(self, kind: Kind, key: Key, name: str) -> Object | None:
        try:
            return await self._cluster.get(kind, key.namespace, name)
        except KindMissing:
            # nobody can say whether it is gone
            raise
        except NotFound:
            return None

    async def _claim(self, key: Key, job: Object, *, wanted: bool) -> Object | None:
        """The claim for checkpoints: the one made for this name, or the one the user has."""
        checkpoints = (job["spec"].get("storage") or {}).get("checkpoints") or {}
        is_asked = wanted and not _is_over(job)
        if not (name := checkpoints.get("claimName")):
            name = claim_name(key.name)
            if is_asked:
                return await self._in_the_way(CLAIMS, key, name)
            return self._cache.get(CLAIMS, key.namespace, name)
        # Users' claims bear no label of ours, so no watch tells of them.
        found = self._cache.get(CLAIMS, key.namespace, name)
        return await self._read(CLAIMS, key, name) if found is None and is_asked else found


def _is_late(pod: Object, now: datetime.datetime) -> bool:
    waits = (pod.get("status") or {}).get("phase") in (None, "", "Pending")
    return waits and _age_seconds(pod, now) >= POD_LATE_SECONDS


def _age_seconds(body: Object, now: datetime.datetime) -> float:
    return (now - time_of(body["metadata"]["creationTimestamp"])).total_seconds()


def _has_own(job: Object, pytorch_jobs: Sequence[Object]) -> bool:
    """Whether one of them is made for this job already; those of an earlier job do not count."""
    uid = job["metadata"]["uid"]
    return any(controller(each).get("uid") == uid for each in pytorch_jobs)


def _ended_long_ago(job: Object, now: datetime.datetime) -> bool:
    ended = (job.get("status") or {}).get("completionTime")
    if not _is_over(job) or ended is None:
        return False
    return (now - time_of(ended)).total_seconds() > STOPPING_SECONDS


def _is_over(job: Object) -> bool:
    return (job.get("status") or {}).get("phase") in ("Succeeded", "Failed")
