"""The life of an OSFTJob between its acceptance and its end.

Called by decide. `begin` records the first attempt; `follow` makes what is recorded, watches it,
and records the next step: a restart, a suspension, an end. Nothing is deleted before the reason for
it is recorded.
"""

from __future__ import annotations

from osft_operator import attempts, endings, failure, gang, kueue, names, stall
from osft_operator.actions import (
    CreateClaim,
    CreatePyTorchJob,
    DeletePyTorchJob,
    SuspendPyTorchJob,
)
from osft_operator.draft import Draft
from osft_operator.observed import (
    Object,
    find_condition,
    is_deleting,
    is_suspended,
    is_true,
    time_of,
)
from osft_operator.obstacles import LONG_SECONDS, in_the_way, kind_is_missing
from osft_operator.render import checkpoint_claim, pytorch_job
from osft_operator.resolved import Resolved, resolve
from osft_operator.restarts import beyond_budget
from osft_operator.run_policy import RunPolicy
from osft_operator.spec import OSFTJob

QUEUE_SECONDS = 300.0
"""Longest wait between two looks at what Kueue says."""
SHORT_SECONDS = 10.0
"""Until the next look at something that goes away by itself."""
SUSPENDED_BY_USER = "SuspendRequested"


def begin(draft: Draft, job: OSFTJob) -> None:
    """Record the first attempt, once nothing is in its way."""
    if job.spec.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
        return
    draft.condition("Suspended", "False", "NotSuspended")
    resolved = resolve(job, draft.observed.settings)
    if in_the_way(draft, job, resolved, job.metadata.name):
        return
    draft.status["resolved"] = resolved.to_status()
    draft.status["startTime"] = draft.now_text
    attempts.record(draft, 1)
    draft.condition("Running", "False", "Starting", "the PyTorchJob is being made")


def follow(draft: Draft, run: RunPolicy, job: OSFTJob | None) -> None:
    """Do and see what follows from the recorded attempt.

    Args:
        draft: the decision.
        run: what steers the run.
        job: what an attempt is made of; None when none may be made now.
    """
    if job is not None and "resolved" not in draft.status:
        draft.status["resolved"] = resolve(job, draft.observed.settings).to_status()
    name = draft.status["pyTorchJobName"]
    current = draft.observed.job_named(name)
    if current is None and not run.suspend and _past_deadline(draft, run):
        return
    if _earlier_attempts_remain(draft, name):
        return
    if current is not None:
        if (current["metadata"].get("labels") or {}).get(names.JOB_LABEL) != draft.observed.name:
            draft.look_again(SHORT_SECONDS)  # no watch tells of it
        _watch(draft, run, current)
    elif run.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
        draft.condition("Running", "False", "Suspended")
    elif "pyTorchJobUID" in draft.status and not draft.observed.pytorch_job_kind_present:
        # nobody can say whether it is gone
        kind_is_missing(draft)
    elif "pyTorchJobUID" in draft.status:
        _replace_missing(draft, run)
    else:
        _create(draft, job, name)
    if not endings.is_finished(draft.status):
        stall.judge(draft, run)


def _earlier_attempts_remain(draft: Draft, name: str) -> bool:
    """Two attempts never run at once: they would write to one folder."""
    earlier = [job for job in draft.observed.own_jobs() if job["metadata"]["name"] != name]
    for job in earlier:
        if not is_deleting(job):
            draft.do(DeletePyTorchJob(job["metadata"]["name"], job["metadata"].get("uid", "")))
    if earlier:
        draft.look_again(SHORT_SECONDS)
    return bool(earlier)


def _replace_missing(draft: Draft, run: RunPolicy) -> None:
    """The attempt's PyTorchJob was there and is gone: by us to suspend, or by somebody."""
    if draft.recorded("Suspended") == ("True", SUSPENDED_BY_USER):
        draft.condition("Suspended", "False", "Resumed")
        attempts.record(draft, draft.status["attempt"] + 1)
        draft.condition("Running", "False", "Starting", "the PyTorchJob is being made again")
        return
    name = draft.status["pyTorchJobName"]
    why = f"PyTorchJob {name} was deleted by somebody else"
    if not attempts.record_restart(draft, run, why):
        endings.fail(draft, "PyTorchJobDeleted", f"{why}, and no restart is left")


def _create(draft: Draft, job: OSFTJob | None, name: str) -> None:
    if draft.recorded("Suspended")[0] == "True":
        draft.condition("Suspended", "False", "Resumed")
    if job is None:
        return  # the condition Accepted says why, and a changed spec or operator is news
    resolved = Resolved.model_validate(draft.status["resolved"])
    if in_the_way(draft, job, resolved, name) or not attempts.wait_is_over(draft):
        return
    claim = checkpoint_claim(job, resolved)
    if claim is not None and draft.observed.claim is None:
        draft.do(CreateClaim(claim))
    draft.do(CreatePyTorchJob(pytorch_job(job, resolved, draft.status["attempt"])))


def _watch(draft: Draft, run: RunPolicy, current: Object) -> None:
    """The attempt's PyTorchJob is there: its end, its failures, its pods."""
    pods = draft.observed.pods_of(current)
    ended = failure.cause(pods)
    if is_true(current, "Succeeded"):
        endings.complete(draft)
    elif ended is not None and ended.is_final:
        endings.fail_by_pods(draft, pods)
    elif is_deleting(current):
        if not _past_deadline(draft, run):
            _see_off(draft, run)
    elif is_true(current, "Failed"):
        condition = find_condition(current["status"], "Failed")
        why = ended.words() if ended else failure.clean(condition.get("message"))
        if not attempts.record_restart(draft, run, why):
            endings.fail_by_pods(draft, pods, "MaxRestartsExceeded")
    elif beyond_budget(draft.observed.status, draft.status, run.max_restarts):
        recorded = draft.observed.status.get("restarts", 0)
        draft.status["restarts"] = max(recorded, run.max_restarts)
        endings.fail_by_pods(draft, pods, "MaxRestartsExceeded")
    elif not _past_deadline(draft, run):
        _suspend_or_run(draft, run, current, pods)


def _see_off(draft: Draft, run: RunPolicy) -> None:
    draft.condition("Running", "False", "Waiting", "the PyTorchJob is being deleted")
    if run.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")


def _past_deadline(draft: Draft, run: RunPolicy) -> bool:
    """Fail a job that was active for too long; time in a queue or suspended does not count."""
    limit = run.active_deadline_seconds
    if limit is None or find_condition(draft.status, "Suspended")["status"] == "True":
        return False
    resumed = find_condition(draft.status, "Suspended")["lastTransitionTime"]
    since = max(draft.status["startTime"], resumed, key=time_of)
    left = limit - draft.seconds_since(since)
    if left > 0:
        draft.look_again(left)
        return False
    words = f"active for more than spec.activeDeadlineSeconds ({limit} s)"
    endings.fail(draft, "DeadlineExceeded", words)
    return True


def _suspend_or_run(draft: Draft, run: RunPolicy, current: Object, pods: list[Object]) -> None:
    metadata, suspended = current["metadata"], is_suspended(current)
    recorded = draft.recorded("Suspended")
    if run.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
        draft.condition("Running", "False", "Suspended")
        if recorded != ("True", SUSPENDED_BY_USER):
            draft.look_again(0)
        elif run.queue_name is not None:
            # Kueue would take back a suspension; deleting gives the quota back
            draft.do(DeletePyTorchJob(metadata["name"], metadata.get("uid", "")))
        elif not suspended:
            draft.do(SuspendPyTorchJob(metadata["name"], metadata.get("uid", ""), True))
    elif suspended and recorded == ("True", SUSPENDED_BY_USER) and run.queue_name is None:
        draft.do(SuspendPyTorchJob(metadata["name"], metadata.get("uid", ""), False))
    elif suspended:
        words = kueue.words(run.queue_name, draft.observed.workload)
        draft.condition("Suspended", "True", "Queued", words)
        draft.condition("Running", "False", "Waiting")
        # nothing is heard of Workloads, so they are read; less often the longer it takes
        since = find_condition(draft.status, "Suspended")["lastTransitionTime"]
        draft.look_again(min(max(LONG_SECONDS, draft.seconds_since(since) / 4), QUEUE_SECONDS))
    else:
        reason = "Resumed" if recorded[0] == "True" else "NotSuspended"
        if recorded != ("False", "Resumed"):
            draft.condition("Suspended", "False", reason)
        gang.look(draft, run, current, pods)
