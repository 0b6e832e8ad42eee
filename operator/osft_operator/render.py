"""An OSFTJob becomes a PyTorchJob, and a claim for its checkpoints.

Called by decide and by `osft render` and `osft run`. Pure: the job, what was resolved before the
first attempt, and the attempt's number are all it looks at. What it makes is created once and never
applied again. Must never read settings, status or a clock.
"""

from __future__ import annotations

import copy
from typing import Any

from osft_operator import names, pod
from osft_operator.resolved import RenderSettings, Resolved, resolve
from osft_operator.spec import OSFTJob

__all__ = ["RenderSettings", "Resolved", "checkpoint_claim", "pytorch_job", "resolve"]

Object = dict[str, Any]


def pytorch_job(job: OSFTJob, resolved: Resolved, attempt: int = 1) -> Object:
    """The PyTorchJob of an attempt, with every default written out."""
    name = names.attempt_name(job.metadata.name, attempt)
    spec: Object = {
        "nprocPerNode": str(resolved.nproc_per_node),
        # the default would leave the other pods and their GPUs running after a failure
        "runPolicy": {"cleanPodPolicy": "Running"},
    }
    if job.spec.rendezvous.backend == "c10d":
        spec["elasticPolicy"] = _elastic_policy(job, resolved, name)
    spec["pytorchReplicaSpecs"] = _replicas(job, resolved, attempt, name)
    return {
        "apiVersion": names.PYTORCH_JOB_API_VERSION,
        "kind": names.PYTORCH_JOB_KIND,
        "metadata": {
            "name": name,
            "namespace": job.metadata.namespace,
            "labels": {**pod.labels(job, attempt), **queue_labels(job)},
            "ownerReferences": [owner_reference(job)],
        },
        "spec": spec,
    }


def queue_labels(job: OSFTJob) -> dict[str, str]:
    """Kueue's labels: those on the OSFTJob, then what the spec says."""
    result = {
        name: value
        for name, value in job.metadata.labels.items()
        if name.startswith(names.KUEUE_LABEL_PREFIX)
    }
    if job.spec.queue_name is not None:
        result[names.QUEUE_LABEL] = job.spec.queue_name
    if job.spec.workload_priority_class_name is not None:
        result[names.WORKLOAD_PRIORITY_LABEL] = job.spec.workload_priority_class_name
    return result


def owner_reference(job: OSFTJob) -> Object:
    """By which a child goes when its OSFTJob goes."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.metadata.name,
        "uid": job.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def checkpoint_claim(job: OSFTJob, resolved: Resolved) -> Object | None:
    """The claim for checkpoints; None when the user names one of his own.

    A retained claim has no owner, so that it stays when the OSFTJob goes; the next OSFTJob of the
    same name takes it again by its label.
    """
    checkpoints = job.spec.storage.checkpoints
    if checkpoints.size is None:
        return None
    modes = list(checkpoints.access_modes or ())
    if not modes:
        modes = ["ReadWriteOnce" if resolved.nnodes == 1 else "ReadWriteMany"]
    metadata: Object = {
        "name": resolved.checkpoint_claim,
        "namespace": job.metadata.namespace,
        "labels": {
            "app.kubernetes.io/managed-by": "osft-operator",
            names.JOB_LABEL: job.metadata.name,
        },
    }
    if not checkpoints.retain:
        metadata["ownerReferences"] = [owner_reference(job)]
    spec: Object = {
        "accessModes": modes,
        "resources": {"requests": {"storage": checkpoints.size}},
    }
    if checkpoints.storage_class_name is not None:
        spec["storageClassName"] = checkpoints.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def _replicas(job: OSFTJob, resolved: Resolved, attempt: int, name: str) -> Object:
    nodes = resolved.nnodes
    timeout = {"name": "PET_RDZV_CONF", "value": f"timeout={job.spec.rendezvous.timeout_seconds}"}
    if job.spec.rendezvous.backend == "c10d":
        return {"Worker": _replica(nodes, pod.template(job, resolved, attempt, []))}
    # a single pod has no init container, so the shape that avoids one is not needed
    if resolved.pytorch_job_shape == "worker-only" and nodes > 1:
        place = [*_place_of_worker(job, name), timeout]
        return {"Worker": _replica(nodes, pod.template(job, resolved, attempt, place))}
    template = pod.template(job, resolved, attempt, [timeout])
    replicas = {"Master": _replica(1, template)}
    if nodes > 1:
        replicas["Worker"] = _replica(nodes - 1, copy.deepcopy(template))
    return replicas


def _replica(count: int, template: Object) -> Object:
    return {"replicas": count, "restartPolicy": "OnFailure", "template": template}


def _place_of_worker(job: OSFTJob, name: str) -> list[Object]:
    """What the training-operator injects only when there is a Master."""
    label = f"metadata.labels['{names.REPLICA_INDEX_LABEL}']"
    return [
        {"name": "PET_MASTER_ADDR", "value": f"{name}-worker-0"},
        {"name": "PET_MASTER_PORT", "value": str(job.spec.rendezvous.port)},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": label}}},
    ]


def _elastic_policy(job: OSFTJob, resolved: Resolved, name: str) -> Object:
    rendezvous = job.spec.rendezvous
    return {
        "minReplicas": resolved.nnodes,
        "maxReplicas": resolved.nnodes,
        "rdzvBackend": "c10d",
        "rdzvHost": f"{name}-worker-0",
        "rdzvPort": rendezvous.port,
        "rdzvId": job.metadata.uid or job.metadata.name,
        "rdzvConf": [{"key": "join_timeout", "value": str(rendezvous.timeout_seconds)}],
    }
