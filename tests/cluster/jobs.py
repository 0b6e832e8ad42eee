"""PyTorchJobs for the tests: small ones that run Python text in their pods."""

from __future__ import annotations

from typing import Any

from osft_operator.local_pods import Object

JOBS = "/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"


def pytorchjob(
    name: str,
    command: list[str],
    *,
    workers: int = 0,
    master: bool = True,
    restart_policy: str = "OnFailure",
    grace_seconds: int = 5,
    nproc_per_node: str = "1",
    **spec: Any,
) -> Object:
    """A PyTorchJob whose pods all run `command`; `spec` adds to its spec."""
    template = {
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": grace_seconds,
            "containers": [
                {
                    "name": "pytorch",
                    "image": "trainer:test",
                    "command": command,
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                }
            ],
        }
    }
    replica = {"restartPolicy": restart_policy, "template": template}
    replicas: Object = {}
    if master:
        replicas["Master"] = {"replicas": 1, **replica}
    if workers:
        replicas["Worker"] = {"replicas": workers, **replica}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"nprocPerNode": nproc_per_node, "pytorchReplicaSpecs": replicas, **spec},
    }


def conditions(job: Object) -> dict[str, str]:
    """Status by type of the job's conditions, in their order."""
    return {each["type"]: each["status"] for each in job.get("status", {}).get("conditions", [])}
