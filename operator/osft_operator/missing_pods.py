"""Pods that a PyTorchJob should have and that are not made: since when, and what helps.

Called by gang for the condition Running, and by observer, which asks for events only then. One pod
of several that is refused keeps all others waiting, so it counts as much as none at all. Pure; must
never call the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from osft_operator.cures import MASTER_WAIT, NO_MASTER_WAIT
from osft_operator.observed import (
    Object,
    find_condition,
    is_deleting,
    is_suspended,
    managed_elsewhere,
    replicas,
    time_of,
)

PODS_MISSING_SECONDS = 60.0
"""After so long without some of the pods, something is wrong."""

_CURES = (
    (
        re.compile(r"violates PodSecurity"),
        "change it in spec.podTemplate, or ask for another pod-security.kubernetes.io/enforce on "
        "the namespace",
    ),
    (
        re.compile(r"exceeded quota"),
        "wait until others give it back, ask for less (spec.nnodes, spec.resources), or have the "
        "ResourceQuota raised",
    ),
    (
        re.compile(r"failed quota.*must specify"),
        "set these in spec.resources, or for another container in spec.podTemplate",
    ),
    (
        re.compile(r"(?:maximum|minimum|max limit to request ratio).* per (?:Container|Pod)"),
        "the namespace's LimitRange says so: change spec.resources",
    ),
    (
        re.compile(r"no PriorityClass with name"),
        "set spec.priorityClassName to one that the cluster has",
    ),
    (
        re.compile(r"error looking up service account|serviceaccount \S+ not found"),
        "make the ServiceAccount, or change spec.podTemplate.spec.serviceAccountName",
    ),
)
"""What to do about the API server's words on a pod that it refuses."""


def count(job: Object, pods: Sequence[Object]) -> int:
    """How many pods of a PyTorchJob are not there; one that ends is, until it is gone."""
    if is_suspended(job) or is_deleting(job) or managed_elsewhere(job):
        return 0
    return max(0, replicas(job) - len(pods))


def since(status: Object, job: Object) -> str | None:
    """Since when pods are missing, as far as it is recorded.

    Args:
        status: the recorded one of the OSFTJob.
        job: the attempt's PyTorchJob, of which pods are missing now.

    Returns:
        A time of the API; None when all were there when the status was written.
    """
    waited = status.get("waitingFor") or {}
    is_known = (waited.get("kind"), waited.get("name")) == ("PyTorchJob", job["metadata"]["name"])
    if "countedPods" in status and not is_known:
        return None
    resumed = find_condition(status, "Suspended").get("lastTransitionTime")
    times = (job["metadata"].get("creationTimestamp"), waited.get("since") if is_known else None)
    return max((time for time in (*times, resumed) if time), key=time_of, default=None)


def cure(words: str) -> str:
    """What helps against the API server's words on a pod that it refuses; empty if unknown."""
    if f'"{MASTER_WAIT}"' in words or f"for: {MASTER_WAIT}" in words:
        return f"the training-operator adds {MASTER_WAIT} to workers; {NO_MASTER_WAIT}"
    return next((text for pattern, text in _CURES if pattern.search(words)), "")
