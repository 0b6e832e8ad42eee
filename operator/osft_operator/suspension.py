"""How a job is suspended and resumed, by its author or by a queue.

Called by steps. The condition Suspended says what is, not what was asked for: it is True once no
pod is left; until then the phase is Suspending. What was asked for is recorded before anything is
done about it. Must never end an attempt or begin another.
"""

from __future__ import annotations

from osft_operator import gang, kueue, names, predecessors
from osft_operator.actions import DeletePyTorchJob, SuspendPyTorchJob
from osft_operator.draft import Draft
from osft_operator.observed import (
    Object,
    find_condition,
    is_suspended,
    is_true,
    managed_elsewhere,
)
from osft_operator.obstacles import LONG_SECONDS
from osft_operator.run_policy import RunPolicy
from osft_operator.status import SUSPENDING

QUEUE_SECONDS = 300.0
"""Longest wait between two looks at what Kueue says."""
BY_USER = "SuspendRequested"
ASKED = "spec.suspend is true"


def is_users(draft: Draft) -> bool:
    """Whether the recorded suspension, done or under way, is the author's and no queue's."""
    return draft.recorded("Suspended") in (("True", BY_USER), ("False", SUSPENDING))


def done(draft: Draft) -> None:
    """Nothing runs, and nothing will until the author says so."""
    draft.waits_for(names.KIND, draft.observed.name)
    draft.condition("Suspended", "True", BY_USER, ASKED)
    draft.condition("Running", "False", "Suspended")


def under_way(draft: Draft, run: RunPolicy) -> None:
    """Pods of before still end, which another condition explains."""
    if run.suspend:
        why = find_condition(draft.status, "Running")["message"]
        draft.condition("Suspended", "False", SUSPENDING, f"{ASKED}: {why}")
    elif draft.recorded("Suspended") == ("False", SUSPENDING):
        words = "spec.suspend is false again: the job goes on once its pods of before have ended"
        draft.condition("Suspended", "False", SUSPENDING, words)


def suspend(draft: Draft, run: RunPolicy, current: Object, pods: list[Object]) -> None:
    """The author wants the job to stand still."""
    metadata, suspended = current["metadata"], is_suspended(current)
    left = [pod for pod in pods if predecessors.may_write(pod)]
    if suspended and left:
        predecessors.explain(draft, [current], left)
        under_way(draft, run)
    elif suspended and not (managed_elsewhere(current) and is_true(current, "Running")):
        done(draft)
    else:
        draft.waits_for("PyTorchJob", metadata["name"])
        words = f"{ASKED}: PyTorchJob {metadata['name']} is to stop its pods"
        draft.condition("Suspended", "False", SUSPENDING, words)
    draft.poll = gang.poll_targets(run, current, pods)
    if not is_users(draft):
        draft.look_again(0)
    elif run.queue_name is not None:
        # Kueue would take back a suspension; deleting gives the quota back
        draft.do(DeletePyTorchJob(metadata["name"], metadata.get("uid", "")))
    elif not suspended:
        draft.do(SuspendPyTorchJob(metadata["name"], metadata.get("uid", ""), True))


def resume(draft: Draft, run: RunPolicy, current: Object, pods: list[Object]) -> None:
    """The author wants a PyTorchJob to go on that was suspended for him."""
    if any(map(predecessors.may_write, pods)):
        # the pods to come would meet those that still save
        predecessors.explain(draft, [current], pods)
        under_way(draft, run)
        return
    name = current["metadata"]["name"]
    draft.waits_for("PyTorchJob", name)
    words = f"spec.suspend is false again: PyTorchJob {name} is to go on"
    draft.condition("Suspended", "True", BY_USER, words)
    draft.condition("Running", "False", "Suspended")
    draft.do(SuspendPyTorchJob(name, current["metadata"].get("uid", ""), False))


def wait_in_queue(draft: Draft, run: RunPolicy, current: Object) -> None:
    """Somebody else suspended the PyTorchJob: Kueue, where there is a queue."""
    words = kueue.words(run.queue_name, draft.observed.workload)
    draft.waits_for(*kueue.waits_for(run.queue_name, draft.observed.workload, current))
    draft.condition("Suspended", "True", "Queued", words)
    draft.condition("Running", "False", "Waiting")
    # nothing is heard of Workloads, so they are read; less often the longer it takes
    since = find_condition(draft.status, "Suspended")["lastTransitionTime"]
    draft.look_again(min(max(LONG_SECONDS, draft.seconds_since(since) / 4), QUEUE_SECONDS))
