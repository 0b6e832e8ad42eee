"""What tools that know nothing of OSFTJobs conclude from one: the conditions Ready and Stalled.

Called when a status is done, by whoever made it. kstatus, on which Flux, kpt and others build,
takes Stalled=True for failed, Ready=True for current, and all else for in progress. So Ready
becomes True at the good end only; and Stalled is True of a job that does not go forward by itself:
it stands still (stall says so), it has failed, or it is refused and nothing of it runs. Pure; must
never change what another condition says.
"""

from __future__ import annotations

import datetime
from typing import Any

from osft_operator.observed import Object, find_condition
from osft_operator.status import set_condition, set_phase

NO_PROGRESS = "NoProgress"
"""The reason of Stalled=True for a run that stands still; stall alone sets and ends it."""
MAX_WORDS = 512
"""Longest part of another condition's words that is said again."""


def conclude(status: dict[str, Any], generation: int, now: datetime.datetime) -> None:
    """Set the phase, and what follows from it for others.

    Args:
        status: changed in place; its other conditions are as they are to be.
        generation: of the OSFTJob.
        now: the time.
    """
    set_phase(status)
    stuck, stalled = _stuck(status), find_condition(status, "Stalled")
    if stuck:
        words = _with_before(stuck, stalled)
        set_condition(status, generation, now, "Stalled", "True", stuck["reason"], words)
    elif stalled.get("status") == "True" and stalled["reason"] != NO_PROGRESS:
        set_condition(status, generation, now, "Stalled", "False", "NotYet")
    is_ready = "True" if status["phase"] == "Succeeded" else "False"
    reason = status["reason"] or "NotYet"
    set_condition(status, generation, now, "Ready", is_ready, reason, _words(status))


def _stuck(status: Object) -> Object:
    """The condition by which nothing goes on until a person does something; empty without one."""
    failed, accepted = find_condition(status, "Failed"), find_condition(status, "Accepted")
    if failed.get("status") == "True":
        return failed
    is_refused = accepted.get("status") == "False" and accepted["reason"] != "NotYet"
    return accepted if is_refused and status["phase"] == "Pending" else {}


def _with_before(stuck: Object, stalled: Object) -> str:
    """Its words, and of a failed job those on a run that stood still before."""
    words, before = str(stuck["message"])[:MAX_WORDS], str(stalled.get("message") or "")
    if stuck["type"] != "Failed" or not before or before in words:
        return words
    is_said = (stalled["status"], stalled["reason"]) == ("True", stuck["reason"])
    return before if is_said else f"{words}; before that: {before}"


def _words(status: Object) -> str:
    """Those of the condition that made the phase."""
    for kind in ("Failed", "Complete", "Suspended", "Running", "Stalled", "Accepted"):
        condition = find_condition(status, kind)
        if condition.get("reason") == status["reason"]:
            return str(condition["message"])[:MAX_WORDS]
    return ""
