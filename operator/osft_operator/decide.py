"""What to do next for an OSFTJob, as a pure function of what is recorded and what is seen.

Called by reconcile and by `osft run`. An action follows only from the status that is already
recorded plus what is observed; so a crash between any two writes leads back to the same decision,
nothing is made twice, and nothing that was decided is forgotten. Must never call anything that
reads a clock, the environment or the cluster.
"""

from __future__ import annotations

import datetime

from pydantic import ValidationError

from osft_operator import endings, internal_error, names, policy, steps
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
from osft_operator.observed import (
    Object,
    Observed,
    attempt_of,
    find_condition,
    is_deleting,
    time_of,
)
from osft_operator.obstacles import LONG_SECONDS
from osft_operator.readiness import conclude
from osft_operator.run_policy import RunPolicy
from osft_operator.spec import OSFTJob, problems
from osft_operator.status import CONDITIONS, set_condition
from osft_operator.unknown_fields import shown, unknown_fields

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

DEFINITION_SECONDS = 60.0
"""Wait after a field was not understood: the definition may be on its way."""
REFUSED_SECONDS = 300.0
"""Longest wait after the API server refused something: only a person can change that, or a quota,
and no watch tells of it. It begins with `obstacles.LONG_SECONDS` and grows with the time since."""


def decide(observed: Observed, now: datetime.datetime) -> Decision:
    """One pass: the whole new status, what to do, what to say, and when to look again."""
    draft = Draft(observed, now)
    if is_deleting(observed.body):
        return draft.decision()
    if endings.is_finished(observed.status):
        if draft.recorded("Accepted")[1] == internal_error.REASON:
            draft.condition("Accepted", "True", "SpecValid")
        endings.after_the_end(draft)
        return draft.decision()
    job = _accepted(draft)
    _recover_attempt(draft)
    if "attempt" in draft.status:
        steps.follow(draft, RunPolicy.of(observed.body), job)
    elif job is not None:
        steps.begin(draft, job)
    else:
        draft.waits_for(names.KIND, observed.name)
    return draft.decision()


def _accepted(draft: Draft) -> OSFTJob | None:
    """The job as something may be made of it; None, and a condition, when nothing may.

    What was made before is followed all the same.
    """
    body = draft.observed.body
    try:
        job = OSFTJob.model_validate(body)
    except ValidationError:
        words = problems(body)
        if unknown := unknown_fields(body):
            # what the API server has stored, its definition knows
            words.append(
                f"this operator is older than the OSFTJob's definition: upgrade it, or leave out "
                f"{', '.join(map(shown, unknown))}"
            )
            draft.look_again(DEFINITION_SECONDS)
        draft.condition("Accepted", "False", "InvalidSpec", "; ".join(words))
        return None
    # Wishes are judged before they become pods; what was made is followed, and made again only if
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
    """A status that was lost, whole or in part, is found again in what is there."""
    own = draft.observed.own_jobs()
    if "attempt" not in draft.status and own:
        draft.status["attempt"] = max(max(map(attempt_of, own)), 1)
        draft.status.pop("pyTorchJobName", None)
    if "attempt" in draft.status:
        name = names.attempt_name(draft.observed.name, draft.status["attempt"])
        draft.status.setdefault("pyTorchJobName", name)
        draft.status.setdefault("startTime", draft.now_text)


def refused(decision: Decision, body: Object, message: str, now: datetime.datetime) -> Decision:
    """The decision after the API server refused one of its actions, with its words.

    Args:
        decision: what was to be.
        body: the OSFTJob with the status as it is recorded.
        message: the server's words.
        now: the time.
    """
    recorded, status = body.get("status") or {}, dict(decision.status)
    # The pass took it for accepted; what is recorded says since when it is not.
    before = {kind: find_condition(status, kind) for kind in CONDITIONS}
    before["Accepted"] = find_condition(recorded, "Accepted") or before["Accepted"]
    status["conditions"] = [condition for condition in before.values() if condition]
    generation = body["metadata"].get("generation", 1)
    set_condition(status, generation, now, "Accepted", "False", "Refused", message)
    conclude(status, generation, now)
    told = find_condition(status, "Accepted")
    is_news = any(before["Accepted"].get(part) != told[part] for part in ("reason", "message"))
    # The other conditions are written as decided, and what is written once is news only once.
    thought = find_condition(decision.status, "Accepted")
    about = (thought.get("reason"), thought.get("message"))
    events = [event for event in decision.events if (event.reason, event.message) != about]
    if is_news:
        events.append(Event("Warning", "Refused", message))
    since = (now - time_of(told["lastTransitionTime"])).total_seconds()
    due = min(max(LONG_SECONDS, since / 4), REFUSED_SECONDS)
    if decision.requeue_after is not None:
        # a deadline comes on time also for a job whose pods are refused
        due = min(due, decision.requeue_after)
    return Decision(status, events=tuple(events), requeue_after=due, poll=decision.poll)
