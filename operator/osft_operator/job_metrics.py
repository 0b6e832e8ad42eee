"""What the operator tells Prometheus about its jobs: how many, how long, and each one if wanted.

`changed` is called by transitions with each status that was written, `Survey` by service from time
to time with all jobs. The numbers of single jobs are off unless the administrator wants them, and
go with their job. Everything is read from the recorded status, so a restarted operator goes on
where the last one ended.
"""

from __future__ import annotations

import collections
import datetime
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from osft_operator import metrics, obstacles, predecessors, resources, waiting
from osft_operator.isolation import set_aside
from osft_operator.metrics import registry
from osft_operator.observed import find_condition, time_of

Object = Mapping[str, Any]

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
BUCKETS = (1, 5, 15, MINUTE, 300, 900, HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 3 * DAY, 7 * DAY)
OUTCOMES = frozenset(
    {
        "Done",
        "AlreadyFinished",
        "BadInput",
        "Diverged",
        "DeadlineExceeded",
        "Evicted",
        "MaxRestartsExceeded",
        "OOMKilled",
        "PyTorchJobDeleted",
        "PyTorchJobFailed",
        "Stalled",
    }
)
"""Reasons that become a label. A pod can say any word: all others count as Other."""
WAITING = ("Pending", "Queued", "Starting")
"""Phases of a job that would like to run."""
NOT_ACCEPTED = ("Denied", "InvalidSpec", "InternalError", "Refused")
"""Reasons of Accepted=False with which no job waits for room."""
FOR_ITS_AUTHOR = obstacles.FOR_ITS_AUTHOR | predecessors.FOR_ITS_AUTHOR | waiting.FOR_ITS_AUTHOR
"""Reasons of Running=False with which no job waits for room."""

jobs = Gauge("osftjob_jobs", "OSFTJobs by phase.", ["phase"], registry=registry)
stalled = Gauge(
    "osftjob_stalled", "OSFTJobs that run without progress (condition Stalled).", registry=registry
)
loss_not_finite = Gauge(
    "osftjob_loss_not_finite",
    "Running OSFTJobs that have made steps and whose last loss is no finite number.",
    registry=registry,
)
oldest_waiting = Gauge(
    "osftjob_oldest_waiting_seconds",
    "How long the OSFTJob that waits longest has wanted to run, by whether it wants GPUs; "
    "those that wait for their author are left out.",
    ["gpu"],
    registry=registry,
)
created = Counter(
    "osftjob_pytorchjobs_created", "PyTorchJobs made by the operator.", registry=registry
)
restarts = Counter(
    "osftjob_restarts", "Failures after which a run started again.", registry=registry
)
completed = Counter(
    "osftjob_completed", "OSFTJobs that ended, by how and why.", ["result", "reason"],
    registry=registry,
)  # fmt: skip
queue_seconds = Histogram(
    "osftjob_queue_seconds", "Wait in Kueue's queue.", buckets=BUCKETS, registry=registry
)
for _result in ("succeeded", "failed"):
    for _reason in (*OUTCOMES, "Other"):
        # A series that is born with its first job has no increase that an alert could see.
        completed.labels(_result, _reason)
start_seconds = Histogram(
    "osftjob_start_seconds",
    "From accepted or admitted, or from a failure, until all pods run.",
    buckets=BUCKETS,
    registry=registry,
)
run_seconds = Histogram(
    "osftjob_run_seconds",
    "From status.startTime until the end, by how it ended.",
    ["result"],
    buckets=BUCKETS,
    registry=registry,
)


def changed(old: Object, new: Object) -> None:
    """Count what a status write says that the status before did not say."""
    restarts.inc(max(0, new.get("restarts", 0) - old.get("restarts", 0)))
    reasons = [find_condition(status, "Accepted").get("reason") for status in (old, new)]
    if reasons[1] == "InvalidSpec" and reasons[0] != "InvalidSpec":
        metrics.set_aside.labels("decision", "InvalidSpec").inc()
    before, after = (
        {kind: find_condition(status, kind) for kind in ("Running", "Suspended")}
        for status in (old, new)
    )
    left = (before["Suspended"].get("status"), after["Suspended"].get("status")) == (
        "True",
        "False",
    )
    if left and before["Suspended"].get("reason") == "Queued":
        queue_seconds.observe(_between(before["Suspended"], after["Suspended"]))
    if (before["Running"].get("status"), after["Running"].get("status")) == ("False", "True"):
        since = max((before["Running"], after["Suspended"] or before["Running"]), key=_time)
        start_seconds.observe(_between(since, after["Running"]))
    phase = new.get("phase")
    if phase != old.get("phase") and phase in ("Succeeded", "Failed"):
        _ended(new, str(phase).lower())


def _ended(status: Object, result: str) -> None:
    reason = status.get("reason")
    completed.labels(result, reason if reason in OUTCOMES else "Other").inc()
    start, end = status.get("startTime"), status.get("completionTime")
    if start and end:
        run_seconds.labels(result).observe((time_of(end) - time_of(start)).total_seconds())


class Survey(Collector):
    """Gauges over all jobs, and the single jobs' own if wanted."""

    def __init__(self, *, per_job: bool) -> None:
        self._per_job = per_job
        # Replaced as a whole: scrapes read it on a thread of their own.
        self._families: tuple[GaugeMetricFamily, ...] = ()

    def take(self, bodies: Iterable[Object], now: datetime.datetime) -> None:
        """Look at all jobs there are now; what is not among them any more is forgotten."""
        counts = _Counts()
        families = _families() if self._per_job else {}
        for body in bodies:
            metadata = body["metadata"]
            with set_aside("survey", f"{metadata['namespace']}/{metadata['name']}"):
                counts.add(body, now)
                if families:
                    _add(families, body, body.get("status") or {})
        count_phases(counts.phases)
        stalled.set(counts.stalled)
        loss_not_finite.set(counts.without_loss)
        for gpu, seconds in counts.waits.items():
            oldest_waiting.labels(gpu).set(seconds)
        self._families = tuple(families.values())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The single jobs' numbers, for a scrape."""
        yield from self._families


class _Counts:
    """What the gauges say of all jobs."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = collections.Counter()
        self.waits = {"true": 0.0, "false": 0.0}
        self.stalled = 0
        self.without_loss = 0

    def add(self, body: Object, now: datetime.datetime) -> None:
        """Count one job."""
        status = body.get("status") or {}
        phase = status.get("phase") or "Pending"
        self.phases[phase] += 1
        if phase == "Running":
            self.stalled += find_condition(status, "Stalled").get("status") == "True"
            self.without_loss += _lost(status)
        held_up = phase == "Restarting" and status.get("reason") != "Restarting"
        if (phase in WAITING or held_up) and _may_begin(status):
            gpu = "true" if _wants_gpus(body) else "false"
            self.waits[gpu] = max(self.waits[gpu], _waited(body, status, now))


def count_phases(phases: Mapping[str, int]) -> None:
    """Set the gauge of jobs; a phase that no job is in any more goes to zero."""
    for (phase,) in list(jobs._metrics):
        jobs.labels(phase).set(phases.get(phase, 0))
    for phase, number in phases.items():
        jobs.labels(phase).set(number)


PER_JOB = {
    "progressPercentage": ("osftjob_progress_ratio", "Part of the run that is done, 0 to 1."),
    "loss": ("osftjob_loss", "Loss of the last step."),
    "tokensPerSecond": ("osftjob_tokens_per_second", "Tokens of all ranks per second."),
    "estimatedRemainingSeconds": ("osftjob_remaining_seconds", "Time left."),
    "lastUpdatedTime": (
        "osftjob_last_progress_timestamp_seconds",
        "When the trainer last told something.",
    ),
}
"""Fields of status.progress: the metric of a single job, and its help."""
INFO = ("osftjob_info", "1, with the phase, for each OSFTJob.")


def _families() -> dict[str, GaugeMetricFamily]:
    found = {
        field: GaugeMetricFamily(name, words, labels=["namespace", "name"])
        for field, (name, words) in PER_JOB.items()
    }
    found["info"] = GaugeMetricFamily(*INFO, labels=["namespace", "name", "phase"])
    return found


def _add(families: dict[str, GaugeMetricFamily], body: Object, status: Object) -> None:
    labels = [body["metadata"]["namespace"], body["metadata"]["name"]]
    families["info"].add_metric([*labels, status.get("phase") or "Pending"], 1)
    progress = status.get("progress") or {}
    for field in PER_JOB:
        value = progress.get(field)
        if value is None:
            continue
        if field == "lastUpdatedTime":
            try:
                value = time_of(value).timestamp()
            except ValueError:  # a pod wrote it
                continue
        elif field == "progressPercentage":
            value = value / 100
        families[field].add_metric(labels, float(value))


def _lost(status: Object) -> bool:
    progress = status.get("progress") or {}
    return progress.get("step", 0) > 0 and progress.get("loss") is None


def _wants_gpus(body: Object) -> bool:
    limits = (body["spec"].get("resources") or {}).get("limits") or {}
    try:
        return resources.gpus({name: str(count) for name, count in limits.items()}) > 0
    except ValueError:
        return False


def _may_begin(status: Object) -> bool:
    """Whether it waits for the cluster; a job that is refused or wrong waits for its author."""
    if find_condition(status, "Accepted").get("reason") in NOT_ACCEPTED:
        return False
    return find_condition(status, "Running").get("reason") not in FOR_ITS_AUTHOR


def _waited(body: Object, status: Object, now: datetime.datetime) -> float:
    made = body["metadata"]["creationTimestamp"]
    times = [find_condition(status, kind).get("lastTransitionTime") for kind in WAIT_CONDITIONS]
    since = max(time_of(each) for each in (made, status.get("startTime"), *times) if each)
    return max(0.0, (now - since).total_seconds())


WAIT_CONDITIONS = ("Accepted", "Running", "Suspended")
"""A job has waited since the last of these changed: it was made, corrected, stopped, or resumed. A
reason that gives way to another changes none of them, so an image that could not be pulled for an
hour counts, once it can be."""


def _time(condition: Object) -> datetime.datetime:
    return time_of(condition["lastTransitionTime"])


def _between(earlier: Object, later: Object) -> float:
    return max(0.0, (_time(later) - _time(earlier)).total_seconds())
