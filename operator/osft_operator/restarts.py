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

from pydantic import ValidationError

from osft_operator.failure import last_end, restart_count, running_count
from osft_operator.observed import Object, is_deleting, is_suspended, text_of, time_of
from osft_operator.status_model import CountedPods, ReplacedPods

Status = dict[str, Any]

ROUND = datetime.timedelta(seconds=30)
"""Pods that are made within so long of each other replace what one event took away."""
QUIET = datetime.timedelta(seconds=60)
"""A node that has died is known to have by then, and so that its pod does not run any more."""
SECOND = datetime.timedelta(seconds=1)
"""How exact the API's times are."""
MAX_ROUNDS = 100
"""Rounds of replaced pods that are remembered beside the newest; more than maxRestarts may be."""
FIRST_WAIT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 300.0
"""The waits before attempts are those of the kubelet before a container's restarts."""


def count(
    status: Status, job: Object, pods: Sequence[Object], nodes: int, now: datetime.datetime
) -> None:
    """Bring `status.restarts` up to date with the pods of the current attempt.

    Args:
        status: changed in place; `countedPods` keeps what was seen, so that a pod that is made
            again counts also when nobody looked at that moment.
        job: the attempt's PyTorchJob.
        pods: its pods.
        nodes: how many it has when all are there.
        now: the time.
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
    counted = _read(recorded)
    rounds = _new_rounds(alive, counted) if counted is not None else []
    new = {id(pod) for made_again in rounds for pod in made_again}
    others = [pod for pod in alive if id(pod) not in new]
    told = max((_restarts(pod, counted) for pod in others), default=0)
    found = max(told, status["restarts"] - before)
    if counted is None:
        times = [time_of(made) for pod in alive if (made := _made(pod))]
        counted = CountedPods(newest=text_of(max(times))) if len(times) >= nodes else None
    elif rounds:
        counted = _with_replaced(rounds, alive, counted, told=told, found=found)
        found = max([found, *(_restarts(pod, counted) for group in rounds for pod in group)])
    elif found > _settled(counted) and _runs_on(alive, nodes, now):
        counted = counted.model_copy(update={"restarts_of_others": found})
    if counted is not None:
        status["countedPods"] = counted.model_dump(by_alias=True, exclude_none=True)
    status["restarts"] = before + found


def _read(recorded: object) -> CountedPods | None:
    """What was counted, if this version can read it: counting begins again where it cannot."""
    try:
        return CountedPods.model_validate(recorded) if recorded else None
    except ValidationError:
        return None


def _with_replaced(
    rounds: Sequence[Sequence[Object]],
    pods: Sequence[Object],
    counted: CountedPods,
    *,
    told: int,
    found: int,
) -> CountedPods:
    """What to remember after pods were made again.

    When one pod goes, the trainers of all others fail and are started again: that is one restart,
    and where they have told of it already the new pod adds nothing. A new pod's own restarts begin
    at zero, so those of the attempt until then are put under them: all numbers that are compared
    are restarts of the attempt.

    Args:
        rounds: the new pods, by the event that made them necessary.
        pods: all pods.
        counted: what is remembered.
        told: restarts that the pods which stayed tell of.
        found: restarts of the attempt, as they are known without the new pods.
    """
    settled = _settled(counted)
    start = settled if told > settled else found
    begins = [min(time_of(made) for pod in group if (made := _made(pod))) for group in rounds]
    known = [
        ReplacedPods(made_after=text_of(begin - SECOND), restarts=start + number)
        for number, begin in enumerate(begins, 1)
    ]
    *earlier, newest = _needed([*_rounds(counted), *known], pods)
    return CountedPods(
        newest=text_of(begins[-1]),
        replaced_after=newest.made_after,
        restarts_of_replaced=newest.restarts,
        restarts_of_others=newest.restarts,
        earlier_replaced=earlier[-MAX_ROUNDS:] or None,
    )


def _new_rounds(pods: Sequence[Object], counted: CountedPods) -> list[list[Object]]:
    """The pods that were made since, oldest first, by the event that made them necessary."""
    window = ROUND if counted.replaced_after is not None else datetime.timedelta()
    end = time_of(counted.newest) + window
    rounds: list[list[Object]] = []
    dated = [(time_of(made), pod) for pod in pods if (made := _made(pod))]
    for when, pod in sorted(dated, key=lambda each: each[0]):
        if when > end:
            rounds.append([pod])
            end = when + ROUND
        elif rounds:
            rounds[-1].append(pod)
    return rounds


def _rounds(counted: CountedPods) -> list[ReplacedPods]:
    """Every remembered round of replaced pods, oldest first."""
    if counted.replaced_after is None:
        return []
    newest = ReplacedPods(
        made_after=counted.replaced_after, restarts=counted.restarts_of_replaced or 0
    )
    return [*(counted.earlier_replaced or ()), newest]


def _needed(rounds: list[ReplacedPods], pods: Sequence[Object]) -> list[ReplacedPods]:
    """Those of which a pod is still there, and the newest."""
    used = {index for pod in pods if (index := _round_of(pod, rounds)) is not None}
    return [each for index, each in enumerate(rounds) if index in used or each is rounds[-1]]


def _round_of(pod: Object, rounds: Sequence[ReplacedPods]) -> int | None:
    made = _made(pod)
    after = [
        index
        for index, each in enumerate(rounds)
        if made and time_of(made) > time_of(each.made_after)
    ]
    return max(after, default=None)


def _settled(counted: CountedPods) -> int:
    """Restarts that were over when all pods last ran, with those by losses since.

    What the other pods tell beyond it came with the loss that is seen next.
    """
    return max(counted.restarts_of_others or 0, counted.restarts_of_replaced or 0)


def _runs_on(pods: Sequence[Object], nodes: int, now: datetime.datetime) -> bool:
    """Whether all pods run, and no trainer ended so lately that a lost pod may not show yet."""
    ended = last_end(pods)
    is_quiet = ended is None or now - ended > QUIET
    return is_quiet and running_count(pods) >= nodes


def _restarts(pod: Object, counted: CountedPods | None) -> int:
    """Restarts of a pod's place in this attempt: its own, and those before it was made again."""
    rounds = _rounds(counted) if counted is not None else []
    index = _round_of(pod, rounds)
    return restart_count([pod]) + (0 if index is None else rounds[index].restarts)


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
