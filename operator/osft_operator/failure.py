"""Reads pods: who failed first and with which words, how often they restarted, how many run.

Called by decide, status and restarts; why a pod does not start is in waiting. Pure. Everything a
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

from osft_operator.names import CONTAINER
from osft_operator.observed import Object, find_condition, is_deleting, time_of
from osft_operator.status_model import FailureStatus
from osft_trainer.report import VERSION_SKEW, ExitCode, Progress, Termination

MAX_MESSAGE = 2048
SAME_ROUND = datetime.timedelta(seconds=120)
"""When one rank dies the others follow within this time, so these failures have one cause."""

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}\Z")
_FINAL_CODES = [int(code) for code in ExitCode if code.is_final]
_FOLLOWERS = (1, int(ExitCode.TRY_AGAIN), int(ExitCode.PREEMPTED))
"""What the other ranks exit with when one has died."""

CURES = {
    "OOMKilled": "the container used more memory than its limit (/dev/shm counts); raise "
    "spec.resources.limits.memory, or lower spec.training.maxTokensPerGpu",
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

    def to_status(self) -> dict[str, Any]:
        """As it stands in status.failure."""
        return FailureStatus(
            pod=self.pod,
            container=self.container or None,
            reason=self.reason,
            exit_code=self.exit_code,
            message=self.message,
        ).model_dump(by_alias=True, exclude_none=True)

    def words(self) -> str:
        """For a condition's message."""
        code = "" if self.exit_code is None else f" with exit code {self.exit_code}"
        where = f"container {self.container} of pod {self.pod}" if self.container else self.pod
        return f"{where} ended{code} ({self.reason}): {self.message}".rstrip(": ")


def cause(pods: Sequence[Object]) -> Ended | None:
    """The failure that explains the newest round of failures; None when nothing failed."""
    # a pod that is being deleted was told to end; unless the cluster says that it took it away
    found = [
        ended for pod in pods if not is_deleting(pod) or _disruption(pod) for ended in _ended(pod)
    ]
    if not found:
        return None
    earliest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    newest = max(ended.finished or earliest for ended in found)
    recent = [ended for ended in found if newest - (ended.finished or earliest) <= SAME_ROUND]

    def rank(ended: Ended) -> tuple[int, datetime.datetime, str]:
        follows = ended.exit_code in _FOLLOWERS or ended.reason == "NCCLTimeout"
        weight = 0 if ended.is_final else 2 if follows else 1
        return weight, ended.finished or earliest, ended.pod

    finals = [ended for ended in found if ended.is_final]
    return min(finals or recent, key=rank)


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
    taken = _taken_away(pod)
    if taken is not None and not any(ended.is_final for ended in ends):
        # what its containers said then is that they were told to end
        yield taken
        return
    yield from ends
    if status.get("phase") == "Failed" and not ends:
        message = clean(status.get("message"))
        yield Ended(pod["metadata"]["name"], "", None, "PodFailed", message, None)


def _taken_away(pod: Object) -> Ended | None:
    """How the node or the cluster ended a pod; None when its own containers did."""
    status = pod.get("status") or {}
    disruption = _disruption(pod)
    if status.get("phase") == "Failed" and status.get("reason"):
        reason = word(status["reason"], "PodFailed")
        message = clean(status.get("message")) or CURES.get(reason, "")
    elif disruption:
        reason = word(disruption.get("reason"), "Evicted")
        message = clean(disruption.get("message"))
    else:
        return None
    when = disruption.get("lastTransitionTime") if disruption else None
    finished = time_of(when) if when else None
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
    if reason in CURES:
        message = f"{CURES[reason]}. {message}".strip()[:MAX_MESSAGE]
    finished = terminated.get("finishedAt")
    return Ended(
        pod=str(pod["metadata"]["name"]),
        container=container,
        exit_code=terminated.get("exitCode"),
        reason=reason,
        message=message,
        finished=time_of(finished) if finished else None,
    )
