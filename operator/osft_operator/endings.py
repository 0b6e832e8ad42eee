"""How an OSFTJob ends, and what remains to be done once it has.

Called by decide and steps. Once Complete or Failed is recorded nothing changes it again, whatever
happens to the PyTorchJob.
"""

from __future__ import annotations

from typing import Any

from osft_operator.actions import DeleteOSFTJob, DeletePyTorchJob
from osft_operator.causes import known
from osft_operator.draft import Draft
from osft_operator.failure import is_lost
from osft_operator.observed import Object, find_condition, is_deleting, is_true
from osft_operator.predecessors import may_write
from osft_operator.waiting import lost_words


def is_finished(status: Object) -> bool:
    """Whether the end is recorded."""
    return any(
        find_condition(status, kind).get("status") == "True" for kind in ("Complete", "Failed")
    )


def complete(draft: Draft) -> None:
    """The training is done."""
    final = draft.status.get("checkpoint", {}).get("final")
    words = f"the trained model is in {final}" if final else "the training is done"
    draft.condition("Complete", "True", "Done", words)
    _end(draft, "Complete")


def fail(draft: Draft, reason: str, message: str) -> None:
    """The job has failed for good; what still runs is stopped in the next pass."""
    draft.condition("Failed", "True", reason, message)
    _end(draft, "Failed")


def _end(draft: Draft, reason: str) -> None:
    draft.condition("Running", "False", reason)
    stalled = find_condition(draft.status, "Stalled")
    if stalled["status"] == "True":
        # nothing stands still any more; its words stay, as what came before the end
        draft.condition("Stalled", "False", reason, stalled["message"])
    draft.status["completionTime"] = draft.now_text
    draft.look_again(0)


def fail_by_pods(draft: Draft, why: str | None = None) -> None:
    """The job has failed for good, and a pod knows the cause.

    Args:
        draft: the decision.
        why: a reason beyond the pod's own, for instance that no restart is left.
    """
    ended = known(draft.status)
    words = ended.words() if ended is not None else "no pod has said why"
    if why is None:
        fail(draft, ended.reason if ended is not None else "PyTorchJobFailed", words)
    else:
        fail(draft, why, f"{draft.status['restarts']} restarts did not help; {words}")


def after_the_end(draft: Draft) -> None:
    """Stop what still runs, and delete the OSFTJob when its time to live is over."""
    spec: dict[str, Any] = dict(draft.observed.body.get("spec") or {})
    stopping = []
    for job in draft.observed.own_jobs():
        if is_true(job, "Succeeded") or is_true(job, "Failed"):
            continue
        stopping += [pod for pod in draft.observed.pods_of(job) if may_write(pod)]
        if not is_deleting(job):
            draft.do(DeletePyTorchJob(job["metadata"]["name"], job["metadata"].get("uid", "")))
    _say_what_still_runs(draft, stopping)
    ended, ttl = draft.status.get("completionTime"), spec.get("ttlSecondsAfterFinished")
    if ttl is None or ended is None:
        return
    left = float(ttl) - draft.seconds_since(ended)
    if left > 0:
        draft.look_again(left)
    else:
        draft.do(DeleteOSFTJob(draft.observed.uid))


def _say_what_still_runs(draft: Draft, pods: list[Object]) -> None:
    """The end is recorded, and what is to stop holds its GPUs until it has stopped."""
    words = ""
    if pods:
        name = pods[0]["metadata"]["name"]
        since = draft.waits_for("Pod", name, draft.status.get("completionTime"))
        words = f"pod {name} has to end since {since}"
        if is_lost(pods[0]):
            words = lost_words(pods[0])
    draft.condition("Running", "False", find_condition(draft.status, "Running")["reason"], words)
