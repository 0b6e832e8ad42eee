"""Which pods are asked for the run's progress, in each shape of the PyTorchJob.

The pods are those that the training-operator makes (local_pods), without the label job-role: older
ones do not give it to worker 0 of a PyTorchJob that has no Master.
"""

from __future__ import annotations

import pytest

from osft_operator import local_pods
from osft_operator.actions import PollTarget
from osft_operator.observed import Object
from osft_operator.remote_view import rank_zero_pod
from osft_operator.resolved import RenderSettings
from osft_trainer.report import METRICS_PORT
from world import World


def running(shape: str, backend: str) -> World:
    world = World(
        {
            "spec.nnodes": 3,
            "spec.rendezvous.backend": backend,
            "spec.storage.checkpoints": {"claimName": "shared"},
        }
    )
    world.claim = {"metadata": {"name": "shared"}, "spec": {"accessModes": ["ReadWriteMany"]}}
    update = {"trainer_image": "t", "pytorch_job_shape": shape}
    world.settings = RenderSettings.model_validate(update)
    world.settle()
    made = local_pods.pods(world.jobs["sample"])
    # listed in any order
    world.pods = [as_it_runs(pod, number) for number, pod in reversed(list(enumerate(made)))]
    return world


def as_it_runs(pod: Object, number: int) -> Object:
    pod["metadata"]["labels"].pop(local_pods.JOB_ROLE_LABEL, None)
    state = {"name": "pytorch", "restartCount": 0, "state": {"running": {}}}
    status = {"phase": "Running", "podIP": f"10.0.0.{number}", "containerStatuses": [state]}
    owners = [{"controller": True, "uid": "job-1"}]
    return {**pod, "metadata": {**pod["metadata"], "ownerReferences": owners}, "status": status}


@pytest.mark.parametrize(
    ("shape", "first"),
    [("master-worker", "sample-master-0"), ("worker-only", "sample-worker-0")],
)
def test_rank_zero_is_asked_and_its_log_read(shape: str, first: str) -> None:
    world = running(shape, "static")
    assert world.settle().poll == (PollTarget(first, "10.0.0.0", METRICS_PORT),)
    assert rank_zero_pod(world.body, world.pods) == first


def test_with_c10d_any_pod_may_have_it() -> None:
    names = [target.pod for target in running("master-worker", "c10d").settle().poll]
    assert sorted(names) == [f"sample-worker-{index}" for index in range(3)]
