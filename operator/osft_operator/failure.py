"""Reads pods: how they ended and with which words, how often they restarted, how many run.

Called by causes, gang and restarts; why a pod does not start is in waiting. Pure. Everything a
container wrote is untrusted: it is bounded, freed of control characters, and never decides more
than its exit code does.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from osft_operator import cures
from osft_operator.names import CONTAINER
from osft_operator.observed import Object, find_condition, is_deleting, text_of, time_of
from osft_operator.status_model import FailureStatus
from osft_trainer.report import VERSION_SKEW, ExitCode, Progress, Termination

MAX_MESSAGE = 2048

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}\Z")
_FINAL_CODES = [int(code) for code in ExitCode if code.is_final]

CURES = {
    "StartError": "its command cannot be run: spec.image must be a trainer image",
    "ContainerCannotRun": "its command cannot be run: spec.image must be a trainer image",
    "Evicted": "the node took the pod's place away",
    VERSION_SKEW: "the trainer image is of another version than the operator and does not take "
    "what it wrote; use the image of the operator's version, or leave that parameter out",
    "NCCLTimeout": "a rank waited in vain for the others: one hung or died, or the network between "
    "the nodes is broken; look for the first error in the logs of all pods",
}
"""Words for ends that leave no message, or one that does not say what to do."""
_NCCL = re.compile(
    r"(?i)watchdog caught collective operation time ?out|nccl[^\n]{0,200}timed? ?out"
    r"|some nccl operations have failed"
)
_UNKNOWN_FLAG = re.compile(r"\Aunknown parameter '--")
"""How an image that is older than the reason VersionSkew refuses a flag it does not know."""
ABORTED = "was ended by SIGABRT"
"""The launcher's words on a rank that ended itself."""
ABORT_HINT = "NCCL ends a rank so when a collective times out; its log says more"


@dataclass(frozen=True)
class Ended:
    """A container that ended with an error."""

    pod: str
    container: str
    exit_code: int | None
    reason: str
    message: str
    finished: datetime.datetime | None

    @property
    def is_final(self) -> bool:
        """Whether a retry cannot help: bad input, or divergence."""
        ours = self.container == CONTAINER and self.reason != VERSION_SKEW
        return ours and self.exit_code in _FINAL_CODES

    def to_status(self, attempt: int) -> dict[str, Any]:
        """As it stands in status.failure."""
        return FailureStatus(
            pod=self.pod,
            container=self.container or None,
            reason=self.reason,
            exit_code=self.exit_code,
            message=self.message,
            finished_at=text_of(self.finished) if self.finished else None,
            attempt=attempt,
        ).model_dump(by_alias=True, exclude_none=True)

    def words(self) -> str:
        """For a condition's message."""
        code = "" if self.exit_code is None else f" with exit code {self.exit_code}"
        where = f"container {self.container} of pod {self.pod}" if self.container else self.pod
        return f"{where} ended{code} ({self.reason}): {self.message}".rstrip(": ")


def ends(pods: Sequence[Object]) -> list[Ended]:
    """The latest end with an error of each container, and of each pod that was taken away."""
    return [ended for pod in pods for ended in _ended(pod) if _is_evidence(ended, pod)]


def lost(pods: Sequence[Object]) -> list[Ended]:
    """The pods whose nodes do not answer, as ends: they explain those of the others."""
    found = []
    for pod in filter(is_lost, pods):
        since = find_condition(pod.get("status") or {}, "Ready").get("lastTransitionTime")
        name, when = str(pod["metadata"]["name"]), time_of(since) if since else None
        found.append(Ended(name, "", None, "NodeLost", "its node does not answer", when))
    return found


def _is_evidence(ended: Ended, pod: Object) -> bool:
    """A pod that is being deleted was told to end: what it says from then on explains nothing."""
    if not is_deleting(pod) or (not ended.container and ended.reason != "PodFailed"):
        return True
    metadata = pod["metadata"]
    grace = datetime.timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    asked = time_of(metadata["deletionTimestamp"]) - grace
    return ended.finished is not None and ended.finished < asked


def restart_count(pods: Sequence[Object]) -> int:
    """How often the trainer's container of one pod was restarted, the highest of all pods."""
    counts = [
        int(status.get("restartCount") or 0)
        for pod in pods
        for status in _statuses(pod)
        if status.get("name") == CONTAINER
    ]
    return max(counts, default=0)


def last_end(pods: Sequence[Object]) -> datetime.datetime | None:
    """When a trainer's container last ended, well or not; None when none has."""
    ends = [
        time_of(finished)
        for pod in pods
        for status in _statuses(pod)
        if status.get("name") == CONTAINER
        for key in ("state", "lastState")
        if (finished := ((status.get(key) or {}).get("terminated") or {}).get("finishedAt"))
    ]
    return max(ends, default=None)


def is_restarting(pods: Sequence[Object]) -> bool:
    """Whether a trainer's container has failed and waits for its next start."""
    return any(
        "running" not in state and ("terminated" in state or state_reason == "CrashLoopBackOff")
        for pod in pods
        if (pod.get("status") or {}).get("phase") == "Running"
        for status in _statuses(pod)
        if status.get("name") == CONTAINER
        for state in [status.get("state") or {}]
        for state_reason in [(state.get("waiting") or {}).get("reason")]
        if (state.get("terminated") or {}).get("exitCode") != 0
    )


def running_count(pods: Sequence[Object]) -> int:
    """Pods whose trainer runs, or has ended well."""
    return sum(map(_runs, pods))


def is_lost(pod: Object) -> bool:
    """Whether its node does not answer any more, so that its containers' states are old."""
    status = pod.get("status") or {}
    if status.get("phase") == "Unknown" or status.get("reason") == "NodeLost":
        return True
    # The node controller takes Ready away and gives no reason; a kubelet always gives one.
    ready = find_condition(status, "Ready")
    silent = ready.get("status") == "False" and not ready.get("reason")
    return status.get("phase") == "Running" and silent


def _runs(pod: Object) -> bool:
    if (pod.get("status") or {}).get("phase") == "Succeeded":
        return True
    if is_deleting(pod) or is_lost(pod):
        return False
    return any(
        "running" in (status.get("state") or {})
        or ((status.get("state") or {}).get("terminated") or {}).get("exitCode") == 0
        for status in _statuses(pod)
        if status.get("name") == CONTAINER
    )


def last_progress(pods: Sequence[Object], *, ended_only: bool) -> Progress | None:
    """The furthest progress in the last words of the trainers.

    Args:
        pods: those of an attempt.
        ended_only: leave out trainers that were started again since.
    """
    found = []
    for pod in pods:
        for status in _statuses(pod):
            for key in ("state",) if ended_only else ("state", "lastState"):
                terminated = (status.get(key) or {}).get("terminated") or {}
                words = Termination.parse(str(terminated.get("message") or ""))
                if words is not None and words.progress is not None:
                    found.append(words.progress)
    return max(found, key=lambda progress: (progress.attempt, progress.step), default=None)


def clean(text: Any, limit: int = MAX_MESSAGE) -> str:
    """Untrusted text: the end of it, without control characters other than line breaks."""
    raw = str(text or "")[-limit:]
    kept = "".join(each for each in raw if each in "\n\t" or unicodedata.category(each)[0] != "C")
    return kept.strip()


def word(text: Any, default: str) -> str:
    """Untrusted text as a reason; the default when it is none."""
    return text if isinstance(text, str) and _WORD.match(text) else default


def _statuses(pod: Object) -> list[Any]:
    return list((pod.get("status") or {}).get("containerStatuses") or [])


def _ended(pod: Object) -> Iterator[Ended]:
    """Each container's latest end with an error, and the pod's own."""
    status = pod.get("status") or {}
    ends = []
    for container in [*(status.get("initContainerStatuses") or []), *_statuses(pod)]:
        for key in ("state", "lastState"):
            terminated = (container.get(key) or {}).get("terminated")
            if terminated and terminated.get("exitCode") != 0:
                ends.append(_of_container(pod, str(container.get("name")), terminated))
                break
    taken = _taken_away(pod, ends)
    if taken is not None and not any(ended.is_final for ended in ends):
        yield taken
        # what its containers said from then on is that they were told to end
        yield from (each for each in ends if _is_before(each, taken))
        return
    yield from ends
    if status.get("phase") == "Failed" and not ends:
        message = clean(status.get("message"))
        yield Ended(pod["metadata"]["name"], "", None, "PodFailed", message, _last_change(pod))


def _is_before(ended: Ended, other: Ended) -> bool:
    times = (ended.finished, other.finished)
    return times[0] is not None and times[1] is not None and times[0] < times[1]


def _last_change(pod: Object) -> datetime.datetime | None:
    conditions = (pod.get("status") or {}).get("conditions") or []
    times = [time_of(when) for each in conditions if (when := each.get("lastTransitionTime"))]
    return max(times, default=None)


def _taken_away(pod: Object, ends: Sequence[Ended]) -> Ended | None:
    """How the node or the cluster ended a pod; None when its own containers did."""
    status = pod.get("status") or {}
    disruption = _disruption(pod)
    if status.get("phase") == "Failed" and status.get("reason"):
        reason = word(status["reason"], "PodFailed")
        message = clean(status.get("message")) or CURES.get(reason, "")
        cure = cures.eviction(message)
        message = f"{message}; {cure}" if cure else message
    elif disruption:
        reason = word(disruption.get("reason"), "Evicted")
        message = clean(disruption.get("message"))
    else:
        return None
    when = disruption.get("lastTransitionTime") if disruption else None
    ended = [each.finished for each in ends if each.finished]
    finished = time_of(when) if when else min(ended, default=_last_change(pod))
    return Ended(pod["metadata"]["name"], "", None, reason, message, finished)


def _disruption(pod: Object) -> Object:
    """The cluster's word that it takes the pod away: preempted, drained, its node lost."""
    condition = find_condition(pod.get("status") or {}, "DisruptionTarget")
    return condition if condition.get("status") == "True" else {}


def _of_container(pod: Object, container: str, terminated: Object) -> Ended:
    raw = str(terminated.get("message") or "")
    words = Termination.parse(raw) if container == CONTAINER else None
    kubelets = word(terminated.get("reason"), "Error")
    if words is not None and kubelets != "OOMKilled":
        reason, message = word(words.reason, kubelets), clean(words.message)
        if reason == "BadInput" and _UNKNOWN_FLAG.match(message):
            # the operator wrote the flag, not the job's author
            reason = VERSION_SKEW
    else:
        reason, message = kubelets, clean(words.message if words else raw)
    if _NCCL.search(f"{reason} {message}") and terminated.get("exitCode") not in _FINAL_CODES:
        reason = "NCCLTimeout"
    elif ABORTED in message:
        message = f"{message}; {ABORT_HINT}"
    cure = cures.memory(container) if reason == "OOMKilled" else CURES.get(reason)
    if cure is not None:
        message = f"{cure}. {message}".strip()[:MAX_MESSAGE]
    finished = terminated.get("finishedAt")
    return Ended(
        pod=str(pod["metadata"]["name"]),
        container=container,
        exit_code=terminated.get("exitCode"),
        reason=reason,
        message=message,
        finished=time_of(finished) if finished else None,
    )
