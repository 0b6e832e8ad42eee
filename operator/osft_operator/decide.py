"""What to do next for an OSFTJob, as a pure function of what is recorded and what is seen.

Called by reconcile and by `osft run`. An action follows only from the status that is already
recorded plus what is observed; so a crash between any two writes leads back to the same decision,
nothing is made twice, and nothing that was decided is forgotten. Must never call anything that
reads a clock, the environment or the cluster.
"""

from __future__ import annotations

import datetime

from pydantic import ValidationError

from osft_operator import endings, names, policy, steps
from osft_operator.actions import (
    Action,
    CreateClaim,
    CreatePyTorchJob,
    Decision,
    DeleteOSFTJob,
    DeletePyTorchJob,
    Event,
    PollTarget,
    SuspendPyTorchJob,
)
from osft_operator.draft import Draft
from osft_operator.observed import Observed, attempt_of, find_condition, is_deleting
from osft_operator.spec import OSFTJob, problems
from osft_operator.status import Status, set_condition, set_phase

__all__ = [
    "Action",
    "CreateClaim",
    "CreatePyTorchJob",
    "Decision",
    "DeleteOSFTJob",
    "DeletePyTorchJob",
    "Event",
    "PollTarget",
    "SuspendPyTorchJob",
    "decide",
    "refused",
]


def decide(observed: Observed, now: datetime.datetime) -> Decision:
    """One pass: the whole new status, what to do, what to say, and when to look again."""
    draft = Draft(observed, now)
    if is_deleting(observed.body):
        return draft.decision()
    if endings.is_finished(observed.status):
        endings.after_the_end(draft)
        return draft.decision()
    job = _accepted(draft)
    if job is None:
        return draft.decision()
    _recover_attempt(draft)
    if "attempt" in draft.status:
        steps.follow(draft, job)
    else:
        steps.begin(draft, job)
    return draft.decision()


def _accepted(draft: Draft) -> OSFTJob | None:
    """The typed job; None, and a condition that names the fields, when it is not right."""
    body = draft.observed.body
    try:
        job = OSFTJob.model_validate(body)
    except ValidationError:
        draft.condition("Accepted", "False", "InvalidSpec", "; ".join(problems(body)))
        return None
    # Wishes are judged before they become pods; what was made is followed, and restarted only if
    # they are still allowed. Nothing is made while something of ours is there.
    is_due = not draft.observed.own_jobs()
    if is_due and (denied := policy.denials(job, draft.observed.settings)):
        draft.condition("Accepted", "False", "Denied", "; ".join(map(str, denied)))
        return None
    recorded = find_condition(draft.observed.status, "Accepted")
    refused_before = recorded.get("reason") == "Refused" and "pyTorchJobUID" not in draft.status
    if not refused_before:
        # else it stays as it is until the API server takes what it refused
        draft.condition("Accepted", "True", "SpecValid")
    return job


def _recover_attempt(draft: Draft) -> None:
    """A status that was lost is found again in the PyTorchJobs that are there."""
    own = draft.observed.own_jobs()
    if "attempt" in draft.status or not own:
        return
    attempt = max(max(map(attempt_of, own)), 1)
    draft.status["attempt"] = attempt
    draft.status["pyTorchJobName"] = names.attempt_name(draft.observed.name, attempt)
    draft.status.setdefault("startTime", draft.now_text)


def refused(status: Status, message: str, now: datetime.datetime, generation: int) -> Status:
    """The status after the API server refused an action, with its words."""
    result = dict(status)
    set_condition(result, generation, now, "Accepted", "False", "Refused", message)
    set_phase(result)
    return result
