"""Notices a run that stands still: pods run, and no step, phase or checkpoint comes.

Called by steps at the end of a pass. The times it compares are recorded in the status, so that an
operator that starts anew neither forgets nor repeats; but before it judges, it listens. Must never
take silence of the network for a run that stands still: what is not heard is said, and nothing is
restarted for it.
"""

from __future__ import annotations

from osft_operator import attempts, endings, sidecars
from osft_operator.draft import Draft
from osft_operator.observed import find_condition, time_of
from osft_operator.readiness import NO_PROGRESS
from osft_operator.run_policy import RunPolicy
from osft_trainer.report import METRICS_PORT, duration

UNWATCHED = ("ManagedElsewhere", sidecars.REASON)
"""Reasons of Running=True with which no progress is to come, or none can be seen."""
LISTEN_SECONDS = 10.0
"""So long the pods are asked in vain before their silence counts."""


def judge(draft: Draft, run: RunPolicy) -> None:
    """Set the condition Stalled, and restart the run where that is asked for."""
    stall = run.stall
    if run.suspend and find_condition(draft.status, "Suspended")["status"] != "True":
        return  # it is on its way to stand still, as it was told to
    running = find_condition(draft.status, "Running")
    here = running["status"] == "True" and running["reason"] not in UNWATCHED
    if stall is None or not here:
        if _is_said(draft):
            draft.condition("Stalled", "False", "NotRunning" if stall else "NotWatched")
        return
    left = stall.timeout_seconds - draft.seconds_since(_since(draft))
    if left > 0:
        if _is_said(draft):
            draft.condition("Stalled", "False", "Progressing", "the run goes on")
        draft.look_again(left)
        return
    unheard = LISTEN_SECONDS - draft.observed.listening_seconds
    # where there is nobody to ask, nothing is waited for
    if draft.observed.progress is None and draft.poll and unheard > 0:
        draft.look_again(unheard)
        return
    words = _words(draft)
    if stall.action == "Restart" and not _was_heard(draft):
        words += "; not restarted, since nothing was ever heard from this attempt"
    elif stall.action == "Restart" and draft.observed.progress is None:
        words += "; not restarted, since nothing is heard from it now"
    elif stall.action == "Restart" and draft.recorded("Stalled") == ("True", NO_PROGRESS):
        _restart(draft, run, words)
        return
    elif stall.action == "Restart":
        draft.look_again(0)
    draft.condition("Stalled", "True", NO_PROGRESS, words)
    if draft.poll:
        draft.waits_for("Pod", draft.poll[0].pod, _since(draft))
    else:
        draft.waits_for("PyTorchJob", draft.status["pyTorchJobName"], _since(draft))


def _is_said(draft: Draft) -> bool:
    """Whether the condition says that the run stands still; it may say other things."""
    stalled = find_condition(draft.status, "Stalled")
    return (stalled["status"], stalled["reason"]) == ("True", NO_PROGRESS)


def _since(draft: Draft) -> str:
    """Since when nothing has come: the last progress, or the time when all pods ran."""
    ran: str = find_condition(draft.status, "Running")["lastTransitionTime"]
    advanced: str = (draft.status.get("progress") or {}).get("advancedTime") or ran
    return max(ran, advanced, key=time_of)


def _was_heard(draft: Draft) -> bool:
    progress = draft.status.get("progress") or {}
    return bool(progress.get("attempt") == draft.status.get("attempt"))


def _words(draft: Draft) -> str:
    still = duration(int(draft.seconds_since(_since(draft))))
    progress = draft.status.get("progress") or {}
    if draft.observed.progress is not None:
        where = f"{progress.get('phase', '')} step {progress.get('step', 0)}".strip()
        return f"no progress for {still}: still at {where}"
    if _was_heard(draft):
        return f"no progress for {still}, and no answer from the pods"
    return (
        f"no progress was heard for {still}: the pods do not answer at port {METRICS_PORT}; does a "
        "NetworkPolicy stand between the operator and them?"
    )


def _restart(draft: Draft, run: RunPolicy, words: str) -> None:
    """The condition was recorded in an earlier pass; now the run starts again."""
    if not attempts.record_restart(draft, run, words):
        draft.condition("Stalled", "True", NO_PROGRESS, words)
        endings.fail(draft, "Stalled", f"{words}, and no restart is left")
        return
    draft.poll = ()
    draft.condition("Stalled", "False", "Restarted", words)
