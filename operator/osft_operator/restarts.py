"""Counts the restarts of a run: one number over every way in which a run starts again.

Called by status while the recorded status is brought up to date, and by attempts for the wait
between two of them. Counted are a container that the kubelet starts again, a pod that is made again
(evicted, its node lost, deleted by somebody), and a whole new attempt. Nothing here resets the
number. Pure; must never decide what a number means for the job.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from osft_operator.failure import restart_count
from osft_operator.observed import Object, is_deleting, is_suspended, text_of, time_of
from osft_operator.status_model import CountedPods

Status = dict[str, Any]

ROUND = datetime.timedelta(seconds=30)
"""Pods that are made within so long of each other replace what one event took away."""
FIRST_WAIT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 300.0
"""The waits before attempts are those of the kubelet before a container's restarts."""


def count(status: Status, job: Object, pods: Sequence[Object], nodes: int) -> None:
    """Bring `status.restarts` up to date with the pods of the current attempt.

    Args:
        status: changed in place; `countedPods` keeps what was seen, so that a pod that is made
            again counts also when nobody looked at that moment.
        job: the attempt's PyTorchJob.
        pods: its pods.
        nodes: how many it has when all are there.
    """
    alive = [pod for pod in pods if not is_deleting(pod)]
    if is_suspended(job):
        if not alive:
            # Pods that come after this begin at zero, while the run does not.
            status["restartsBeforeAttempt"] = status["restarts"]
            status.pop("countedPods", None)
        return
    before = status.get("restartsBeforeAttempt", 0)
    recorded = status.get("countedPods")
    counted = CountedPods.model_validate(recorded) if recorded else None
    found = max((_restarts(pod, counted) for pod in alive), default=0)
    found = max(found, status["restarts"] - before)
    times = [time_of(made) for pod in alive if (made := _made(pod))]
    if counted is None and len(times) >= nodes:
        counted = CountedPods(newest=text_of(max(times)))
    elif counted is not None and times and max(times) - time_of(counted.newest) > ROUND:
        found, counted = _with_replaced(alive, counted, found, max(times))
    if counted is not None:
        status["countedPods"] = counted.model_dump(by_alias=True, exclude_none=True)
    status["restarts"] = before + found


def _with_replaced(
    pods: Sequence[Object], counted: CountedPods, found: int, newest: datetime.datetime
) -> tuple[int, CountedPods]:
    """The number, and what to remember, after pods were made again.

    When one pod goes, the trainers of all others fail and are started again: that is one restart,
    and where they have told of it already the new pod adds nothing.
    """
    others = [
        _restarts(pod, counted)
        for pod in pods
        if (made := _made(pod)) and time_of(made) <= time_of(counted.newest)
    ]
    told = max(others, default=0)
    if told <= (counted.restarts_of_others or 0):
        found += 1
    return found, CountedPods(
        newest=text_of(newest),
        replaced_after=counted.newest,
        restarts_of_replaced=found,
        restarts_of_others=told,
    )


def _restarts(pod: Object, counted: CountedPods | None) -> int:
    """Restarts of a pod's place in this attempt: its own, and those before it was made again."""
    own = restart_count([pod])
    made = _made(pod)
    if counted is None or counted.replaced_after is None or made is None:
        return own
    replaced = time_of(made) > time_of(counted.replaced_after)
    return own + (counted.restarts_of_replaced or 0 if replaced else 0)


def _made(pod: Object) -> str | None:
    made: str | None = pod["metadata"].get("creationTimestamp")
    return made


def wait_seconds(restarts: int) -> float:
    """Wait before an attempt: none after the first failure, then doubling, up to five minutes."""
    if restarts <= 1:
        return 0.0
    # 2**30 is beyond any maximum; more doublings would overflow at last
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(restarts - 2, 30))


def beyond_budget(recorded: Mapping[str, Any], status: Status, max_restarts: int) -> bool:
    """Whether a failure that is seen now was one too many.

    A budget that was lowered below what was used up earlier ends nothing: only a further failure
    does.
    """
    return bool(status["restarts"] > max(recorded.get("restarts", 0), max_restarts))
