"""What a job's status says of a call that the API server did not take, in the server's words.

Called by reconcile. A refusal (4xx) is said at once and is decide's; any other failure only when it
comes again, since most go by. The words go to the condition that the call was to change, which
keeps saying what is. Pure; must never decide whether a call is tried again.
"""

from __future__ import annotations

import copy
import datetime
from typing import Any

from osft_operator import names
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
from osft_operator.endings import is_finished
from osft_operator.observed import Object, Observed, find_condition, text_of
from osft_operator.readiness import conclude
from osft_operator.status import (
    SUSPENDING,
    WRITE_FAILED,
    derive,
    set_condition,
    wait_for,
)

TRIES = 3
"""So many tries in a row fail before the job's author is told: a few seconds."""
READ_FAILED = "ReadFailed"

Status = dict[str, Any]


def not_done(
    decision: Decision, body: Object, action: Action, message: str, now: datetime.datetime
) -> Decision:
    """The decision after one of its actions failed again.

    Args:
        decision: what was to be.
        body: the OSFTJob with the status as it is recorded.
        action: what failed.
        message: the server's words, or what is known where it gave none.
        now: the time.
    """
    kind, name, done = _about(action, body)
    status = copy.deepcopy(decision.status)
    if not isinstance(action, DeleteOSFTJob):
        wait_for(status, body.get("status") or {}, kind, name, text_of(now))
    lead = f"{kind} {name} could not be {done}"
    event = _say(status, body, WRITE_FAILED, lead, message, now)
    events = (*decision.events, *event)
    return Decision(status, (), events, decision.requeue_after, decision.poll)


def not_read(observed: Observed, message: str, now: datetime.datetime) -> Decision:
    """What can be said of a job of which something could not be read again.

    Args:
        observed: the OSFTJob alone, with the status as it is recorded.
        message: the server's words.
        now: the time.
    """
    status = derive(observed, now)
    lead = "what the job needs could not be read"
    events = _say(status, observed.body, READ_FAILED, lead, message, now)
    return Decision(status, events=tuple(events))


def _say(
    status: Status,
    body: Object,
    reason: str,
    lead: str,
    message: str,
    now: datetime.datetime,
) -> list[Event]:
    """Put the words where they belong; the event, when they were not there before."""
    running, suspended = (find_condition(status, kind) for kind in ("Running", "Suspended"))
    by_user = suspended.get("reason") in (SUSPENDING, "SuspendRequested")
    about = suspended if by_user and not is_finished(status) else running
    kept = about is suspended or is_finished(status) or running.get("status") == "True"
    words = f"{lead}; it is tried again: {message}"
    generation = body["metadata"].get("generation", 1)
    set_condition(
        status,
        generation,
        now,
        about["type"],
        about["status"],
        about["reason"] if kept else reason,
        words,
    )
    conclude(status, generation, now)
    recorded = find_condition(body.get("status") or {}, about["type"])
    is_news = not str(recorded.get("message") or "").startswith(lead)
    return [Event("Warning", reason, words)] if is_news else []


def _about(action: Action, body: Object) -> tuple[str, str, str]:
    """Kind and name of the object, and what was to be done with it."""
    match action:
        case CreateClaim(manifest):
            return "PersistentVolumeClaim", manifest["metadata"]["name"], "made"
        case CreatePyTorchJob(manifest):
            return names.PYTORCH_JOB_KIND, manifest["metadata"]["name"], "made"
        case SuspendPyTorchJob(name, _, suspend):
            return names.PYTORCH_JOB_KIND, name, "suspended" if suspend else "resumed"
        case DeletePyTorchJob(name, _):
            return names.PYTORCH_JOB_KIND, name, "deleted"
        case DeleteOSFTJob(_):
            return names.KIND, str(body["metadata"]["name"]), "deleted"
