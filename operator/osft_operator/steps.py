"""The life of an OSFTJob between its acceptance and its end.

Called by decide. `begin` records the first attempt; `follow` makes what is recorded, watches it,
and records the next step: a restart, a suspension, an end. Nothing is deleted before the reason for
it is recorded.
"""

from __future__ import annotations

from osft_operator import endings, failure, names
from osft_operator.actions import (
    CreateClaim,
    CreatePyTorchJob,
    DeletePyTorchJob,
    Event,
    PollTarget,
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
from osft_operator.obstacles import LONG_SECONDS, in_the_way
from osft_operator.render import checkpoint_claim, pytorch_job
from osft_operator.resolved import Resolved, resolve
from osft_operator.spec import OSFTJob
from osft_trainer.report import METRICS_PORT

PODS_MISSING_SECONDS = 60.0
"""After so long without pods, something is wrong."""
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
    _record_attempt(draft, 1)
    draft.condition("Running", "False", "Starting", "the PyTorchJob is being made")


def follow(draft: Draft, job: OSFTJob) -> None:
    """Do and see what follows from the recorded attempt."""
    if "resolved" in draft.status:
        resolved = Resolved.model_validate(draft.status["resolved"])
    else:
        resolved = resolve(job, draft.observed.settings)
        draft.status["resolved"] = resolved.to_status()
    name = draft.status["pyTorchJobName"]
    if _earlier_attempts_remain(draft, name):
        return
    current = draft.observed.job_named(name)
    if current is not None:
        _watch(draft, job, resolved, current)
    elif job.spec.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
        draft.condition("Running", "False", "Suspended")
    elif "pyTorchJobUID" in draft.status:
        _replace_missing(draft, job)
    else:
        _create(draft, job, resolved, name)


def _record_attempt(draft: Draft, attempt: int) -> None:
    draft.status["attempt"] = attempt
    draft.status["pyTorchJobName"] = names.attempt_name(draft.observed.name, attempt)
    draft.status["restartsBeforeAttempt"] = draft.status["restarts"]
    draft.status.pop("pyTorchJobUID", None)
    draft.look_again(0)


def _next_attempt(draft: Draft, job: OSFTJob, why: str) -> bool:
    """Record one more attempt that counts as a restart; False when none is left."""
    if draft.status["restarts"] + 1 > job.spec.max_restarts:
        return False
    draft.status["restarts"] += 1
    _record_attempt(draft, draft.status["attempt"] + 1)
    draft.condition("Running", "False", "Restarting", why)
    return True


def _earlier_attempts_remain(draft: Draft, name: str) -> bool:
    """Two attempts never run at once: they would write to one folder."""
    earlier = [job for job in draft.observed.own_jobs() if job["metadata"]["name"] != name]
    for job in earlier:
        if not is_deleting(job):
            draft.do(DeletePyTorchJob(job["metadata"]["name"], job["metadata"].get("uid", "")))
    if earlier:
        draft.look_again(SHORT_SECONDS)
    return bool(earlier)


def _replace_missing(draft: Draft, job: OSFTJob) -> None:
    """The attempt's PyTorchJob was there and is gone: by us to suspend, or by somebody."""
    if draft.recorded("Suspended") == ("True", SUSPENDED_BY_USER):
        draft.condition("Suspended", "False", "Resumed")
        _record_attempt(draft, draft.status["attempt"] + 1)
        draft.condition("Running", "False", "Starting", "the PyTorchJob is being made again")
        return
    name = draft.status["pyTorchJobName"]
    why = f"PyTorchJob {name} was deleted by somebody else"
    if not _next_attempt(draft, job, why):
        endings.fail(draft, "PyTorchJobDeleted", f"{why}, and no restart is left")


def _create(draft: Draft, job: OSFTJob, resolved: Resolved, name: str) -> None:
    if draft.recorded("Suspended")[0] == "True":
        draft.condition("Suspended", "False", "Resumed")
    if in_the_way(draft, job, resolved, name):
        return
    claim = checkpoint_claim(job, resolved)
    if claim is not None and draft.observed.claim is None:
        draft.do(CreateClaim(claim))
        words = f"made claim {resolved.checkpoint_claim} for checkpoints"
        draft.events.append(Event("Normal", "CheckpointClaimCreated", words))
    attempt = draft.status["attempt"]
    draft.do(CreatePyTorchJob(pytorch_job(job, resolved, attempt)))
    draft.events.append(Event("Normal", "PyTorchJobCreated", f"made PyTorchJob {name}"))


def _watch(draft: Draft, job: OSFTJob, resolved: Resolved, current: Object) -> None:
    """The attempt's PyTorchJob is there: its end, its failures, its pods."""
    draft.condition("Accepted", "True", "SpecValid")
    pods = draft.observed.pods_of(current)
    ended = failure.cause(pods)
    if is_true(current, "Succeeded"):
        endings.complete(draft)
    elif is_deleting(current):
        draft.condition("Running", "False", "Waiting", "the PyTorchJob is being deleted")
        if job.spec.suspend:
            draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
    elif ended is not None and ended.is_final:
        endings.fail_by_pods(draft, pods)
    elif is_true(current, "Failed"):
        condition = find_condition(current["status"], "Failed")
        why = ended.words() if ended else failure.clean(condition.get("message"))
        if not _next_attempt(draft, job, why):
            endings.fail_by_pods(draft, pods, "MaxRestartsExceeded")
    elif draft.status["restarts"] > job.spec.max_restarts:
        draft.status["restarts"] = job.spec.max_restarts
        endings.fail_by_pods(draft, pods, "MaxRestartsExceeded")
    elif not _past_deadline(draft, job):
        _suspend_or_run(draft, job, resolved, current, pods)


def _past_deadline(draft: Draft, job: OSFTJob) -> bool:
    """Fail a job that was active for too long; time in a queue or suspended does not count."""
    limit = job.spec.active_deadline_seconds
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


def _suspend_or_run(
    draft: Draft, job: OSFTJob, resolved: Resolved, current: Object, pods: list[Object]
) -> None:
    metadata, suspended = current["metadata"], is_suspended(current)
    recorded = draft.recorded("Suspended")
    if job.spec.suspend:
        draft.condition("Suspended", "True", SUSPENDED_BY_USER, "spec.suspend is true")
        draft.condition("Running", "False", "Suspended")
        if recorded != ("True", SUSPENDED_BY_USER):
            draft.look_again(0)
        elif job.queue_name is not None:
            # Kueue would take back a suspension; deleting gives the quota back
            draft.do(DeletePyTorchJob(metadata["name"], metadata.get("uid", "")))
        elif not suspended:
            draft.do(SuspendPyTorchJob(metadata["name"], metadata.get("uid", ""), True))
    elif suspended and recorded == ("True", SUSPENDED_BY_USER) and job.queue_name is None:
        draft.do(SuspendPyTorchJob(metadata["name"], metadata.get("uid", ""), False))
    elif suspended:
        queue = f"queue {job.queue_name}" if job.queue_name else "whoever suspended the PyTorchJob"
        draft.condition("Suspended", "True", "Queued", f"waits for {queue}")
        draft.condition("Running", "False", "Waiting")
    else:
        reason = "Resumed" if recorded[0] == "True" else "NotSuspended"
        if recorded != ("False", "Resumed"):
            draft.condition("Suspended", "False", reason)
        _look_at_pods(draft, job, resolved, current, pods)


def _look_at_pods(
    draft: Draft, job: OSFTJob, resolved: Resolved, current: Object, pods: list[Object]
) -> None:
    """Whether all pods run, and if not, why."""
    running, nodes = failure.running_count(pods), resolved.nnodes
    count = f"{running} of {nodes} pods run"
    if running >= nodes:
        draft.condition("Running", "True", "PodsRunning", count)
    elif (trouble := failure.waiting(pods)) is not None:
        draft.condition("Running", "False", *trouble)
    elif failure.is_restarting(pods) or is_true(current, "Restarting"):
        ended = failure.cause(pods)
        draft.condition("Running", "False", "Restarting", ended.words() if ended else count)
    elif not pods:
        _without_pods(draft, current)
    elif draft.recorded("Running")[1] != "Restarting":
        draft.condition("Running", "False", "PodsStarting", count)
    draft.poll = _poll_targets(job, pods)


def _without_pods(draft: Draft, current: Object) -> None:
    made = current["metadata"].get("creationTimestamp", draft.now_text)
    left = PODS_MISSING_SECONDS - draft.seconds_since(made)
    if left > 0:
        draft.look_again(left)
        draft.condition("Running", "False", "PodsStarting", "no pod has been made yet")
        return
    event = failure.clean(draft.observed.newest_event) or (
        "nothing is known about why; is the training-operator running?"
    )
    draft.condition("Running", "False", "PodsNotCreated", event)
    draft.look_again(LONG_SECONDS)


def _poll_targets(job: OSFTJob, pods: list[Object]) -> tuple[PollTarget, ...]:
    """Rank 0's pod; with c10d any pod may have it."""
    found = []
    for pod in pods:
        status, labels = pod.get("status") or {}, pod["metadata"].get("labels") or {}
        first = labels.get("training.kubeflow.org/job-role") == "master"
        wanted = first or job.spec.rendezvous.backend == "c10d"
        if wanted and status.get("phase") == "Running" and status.get("podIP"):
            found.append(PollTarget(pod["metadata"]["name"], status["podIP"], METRICS_PORT))
    return tuple(found)
