"""What is left of earlier attempts, and of earlier runs in the same folder: PyTorchJobs and pods.

Called by steps before an attempt is recorded, made or resumed. Two attempts never run at once: they
would write to one folder, and the newer one's mark in it would refuse the save that the older one
makes while it ends. So pods count, not the PyTorchJob that made them, which goes before they do;
and those of an OSFTJob of this name that was deleted count as well. Pure: it says what is waited
for, since when, and what helps. Must never end a pod by force: of one whose node does not answer
nobody here can say whether it still writes.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from osft_operator import names
from osft_operator.draft import Draft
from osft_operator.failure import is_lost
from osft_operator.observed import (
    Object,
    Observed,
    controller,
    find_condition,
    is_deleting,
    is_true,
    text_of,
    time_of,
)
from osft_operator.waiting import lost_words

SHORT_SECONDS = 10.0
"""Until the next look at something that goes away by itself."""
LONG_SECONDS = 30.0
"""Until the next look at another job's pods."""
OVERDUE_SECONDS = 60.0
"""A pod that is there so long after the end of its grace period does not end by itself."""
FOR_ITS_AUTHOR = frozenset({"PodsNotEnding", "FolderInUse"})
"""Reasons that whoever made the job must see to."""


def are_left(draft: Draft, name: str) -> bool:
    """Say what an attempt has to wait for, if anything is left that may write to its folder.

    Args:
        draft: the decision.
        name: of the attempt's PyTorchJob, which is not there.
    """
    jobs, pods = _jobs(draft.observed, name), _pods(draft.observed)
    others = list(filter(may_write, draft.observed.neighbours))
    pods += filter(is_deleting, others)
    if jobs or pods:
        explain(draft, jobs, pods)
    elif others:
        _explain_use(draft, others[0])
    return bool(jobs or pods or others)


def explain(draft: Draft, jobs: Sequence[Object], pods: Sequence[Object]) -> None:
    """Say which of these has to go, since when it does, and what helps if it does not."""
    draft.look_again(SHORT_SECONDS)
    found = sorted(filter(may_write, pods), key=lambda pod: (is_deleting(pod), not is_lost(pod)))
    if not found:
        _explain_job(draft, jobs[0])
        return
    pod, more = found[0], len(found) - 1
    name, asked = pod["metadata"]["name"], _told_to_end(pod)
    since = draft.waits_for("Pod", name, asked)
    if is_lost(pod) or _is_overdue(pod, draft.now):
        reason, words = "NodeLost", lost_words(pod)
    elif is_deleting(pod):
        until = pod["metadata"]["deletionTimestamp"]
        reason, words = "PodsStopping", f"pod {name} ends since {asked}, and may save until {until}"
    elif draft.seconds_since(since) <= OVERDUE_SECONDS:
        reason, words = "PodsStopping", f"pod {name} has to end first, since {since}"
    else:
        reason, words = "PodsNotEnding", _nobody_ends(pod, jobs)
    others = f" ({more} more wait to end)" if more else ""
    words = f"{words}{others}; no attempt is made beside it, since both would write to one folder"
    draft.condition("Running", "False", reason, words)


def may_write(pod: Object) -> bool:
    """Whether something of the pod may still run."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def is_of_earlier_run(observed: Observed, job: Object) -> bool:
    """Whether a PyTorchJob was made for a deleted OSFTJob of this name."""
    owner, labels = controller(job), job["metadata"].get("labels") or {}
    return (
        labels.get(names.JOB_LABEL) == observed.name
        and owner.get("kind") == names.KIND
        and owner.get("name") == observed.name
        and owner.get("uid") != observed.uid
    )


def _pods(observed: Observed) -> list[Object]:
    """The pods of any attempt; what else bears the job's label is none of ours."""
    return [
        pod
        for pod in observed.pods
        if may_write(pod) and names.ATTEMPT_LABEL in (pod["metadata"].get("labels") or {})
    ]


def _jobs(observed: Observed, name: str) -> list[Object]:
    """The PyTorchJobs of an earlier run that can still have pods, or have this attempt's name."""
    own = observed.own_jobs()
    return [
        job
        for job in observed.pytorch_jobs
        if job not in own
        and is_of_earlier_run(observed, job)
        and (job["metadata"]["name"] == name or not _is_over(job))
    ]


def _is_over(job: Object) -> bool:
    return is_true(job, "Succeeded") or is_true(job, "Failed")


def _explain_job(draft: Draft, job: Object) -> None:
    metadata = job["metadata"]
    name, asked = metadata["name"], metadata.get("deletionTimestamp")
    is_told = find_condition(draft.status, "Running")["reason"] in ("Starting", "Restarting")
    if is_told and asked and draft.seconds_since(asked) < SHORT_SECONDS:
        # on its way, which is worth no write
        draft.waits_for("PyTorchJob", draft.status["pyTorchJobName"])
        return
    since = draft.waits_for("PyTorchJob", name, asked)
    holders = [each for each in metadata.get("finalizers") or [] if each != "foregroundDeletion"]
    words = f"PyTorchJob {name} is being deleted since {since}"
    if holders:
        words += f"; it goes when its finalizers are done: {', '.join(holders)}"
    elif not asked:
        words = (
            f"PyTorchJob {name} of an earlier run is there since {since}; the cluster deletes it"
        )
    draft.condition("Running", "False", "Waiting", words)


def _explain_use(draft: Draft, pod: Object) -> None:
    name = pod["metadata"]["name"]
    other = (pod["metadata"].get("labels") or {}).get(names.JOB_LABEL)
    draft.waits_for("Pod", name)
    words = (
        f"pod {name} of OSFTJob {other} writes to this job's folder (spec.training.ckptOutputDir), "
        "on the same claim: wait until it has ended, or give this job a folder of its own"
    )
    draft.condition("Running", "False", "FolderInUse", words)
    draft.look_again(LONG_SECONDS)


def _told_to_end(pod: Object) -> str | None:
    """When a pod that is being deleted was told to end."""
    metadata = pod["metadata"]
    if not is_deleting(pod):
        return None
    grace = datetime.timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    return text_of(time_of(metadata["deletionTimestamp"]) - grace)


def _is_overdue(pod: Object, now: datetime.datetime) -> bool:
    if not is_deleting(pod):
        return False
    late = now - time_of(pod["metadata"]["deletionTimestamp"])
    return late.total_seconds() > OVERDUE_SECONDS


def _nobody_ends(pod: Object, jobs: Sequence[Object]) -> str:
    """What may help where a pod runs on and is not even being deleted."""
    owner, name = controller(pod), pod["metadata"]["name"]
    if not owner:
        return f"pod {name} of an earlier attempt or run has no owner any more: delete it"
    whose = f"{owner.get('kind')} {owner.get('name')}"
    if any(job["metadata"].get("uid") == owner.get("uid") for job in jobs):
        cure = "do the training-operator and the cluster's garbage collector run?"
        return f"pod {name} of {whose} runs on, though it is to end: {cure}"
    return (
        f"pod {name} of {whose}, of an earlier attempt or run, runs on: delete {whose}, or the pod "
        "if that is gone"
    )
