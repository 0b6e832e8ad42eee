"""Expands a PyTorchJob into the pods and services that Kubeflow's training-operator would make.

Pure: dicts in, dicts out. Written from the controller's behaviour in Training Operator v1.9:
names, labels, the environment in its exact order, ports, restart policies. Called by `osft run`
and by the tests' stand-in for the training-operator, so both run the same pods. It must never
repair a manifest: what the real controller does with a bad one, this does too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from osft_operator.names import REPLICA_INDEX_LABEL, REPLICA_TYPE_LABEL

LABEL_PREFIX = "training.kubeflow.org/"
JOB_NAME_LABEL = LABEL_PREFIX + "job-name"
JOB_ROLE_LABEL = LABEL_PREFIX + "job-role"
OPERATOR_NAME_LABEL = LABEL_PREFIX + "operator-name"

CONTAINER = "pytorch"
"""The container that trains; the others of the pod get the same environment."""

PORT_NAME = "pytorchjob-port"
DEFAULT_PORT = 23456
INIT_CONTAINER = "init-pytorch"

Object = dict[str, Any]
"""A Kubernetes object, or a part of one."""


def pods(pytorchjob: Mapping[str, Any]) -> list[Object]:
    """The pods of a PyTorchJob, Master first, then the workers by index.

    The defaults of the controller are applied to a copy, as it does in memory.
    """
    job = _with_defaults(pytorchjob)
    return [
        _pod(job, kind, index)
        for kind in _replica_types(job)
        for index in range(_replicas(job, kind))
    ]


def services(pytorchjob: Mapping[str, Any]) -> list[Object]:
    """One headless service per pod, of the pod's name, with all named ports of its container."""
    job = _with_defaults(pytorchjob)
    return [
        _service(job, kind, index)
        for kind in _replica_types(job)
        for index in range(_replicas(job, kind))
    ]


def replica_labels(job_name: str, kind: str, index: int) -> dict[str, str]:
    """The four labels by which a service finds its pod."""
    return {
        OPERATOR_NAME_LABEL: "pytorchjob-controller",
        JOB_NAME_LABEL: job_name,
        REPLICA_TYPE_LABEL: kind.lower(),
        REPLICA_INDEX_LABEL: str(index),
    }


def _with_defaults(pytorchjob: Mapping[str, Any]) -> Object:
    job = copy.deepcopy(dict(pytorchjob))
    spec = job["spec"]
    elastic = spec.get("elasticPolicy")
    if not spec.get("nprocPerNode") and not (elastic and elastic.get("nProcPerNode")):
        spec["nprocPerNode"] = "auto"
    for replica in spec["pytorchReplicaSpecs"].values():
        replica.setdefault("replicas", 1)
        replica.setdefault("restartPolicy", "OnFailure")
        container = _trainer(replica)
        ports = container.setdefault("ports", [])
        if not any(port.get("name") == PORT_NAME for port in ports):
            ports.append({"name": PORT_NAME, "containerPort": DEFAULT_PORT})
    if elastic is not None:
        low, high = elastic.get("minReplicas"), elastic.get("maxReplicas")
        workers = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
        # one copies the other; the Master is not counted
        elastic["minReplicas"] = next(n for n in (low, high, workers) if n is not None)
        elastic["maxReplicas"] = next(n for n in (high, low, workers) if n is not None)
    return job


def _replica_types(job: Object) -> list[str]:
    return [kind for kind in ("Master", "Worker") if kind in job["spec"]["pytorchReplicaSpecs"]]


def _replicas(job: Object, kind: str) -> int:
    return int(job["spec"]["pytorchReplicaSpecs"][kind]["replicas"])


def _trainer(replica: Object) -> Object:
    containers: list[Object] = replica["template"]["spec"]["containers"]
    for container in containers:
        if container.get("name") == CONTAINER:
            return container
    raise ValueError(
        f"spec.pytorchReplicaSpecs: no container is named {CONTAINER!r}; the trainer's must be"
    )


def _port(job: Object, kind: str) -> int:
    ports = _trainer(job["spec"]["pytorchReplicaSpecs"][kind])["ports"]
    return next(int(port["containerPort"]) for port in ports if port.get("name") == PORT_NAME)


def _owner_references(job: Object) -> list[Object]:
    metadata = job["metadata"]
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "name": metadata["name"],
            "uid": metadata.get("uid", ""),
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def _metadata(job: Object, kind: str, index: int) -> Object:
    metadata: Object = {
        "name": f"{job['metadata']['name']}-{kind.lower()}-{index}",
        "labels": replica_labels(job["metadata"]["name"], kind, index),
        "ownerReferences": _owner_references(job),
    }
    if "namespace" in job["metadata"]:
        metadata["namespace"] = job["metadata"]["namespace"]
    return metadata


def _pod(job: Object, kind: str, index: int) -> Object:
    replica = job["spec"]["pytorchReplicaSpecs"][kind]
    template = copy.deepcopy(replica["template"])
    metadata = _metadata(job, kind, index)
    given = template.get("metadata") or {}
    metadata["labels"] = {**(given.get("labels") or {}), **metadata["labels"]}
    if given.get("annotations"):
        metadata["annotations"] = given["annotations"]
    has_master = "Master" in job["spec"]["pytorchReplicaSpecs"]
    if kind == "Master" or (not has_master and index == 0):
        metadata["labels"][JOB_ROLE_LABEL] = "master"

    spec = template["spec"]
    policy = replica["restartPolicy"]
    spec["restartPolicy"] = "Never" if policy == "ExitCode" else policy
    environment = _environment(job, kind, index)
    for container in spec["containers"]:
        # after the user's: of two entries of one name Kubernetes takes the last
        container["env"] = [*(container.get("env") or []), *copy.deepcopy(environment)]
    if kind == "Worker" and has_master:
        spec["initContainers"] = [*(spec.get("initContainers") or []), _init_container(job)]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _service(job: Object, kind: str, index: int) -> Object:
    metadata = _metadata(job, kind, index)
    ports = {
        port.get("name", ""): port["containerPort"]
        for port in _trainer(job["spec"]["pytorchReplicaSpecs"][kind])["ports"]
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "selector": dict(metadata["labels"]),
            "ports": [{"name": name, "port": port} for name, port in ports.items()],
        },
    }


def _environment(job: Object, kind: str, index: int) -> list[Object]:
    """What the controller appends to every container, in its order."""
    spec = job["spec"]
    has_master = "Master" in spec["pytorchReplicaSpecs"]
    nodes = sum(_replicas(job, each) for each in _replica_types(job))
    per_node = spec.get("nprocPerNode")
    values: list[tuple[str, str]] = [("PYTHONUNBUFFERED", "1")]
    if has_master:
        port, host = str(_port(job, "Master")), f"{job['metadata']['name']}-master-0"
        rank = str(index if kind == "Master" else index + 1)
        # "auto", "cpu" and "gpu" count as one process per node: wrong, and what it does
        processes = int(per_node) if str(per_node).isdigit() else 1
        values += [
            ("MASTER_PORT", port),
            ("PET_MASTER_PORT", port),
            ("MASTER_ADDR", host),
            ("PET_MASTER_ADDR", host),
            ("WORLD_SIZE", str(nodes * processes)),
            ("RANK", rank),
            ("PET_NODE_RANK", rank),
        ]
    if per_node:
        values.append(("PET_NPROC_PER_NODE", str(per_node)))
    if spec.get("elasticPolicy") is not None:
        values += _elastic_environment(job)
    else:
        values.append(("PET_NNODES", str(nodes)))
    return [{"name": name, "value": value} for name, value in values]


def _elastic_environment(job: Object) -> list[tuple[str, str]]:
    policy = job["spec"]["elasticPolicy"]
    host = policy.get("rdzvHost") or f"{job['metadata']['name']}-worker-0"
    port = policy.get("rdzvPort") or _port(job, "Worker")
    values = [
        ("PET_RDZV_ENDPOINT", f"{host}:{port}"),
        ("PET_RDZV_BACKEND", policy.get("rdzvBackend") or "c10d"),
        ("PET_NNODES", f"{policy['minReplicas']}:{policy['maxReplicas']}"),
    ]
    if policy.get("maxRestarts") is not None:
        values.append(("PET_MAX_RESTARTS", str(policy["maxRestarts"])))
    if policy.get("nProcPerNode") is not None:
        values.append(("PET_NPROC_PER_NODE", str(policy["nProcPerNode"])))
    if policy.get("rdzvId") is not None:
        values.append(("PET_RDZV_ID", policy["rdzvId"]))
    if policy.get("rdzvConf") is not None:
        pairs = ",".join(f"{item['key']}={item['value']}" for item in policy["rdzvConf"])
        values.append(("PET_RDZV_CONF", pairs))
    if policy.get("standalone"):
        values.append(("PET_STANDALONE", ""))
    return values


def _init_container(job: Object) -> Object:
    host = f"{job['metadata']['name']}-master-0"
    wait = (
        f"for i in $(seq 1 100); do nslookup {host} && exit 0; "
        f"echo waiting for {host}; sleep 2; done; exit 1"
    )
    return {
        "name": INIT_CONTAINER,
        "image": "alpine:3.10",
        "imagePullPolicy": "IfNotPresent",
        "resources": {
            "limits": {"cpu": "100m", "memory": "20Mi"},
            "requests": {"cpu": "50m", "memory": "10Mi"},
        },
        "command": ["sh", "-c", wait],
    }
