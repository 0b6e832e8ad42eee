"""Which of the failures of a run explains the others, and which one the status keeps.

Called by status while the recorded status is brought up to date, by steps and endings for words.
When one pod is lost or crashes, the trainers of all others end with words about the network; the
lost pod's own evidence goes with it within a second. So failures are ranked, and the best of a
round stays recorded until the run has gone on. Pure; what a pod tells is read in failure.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from osft_operator import failure
from osft_operator.failure import ABORTED, Ended
from osft_operator.observed import Object, find_condition, time_of
from osft_operator.status_model import FailureStatus
from osft_trainer.report import ExitCode

SAME_ROUND = datetime.timedelta(seconds=120)
"""When one rank dies the others follow within this time, so these failures have one cause."""
LATE_ROUND = datetime.timedelta(minutes=15)
"""Who waits for a dead rank may notice only when a collective or the rendezvous times out."""

FINAL, CAUSE, SYMPTOM = range(3)
"""How much a failure explains: a verdict on the input, an own cause, the loss of another rank."""

_FOLLOWERS = ("TryAgain", "Preempted", "NCCLTimeout")
"""Reasons of trainers to which something happened."""
_SILENT_CODES = (1, int(ExitCode.TRY_AGAIN), int(ExitCode.PREEMPTED))
"""Exit codes that say nothing where no words go with them."""
_NETWORK = re.compile(
    r"(?i)connection (?:\w+ ){0,3}(?:reset|closed|refused|aborted|lost|timed out)|broken pipe"
    r"|socket has timed|timed ?out (?:waiting|after)|by peer|peer (?:is )?gone"
    r"|remote (?:process|peer|server)|ncclRemoteError|ncclSystemError"
    r"|Dist(?:Network|Store)Error|TCPStore|recvValue|sendBytes|Rendezvous\w*(?:Error|Timeout)"
    r"|cannot be retrieved|name or service not known|temporary failure in name resolution"
    r"|ended without a word"
)
"""What a rank says when another one is gone, or the way to it."""


def cause(pods: Sequence[Object], others: Sequence[Ended] = ()) -> Ended | None:
    """The failure that explains the newest round of failures; None when nothing failed.

    Args:
        pods: what is there.
        others: further failures, of pods that are gone.
    """
    found = [*failure.ends(pods), *others]
    if not found:
        return None
    finals = [ended for ended in found if ended.is_final]
    if finals:
        return min(finals, key=_rank)
    newest = max((ended.finished for ended in found if ended.finished), default=None)
    candidates = [*found, *failure.lost(pods)]
    dated = [_dated(ended, newest) for ended in candidates] if newest else candidates
    latest = max(dated, key=_time)
    return min((each for each in dated if _time(latest) - _time(each) <= _reach(latest)), key=_rank)


def known(status: Mapping[str, Any]) -> Ended | None:
    """The failure of the current attempt that the status keeps; None when there is none."""
    recorded = status.get("failure")
    if not recorded or recorded.get("attempt") != status.get("attempt", 1):
        return None
    try:
        kept = FailureStatus.model_validate(recorded)
    except ValidationError:
        return None  # it is found again in the pods, as far as they are there
    return Ended(
        pod=kept.pod or "",
        container=kept.container or "",
        exit_code=kept.exit_code,
        reason=kept.reason,
        message=kept.message,
        finished=time_of(kept.finished_at) if kept.finished_at else None,
    )


def record(
    status: dict[str, Any],
    pods: Sequence[Object],
    now: datetime.datetime,
    *,
    gone: Sequence[Object] = (),
) -> None:
    """Keep in `status.failure` what explains the failures of the current attempt best.

    Args:
        status: the recorded one; changed in place.
        pods: those of the current attempt.
        now: the time, for what has none of its own.
        gone: the last state of pods that failed and were deleted, maybe before anybody looked.
    """
    kept = known(status)
    unjudged = [ended for ended in failure.ends(gone) if _is_unjudged(ended, kept)]
    found = cause(pods, unjudged)
    if found is None:
        return
    if kept is not None and _is_same(found, kept):
        found = _dated(found, kept.finished)
    found = _dated(found, now)
    if kept is None or _replaces(found, kept, find_condition(status, "Running")):
        status["failure"] = found.to_status(status.get("attempt", 1))


def _is_unjudged(ended: Ended, kept: Ended | None) -> bool:
    """Whether a pod that is gone failed since the failure that is kept: else it was weighed."""
    if ended.finished is None or kept is None:
        return ended.finished is not None
    return ended.finished >= _time(kept) and not _is_same(ended, kept)


def _replaces(found: Ended, kept: Ended, running: Object) -> bool:
    """Whether a failure says more about why the run does not go on than the one that is kept."""
    if found.is_final or _is_same(found, kept):
        return True
    passed = _time(found) - _time(kept)
    if passed > datetime.timedelta() and _went_on(found, kept, running):
        return True
    if passed > SAME_ROUND and _weight(found) < SYMPTOM:
        return True
    return -passed <= _reach(kept) and _rank(found) < _rank(kept)


def _went_on(found: Ended, kept: Ended, running: Object) -> bool:
    """Whether all pods ran between two failures, by the recorded condition Running."""
    changed = running.get("lastTransitionTime")
    if not changed:
        return False
    long_after = _time(found) - _time(kept) > SAME_ROUND
    if running.get("status") == "True":
        return long_after or _time(kept) < time_of(changed) <= _time(found)
    # it is False since the first failure after it was True
    return long_after and time_of(changed) - _time(kept) > SAME_ROUND


def _is_same(one: Ended, other: Ended) -> bool:
    same = (one.pod, one.container, one.exit_code) == (other.pod, other.container, other.exit_code)
    return same and one.finished in (None, other.finished)


def _rank(ended: Ended) -> tuple[int, datetime.datetime, str]:
    return _weight(ended), _time(ended), ended.pod


def _weight(ended: Ended) -> int:
    if ended.is_final:
        return FINAL
    if not ended.container:
        return CAUSE  # the cluster's own word on the pod
    is_silent = ended.exit_code in _SILENT_CODES and not ended.message
    follows = ended.reason in _FOLLOWERS or is_silent
    if ended.reason != "OOMKilled" and (follows or ABORTED in ended.message):
        return SYMPTOM
    return SYMPTOM if _NETWORK.search(ended.message) else CAUSE


def _reach(ended: Ended) -> datetime.timedelta:
    """How long before a failure the one may have been that it follows from."""
    return LATE_ROUND if _weight(ended) == SYMPTOM else SAME_ROUND


def _dated(ended: Ended, time: datetime.datetime | None) -> Ended:
    return ended if ended.finished else dataclasses.replace(ended, finished=time)


def _time(ended: Ended) -> datetime.datetime:
    return ended.finished or datetime.datetime.min.replace(tzinfo=datetime.UTC)
