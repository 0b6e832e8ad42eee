"""The life of an OSFTJob between its acceptance and its end.

Called by decide. `begin` records the first attempt; `follow` makes what is recorded, watches it,
and records the next step: a restart, a suspension, an end. Nothing is deleted before the reason for
it is recorded.
"""

from __future__ import annotations

from osft_operator import (
    attempts,
    causes,
    endings,
    failure,
    gang,
    names,
    predecessors,
    sidecars,
    stall,
    suspension,
)
from osft_operator.actions import (
    CreateClaim,
    CreatePyTorchJob,
    DeletePyTorchJob,
)
from osft_operator.draft import Draft
from osft_operator.observed import (
    Object,
    find_condition,
    is_deleting,
    is_suspended,
    is_true,
    replicas,
    time_of,
)
from osft_operator.obstacles import in_the_way, kind_is_missing
from osft_operator.render import checkpoint_claim, pytorch_job
from osft_operator.resolved import Resolved, resolve
from osft_operator.restarts import beyond_budget
from osft_operator.run_policy import RunPolicy
from osft_operator.spec import OSFTJob

MAKING = "the PyTorchJob is being made"
SHORT_SECONDS = 10.0
"""Until the next look at something that goes away by itself."""


def begin(draft: Draft, job: OSFTJob) -> None:
    """Record the first attempt, once nothing is in its way."""
    if job.spec.suspend:
        suspension.done(draft)
        return
    draft.condition("Suspended", "False", "NotSuspended")
    resolved = resolve(job, draft.observed.settings)
    name = names.attempt_name(job.metadata.name, attempts.free(draft, 1))
    if in_the_way(draft, job, resolved, name) or predecessors.are_left(draft, name):
        return
    draft.status["resolved"] = resolved.to_status()
    draft.status["startTime"] = draft.now_text
    attempts.record(draft, 1)
    draft.condition("Running", "False", "Starting", MAKING)


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
    if _earlier_attempts_remain(draft, name) or (
        current is None and run.suspend and predecessors.are_left(draft, name)
    ):
        suspension.under_way(draft, run)
        return
    if current is not None:
        if (current["metadata"].get("labels") or {}).get(names.JOB_LABEL) != draft.observed.name:
            draft.look_again(SHORT_SECONDS)  # no watch tells of it
        _watch(draft, run, current)
    elif run.suspend:
        suspension.done(draft)
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
    going = [job for job in earlier if is_deleting(job)]
    for job in earlier:
        if job not in going:
            draft.do(DeletePyTorchJob(job["metadata"]["name"], job["metadata"].get("uid", "")))
            draft.waits_for("PyTorchJob", name)
            draft.look_again(SHORT_SECONDS)
    if going:
        pods = [pod for job in going for pod in draft.observed.pods_of(job)]
        predecessors.explain(draft, going, pods)
    return bool(earlier)


def _replace_missing(draft: Draft, run: RunPolicy) -> None:
    """The attempt's PyTorchJob was there and is gone: by us to suspend, or by somebody."""
    if suspension.is_users(draft):
        draft.condition("Suspended", "False", "Resumed")
        attempts.record(draft, draft.status["attempt"] + 1)
        draft.condition("Running", "False", "Starting", "the PyTorchJob is being made again")
        return
    name = draft.status["pyTorchJobName"]
    why = f"PyTorchJob {name} was deleted by somebody else"
    if not attempts.record_restart(draft, run, why):
        endings.fail(draft, "PyTorchJobDeleted", f"{why}, and no restart is left")


def _create(draft: Draft, job: OSFTJob | None, name: str) -> None:
    if draft.recorded("Suspended")[0] == "True" or suspension.is_users(draft):
        draft.condition("Suspended", "False", "Resumed")
    if job is None:
        # the condition Accepted says why, and a changed spec or operator is news
        draft.waits_for(names.KIND, draft.observed.name)
        return
    if attempts.pass_by(draft):
        return
    resolved = Resolved.model_validate(draft.status["resolved"])
    if in_the_way(draft, job, resolved, name) or predecessors.are_left(draft, name):
        return
    draft.waits_for("PyTorchJob", name)
    if not attempts.wait_is_over(draft):
        return
    if find_condition(draft.status, "Running")["reason"] not in ("Starting", "Restarting"):
        # what stood in its way does so no more
        draft.condition("Running", "False", "Starting", MAKING)
    claim = checkpoint_claim(job, resolved)
    if claim is not None and draft.observed.claim is None:
        draft.do(CreateClaim(claim))
    draft.do(CreatePyTorchJob(pytorch_job(job, resolved, draft.status["attempt"])))


def _watch(draft: Draft, run: RunPolicy, current: Object) -> None:
    """The attempt's PyTorchJob is there: its end, its failures, its pods."""
    pods = draft.observed.pods_of(current)
    ended = causes.known(draft.status)
    if is_true(current, "Succeeded"):
        endings.complete(draft)
    elif ended is not None and ended.is_final:
        endings.fail_by_pods(draft)
    elif is_deleting(current):
        if not _past_deadline(draft, run):
            _see_off(draft, run, current, pods)
    elif is_true(current, "Failed"):
        condition = find_condition(current["status"], "Failed")
        why = ended.words() if ended else failure.clean(condition.get("message"))
        if not attempts.record_restart(draft, run, why):
            endings.fail_by_pods(draft, "MaxRestartsExceeded")
    elif beyond_budget(draft.observed.status, draft.status, run.max_restarts):
        recorded = draft.observed.status.get("restarts", 0)
        draft.status["restarts"] = max(recorded, run.max_restarts)
        endings.fail_by_pods(draft, "MaxRestartsExceeded")
    elif (left := sidecars.outliving(pods, replicas(current))) is not None:
        _end_beside(draft, left)
    elif not _past_deadline(draft, run):
        _suspend_or_run(draft, run, current, pods)


def _end_beside(draft: Draft, left: sidecars.Outliving) -> None:
    """The training is done; what else runs in its pods gets a while to notice."""
    grace = draft.observed.sidecar_grace_seconds
    waited_since = draft.waits_for("Pod", left.pod, left.since)
    remaining = grace - draft.seconds_since(left.since or waited_since)
    if remaining <= 0:
        endings.complete(draft)
        return
    words = f"{left.words()}; {grace:g} s after its trainers the job ends, and its pods with it"
    draft.condition("Running", "True", sidecars.REASON, words)
    draft.look_again(remaining)


def _see_off(draft: Draft, run: RunPolicy, current: Object, pods: list[Object]) -> None:
    predecessors.explain(draft, [current], pods)
    suspension.under_way(draft, run)
    draft.poll = gang.poll_targets(run, current, pods)


def _past_deadline(draft: Draft, run: RunPolicy) -> bool:
    """Fail a job that was active for too long; time in a queue or suspended does not count."""
    limit = run.active_deadline_seconds
    is_suspended_now = find_condition(draft.status, "Suspended")["status"] == "True"
    if limit is None or run.suspend or is_suspended_now:
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
    if run.suspend:
        suspension.suspend(draft, run, current, pods)
        return
    suspended, recorded = is_suspended(current), draft.recorded("Suspended")
    if suspended and suspension.is_users(draft) and run.queue_name is None:
        suspension.resume(draft, run, current, pods)
    elif suspended:
        suspension.wait_in_queue(draft, run, current)
    else:
        reason = "Resumed" if recorded[0] == "True" else "NotSuspended"
        if recorded != ("False", "Resumed"):
            draft.condition("Suspended", "False", reason)
        gang.look(draft, run, current, pods)
