"""How the pods of an attempt are doing: whether all run, if not why, and which of them to ask.

Called by steps for a PyTorchJob that is not suspended. Writes only the condition Running; must
never end an attempt or begin another.
"""

from __future__ import annotations

from osft_operator import causes, failure, missing_pods, names, waiting
from osft_operator.actions import PollTarget
from osft_operator.draft import Draft
from osft_operator.observed import (
    Object,
    Said,
    find_condition,
    is_true,
    managed_elsewhere,
    replicas,
)
from osft_operator.obstacles import LONG_SECONDS
from osft_operator.run_policy import RunPolicy
from osft_trainer.report import METRICS_PORT


def look(draft: Draft, run: RunPolicy, current: Object, pods: list[Object]) -> None:
    """Say whether all pods run, and if not, why."""
    if manager := managed_elsewhere(current):
        _follow_manager(draft, current, manager)
        return
    running, nodes = failure.running_count(pods), replicas(current)
    count = f"{running} of {nodes} pods run"
    if running >= nodes:
        draft.condition("Running", "True", "PodsRunning", count)
    else:
        trouble = _trouble(draft, pods)
        if missing_pods.count(current, pods):
            _say_what_is_missing(draft, current, pods, trouble)
        elif trouble is not None:
            draft.condition("Running", "False", trouble.reason, trouble.words)
            draft.waits_for(trouble.kind, trouble.name, trouble.since)
            draft.look_again(LONG_SECONDS)
        else:
            _say_which_start(draft, current, pods, count)
    draft.poll = poll_targets(run, current, pods)


def _say_which_start(draft: Draft, current: Object, pods: list[Object], count: str) -> None:
    """Nothing is known to be wrong: a pod is young, or its trainer is started again."""
    late = [pod for pod in pods if not failure.running_count([pod])]
    if late:
        draft.waits_for("Pod", late[0]["metadata"]["name"])
    else:
        draft.waits_for("PyTorchJob", current["metadata"]["name"])
    ended = causes.known(draft.status)
    if failure.is_restarting(pods) or is_true(current, "Restarting"):
        draft.condition("Running", "False", "Restarting", ended.words() if ended else count)
    elif draft.recorded("Running")[1] == "Restarting":
        # still the way back to where it was, and not the words of what happened before it
        draft.condition("Running", "False", "Restarting", count)
    else:
        draft.condition("Running", "False", "PodsStarting", count)
    draft.look_again(LONG_SECONDS)


def _trouble(draft: Draft, pods: list[Object]) -> waiting.Trouble | None:
    observed = draft.observed
    spec = observed.body.get("spec") or {}
    return waiting.reason(pods, spec, observed.claim, observed.news, draft.now)


def _follow_manager(draft: Draft, current: Object, manager: str) -> None:
    """The pods are in another cluster; all that is known is the PyTorchJob's own status."""
    if is_true(current, "Running"):
        draft.condition("Running", "True", "ManagedElsewhere", f"runs where {manager} placed it")
        return
    draft.waits_for("PyTorchJob", current["metadata"]["name"])
    said = find_condition(current.get("status") or {}, "Created").get("message")
    words = f"managed by {manager}" + (f": {failure.clean(said)}" if said else "")
    draft.condition("Running", "False", "Waiting", words)


def _say_what_is_missing(
    draft: Draft, current: Object, pods: list[Object], trouble: waiting.Trouble | None
) -> None:
    """Pods are not made, or not made again: for how long, why, and what keeps the others."""
    since = missing_pods.since(draft.observed.status, current) or draft.now_text
    left = missing_pods.PODS_MISSING_SECONDS - draft.seconds_since(since)
    refusal, made = draft.observed.refusal, f"{len(pods)} of {replicas(current)} pods are made"
    if left <= 0 and (refusal is not None or trouble is None):
        words = _why_missing(refusal)
        words = f"{made}: {words}" + (f"; {trouble.words}" if trouble else "")
        draft.condition("Running", "False", "PodsNotCreated", words)
    elif trouble is not None:
        draft.condition("Running", "False", trouble.reason, trouble.words)
    elif pods or is_true(current, "Restarting"):
        running = failure.running_count(pods)
        _say_which_start(draft, current, pods, f"{running} of {replicas(current)} pods run")
    else:
        draft.condition("Running", "False", "PodsStarting", "no pod has been made yet")
    draft.waits_for("PyTorchJob", current["metadata"]["name"], since)
    draft.look_again(min(LONG_SECONDS, left) if left > 0 else LONG_SECONDS)


def _why_missing(refusal: Said | None) -> str:
    if refusal is None:
        return "nothing is known about why; is the training-operator running?"
    words = failure.clean(refusal.message)
    cure = missing_pods.cure(words)
    return f"{failure.word(refusal.reason, 'Warning')}: {words}" + (f"; {cure}" if cure else "")


def poll_targets(run: RunPolicy, current: Object, pods: list[Object]) -> tuple[PollTarget, ...]:
    """Rank 0's pod; with c10d any pod may have it.

    By type and index, not by the label job-role: not every training-operator gives that to
    worker 0 of a PyTorchJob without a Master.
    """
    types = current["spec"].get("pytorchReplicaSpecs") or {}
    kind = "master" if "Master" in types else "worker"
    found = []
    for pod in pods:
        status, labels = pod.get("status") or {}, pod["metadata"].get("labels") or {}
        place = (labels.get(names.REPLICA_TYPE_LABEL), labels.get(names.REPLICA_INDEX_LABEL))
        wanted = place == (kind, "0") or run.rendezvous.backend == "c10d"
        if wanted and status.get("phase") == "Running" and status.get("podIP"):
            found.append(PollTarget(pod["metadata"]["name"], status["podIP"], METRICS_PORT))
    return tuple(found)
