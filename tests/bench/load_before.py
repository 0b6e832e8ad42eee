"""OSFTJobs that had ended before the operator started: what a cluster is full of.

Called by load_story. Each gets the status that our own decisions lead to, its claim, its PyTorchJob
and its pod, made as fast as the API server takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import job_samples
from bench.load_node import PYTORCH_JOBS, Node
from bench.load_watch import Name
from cluster.api import Api
from world import World

JOBS = "/apis/osft.dev/v1alpha1/namespaces/{0}/osftjobs"
CLAIMS = "/api/v1/namespaces/{0}/persistentvolumeclaims"

Object = dict[str, Any]


def finished(api: Api, node: Node, name: Name, mark: Callable[[Object], Object]) -> None:
    """One job that has succeeded.

    Args:
        api: the server.
        node: makes the pod.
        name: of the job.
        mark: the annotations that the operator of this run leaves on an OSFTJob it has dealt with.
    """
    namespace, job = name
    world = World()
    world.body = api.post(JOBS.format(namespace), job_samples.job(name=job))
    if annotations := mark(world.body):
        path = f"{JOBS.format(namespace)}/{job}"
        api.patch(path, {"metadata": {"annotations": annotations}})
    world.step()
    world.step()
    assert world.claim is not None
    api.post(CLAIMS.format(namespace), world.claim)
    made = api.post(PYTORCH_JOBS.format(namespace), world.jobs[job])
    node.pod(namespace, made, "Succeeded")
    world.jobs[job] = made
    world.tell(job, "Succeeded")
    api.patch(
        f"{PYTORCH_JOBS.format(namespace)}/{job}/status", {"status": world.jobs[job]["status"]}
    )
    world.settle()
    api.patch(f"{JOBS.format(namespace)}/{job}/status", {"status": world.status})
