"""What one pass over an OSFTJob has seen: plain objects, and the questions decide asks of them.

Made by reconcile from its caches and by `osft run` from its processes. Reads only; must never call
the cluster, a clock or the environment.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from osft_operator import names
from osft_operator.resolved import RenderSettings
from osft_trainer.report import Progress

Object = Mapping[str, Any]

ATTEMPT_DIGITS = 4
"""More than any budget of restarts needs; a label of more is not ours."""
EARLIEST = datetime.datetime(2, 1, 1, tzinfo=datetime.UTC)
LATEST = datetime.datetime(9998, 1, 1, tzinfo=datetime.UTC)
"""What is before or after counts as these: a year more or less can still be reckoned with."""

_TIME = re.compile(r"(\d{4})-\d\d-\d\dT\d\d:\d\d:\d\d", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """An event about an object that is not ours."""

    reason: str
    message: str
    is_warning: bool = True

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True)
class Observed:
    """One OSFTJob with everything that belongs to it, or is in its way."""

    body: Object
    """The OSFTJob."""
    settings: RenderSettings
    """For a job that has not begun; later its own status.resolved counts."""
    pytorch_jobs: Sequence[Object] = ()
    """Those with its label or with a name it would give, whoever owns them."""
    pods: Sequence[Object] = ()
    """Pods with its label."""
    neighbours: Sequence[Object] = ()
    """Pods of other OSFTJobs that write to its folder, when an attempt is due."""
    failed_and_gone: Sequence[Object] = ()
    """The last state of pods that failed and were deleted, as far as it was heard."""
    claim: Object | None = None
    """The claim for checkpoints: its own or the user's."""
    progress: Progress | None = None
    """What rank 0 answered last; not trusted."""
    progress_pod: str | None = None
    """Which pod that was, where it is known."""
    progress_since: datetime.datetime | None = None
    """Since when it has answered the same step, where that was noted."""
    listening_seconds: float = float("inf")
    """For how long the present pods have been asked."""
    pytorch_job_kind_present: bool = True
    """Whether the API server knows PyTorchJobs."""
    refusal: Said | None = None
    """The newest Warning about a PyTorchJob of which pods have been missing for long."""
    news: Mapping[str, Said] = field(default_factory=dict)
    """The event by uid that says why a pod does not start, or a claim waits."""
    sidecar_grace_seconds: float = 60.0
    """How long other containers may outlive the trainers of all pods."""
    workload: Object | None = None
    """Kueue's Workload of a PyTorchJob that waits in a queue, where it can be read."""

    @property
    def name(self) -> str:
        """Name of the OSFTJob."""
        return str(self.body["metadata"]["name"])

    @property
    def uid(self) -> str:
        """Identity of the OSFTJob, and of its run."""
        return str(self.body["metadata"].get("uid", ""))

    @property
    def generation(self) -> int:
        """Generation of its spec."""
        return int(self.body["metadata"].get("generation", 1))

    @property
    def status(self) -> dict[str, Any]:
        """The status as it is recorded."""
        return dict(self.body.get("status") or {})

    def own_jobs(self) -> list[Object]:
        """The PyTorchJobs it owns, and the one it made, also when somebody took the owner off."""
        made = self.status.get("pyTorchJobUID")
        return [
            job
            for job in self.pytorch_jobs
            if controller(job).get("uid") == self.uid
            or (made and not controller(job) and job["metadata"].get("uid") == made)
        ]

    def job_named(self, name: str) -> Object | None:
        """A PyTorchJob of its own by name."""
        return next((job for job in self.own_jobs() if job["metadata"]["name"] == name), None)

    def stranger_named(self, name: str) -> Object | None:
        """Somebody else's PyTorchJob that has the name."""
        own = self.own_jobs()
        return next(
            (
                job
                for job in self.pytorch_jobs
                if job["metadata"]["name"] == name and job not in own
            ),
            None,
        )

    def is_anothers(self, body: Object) -> bool:
        """Whether an object surely belongs to somebody else, and to no earlier job of our name.

        One with neither an owner nor another job's label does not: it may be ours, whose owner was
        taken off.
        """
        owner = controller(body)
        if owner:
            is_earlier = (owner.get("kind"), owner.get("name")) == (names.KIND, self.name)
            return owner.get("uid") != self.uid and not is_earlier
        return another_job(body, self.name) is not None

    def pods_of(self, job: Object) -> list[Object]:
        """The pods of a PyTorchJob, by its uid and not by their labels, which anybody can set."""
        return _controlled(self.pods, job)

    def gone_pods_of(self, job: Object) -> list[Object]:
        """Those that failed and are gone."""
        return _controlled(self.failed_and_gone, job)


def _controlled(pods: Sequence[Object], job: Object) -> list[Object]:
    uid = job["metadata"].get("uid", "")
    return [pod for pod in pods if controller(pod).get("uid") == uid]


def controller(body: Object) -> Object:
    """The controlling ownerReference; empty when there is none."""
    references = body["metadata"].get("ownerReferences") or []
    return next((each for each in references if each.get("controller")), {})


def another_job(body: Object, name: str) -> str | None:
    """The OSFTJob that an object was made for, by its owner or its label, if it is not `name`."""
    owner, labels = controller(body), body["metadata"].get("labels") or {}
    kept_for = owner.get("name") if owner.get("kind") == names.KIND else None
    job = kept_for or (None if owner else labels.get(names.JOB_LABEL))
    return str(job) if job and job != name else None


def is_true(body: Object, condition: str) -> bool:
    """Whether an object's condition is True."""
    return find_condition(body.get("status") or {}, condition).get("status") == "True"


def find_condition(status: Object, condition: str) -> Object:
    """A condition of a status; empty when it is not there."""
    conditions = status.get("conditions") or []
    return next((each for each in conditions if each.get("type") == condition), {})


def attempt_of(job: Object) -> int:
    """The attempt a PyTorchJob is, by its label; 0 when it has none."""
    text = (job["metadata"].get("labels") or {}).get(names.ATTEMPT_LABEL, "0")
    return int(text) if text.isdecimal() and len(text) <= ATTEMPT_DIGITS else 0


def is_deleting(body: Object) -> bool:
    """Whether an object is on its way out."""
    return bool(body["metadata"].get("deletionTimestamp"))


def is_suspended(job: Object) -> bool:
    """Whether a PyTorchJob is told to have no pods."""
    return bool((job["spec"].get("runPolicy") or {}).get("suspend"))


def managed_elsewhere(job: Object) -> str:
    """Who manages a PyTorchJob whose pods are in another cluster; empty for one of this cluster."""
    manager = (job["spec"].get("runPolicy") or {}).get("managedBy")
    return "" if manager in (None, "", names.TRAINING_OPERATOR) else str(manager)


def replicas(job: Object) -> int:
    """How many pods a PyTorchJob has when all are there."""
    specs = job["spec"].get("pytorchReplicaSpecs") or {}
    return sum(spec.get("replicas", 1) for spec in specs.values())


def time_of(text: str) -> datetime.datetime:
    """An RFC 3339 time of the API, in UTC.

    The API server takes more than Python: the year 0, offsets of days. Such a time is the nearest
    one that Python can reckon with.

    Raises:
        ValueError: the text is no time.
    """
    try:
        read = datetime.datetime.fromisoformat(text)
    except ValueError:
        match = _TIME.match(text)
        if match is None:
            raise
        if int(match[1]) < EARLIEST.year:
            return EARLIEST
        read = datetime.datetime.fromisoformat(match[0])
    if not EARLIEST.year < read.year < LATEST.year:
        return EARLIEST if read.year <= EARLIEST.year else LATEST
    return read.replace(tzinfo=read.tzinfo or datetime.UTC).astimezone(datetime.UTC)


def text_of(time: datetime.datetime) -> str:
    """A time as the API writes it: whole seconds, UTC."""
    whole = time.astimezone(datetime.UTC).replace(microsecond=0, tzinfo=None)
    return f"{whole.isoformat()}Z"
