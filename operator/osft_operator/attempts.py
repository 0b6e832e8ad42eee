"""Records the next attempt of a run, and holds it back for a while after failures.

Called by steps and stall. An attempt is recorded before its PyTorchJob is made, with the time from
which it may be: an operator that starts anew waits no longer and no less. Must never make or
delete anything itself.
"""

from __future__ import annotations

import datetime

from osft_operator import names
from osft_operator.draft import Draft
from osft_operator.observed import another_job, find_condition, text_of
from osft_operator.restarts import wait_seconds
from osft_operator.run_policy import RunPolicy
from osft_trainer.report import duration


def free(draft: Draft, attempt: int) -> int:
    """The first attempt from this one on whose name is not that of another's PyTorchJob.

    `x-a2` is the name of the second attempt of job `x`, and of the first of job `x-a2`. What else
    has a name that was chosen for a job is for its author to know, before anything is done.
    """
    observed, name = draft.observed, draft.observed.name
    for each in range(attempt, names.MAX_ATTEMPT):
        stranger = observed.stranger_named(names.attempt_name(name, each))
        if stranger is None or not observed.is_anothers(stranger):
            return each
        if each == 1 and another_job(stranger, name) is None:
            return each
    return names.MAX_ATTEMPT


def pass_by(draft: Draft) -> bool:
    """Record another number for an attempt whose name was taken since; whether it was."""
    attempt, due = draft.status["attempt"], draft.status.get("nextAttemptTime")
    if free(draft, attempt) == attempt:
        return False
    record(draft, attempt)
    if due is not None:
        draft.status["nextAttemptTime"] = due
    return True


def record(draft: Draft, attempt: int) -> None:
    """Record an attempt that is no restart: the first, or one after a suspension.

    Args:
        draft: the decision.
        attempt: its number, or the next one whose name is free.
    """
    attempt = free(draft, attempt)
    draft.status["attempt"] = attempt
    draft.status["pyTorchJobName"] = names.attempt_name(draft.observed.name, attempt)
    draft.status["restartsBeforeAttempt"] = draft.status["restarts"]
    for field in ("pyTorchJobUID", "countedPods", "nextAttemptTime"):
        draft.status.pop(field, None)
    draft.waits_for("PyTorchJob", draft.status["pyTorchJobName"])
    draft.look_again(0)


def record_restart(draft: Draft, run: RunPolicy, why: str) -> bool:
    """Record one more attempt that counts as a restart; False when none is left."""
    if draft.status["restarts"] + 1 > run.max_restarts:
        return False
    draft.status["restarts"] += 1
    record(draft, draft.status["attempt"] + 1)
    wait = wait_seconds(draft.status["restarts"])
    if wait:
        due = draft.now + datetime.timedelta(seconds=wait)
        draft.status["nextAttemptTime"] = text_of(due)
        why = f"attempt {draft.status['attempt']} follows in {duration(int(wait))}; {why}"
    draft.condition("Running", "False", "Restarting", why)
    return True


def wait_is_over(draft: Draft) -> bool:
    """Whether the recorded attempt may be made now; if not, there will be another look."""
    due = draft.status.get("nextAttemptTime")
    left = 0.0 if due is None else -draft.seconds_since(due)
    if left > 0:
        draft.look_again(left)
        if find_condition(draft.status, "Running")["reason"] != "Restarting":
            words = f"attempt {draft.status['attempt']} follows at {due}"
            draft.condition("Running", "False", "Restarting", words)
    return left <= 0
