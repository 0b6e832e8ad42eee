"""Waits whose end no watch tells of: each is looked for again, within 30 s.

What bears no label of ours is not watched: others' PyTorchJobs and claims, Secrets, quotas, rights.
The Lease is in test_lease_errors, a namespace that cannot be read in test_places, pods that do not
end in test_predecessors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import job_samples
from cluster.control_plane import ControlPlane
from osft_operator import cluster_errors
from osft_operator.cluster import Cluster, ClusterError, Unavailable
from osft_operator.decide import refused
from osft_operator.kinds import CLAIMS, OSFTJOBS, PYTORCHJOBS, Kind, Object
from osft_operator.names import JOB_LABEL, QUEUE_LABEL
from osft_operator.queue import Key
from osft_operator.reconcile import LOOK_AGAIN_SECONDS
from osft_operator.service import Service
from osft_operator.settings import Settings
from reconcile_scene import Scene
from world import World, running

LONGEST_SECONDS = 30.0
FOREIGN: dict[str, tuple[Kind, Object]] = {
    "a PyTorchJob of its name": (
        PYTORCHJOBS,
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "run"},
            "spec": {"pytorchReplicaSpecs": {}},
        },
    ),
    "a claim of its name": (
        CLAIMS,
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "run-checkpoints", "finalizers": []},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "10Gi"}},
            },
        },
    ),
}


@pytest.mark.cluster
@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_in_the_way_and_not_ours_is_missed_when_it_is_gone(
    foreign: str, control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, body = FOREIGN[foreign]
    key = Key(namespace, "run")

    async def story(cluster: Cluster) -> None:
        made = await cluster.create(kind, namespace, body)
        await cluster.create(OSFTJOBS, namespace, job_samples.job(name="run"))
        scene = Scene(cluster, namespace)
        await scene.one_pass()
        # from here on without lists, as between two resyncs
        waits = [await scene.reconciler.reconcile(key) for _ in range(3)]
        assert waits[0] == LOOK_AGAIN_SECONDS, "the name was found taken"
        assert waits[-1] is not None
        assert waits[-1] <= LONGEST_SECONDS
        reason = (await scene.condition("Running"))["reason"]
        assert reason in ("NameTaken", "ClaimTaken")
        name = body["metadata"]["name"]
        await cluster.patch(kind, namespace, name, {"metadata": {"finalizers": None}})
        await cluster.delete(kind, namespace, name, uid=made["metadata"]["uid"])
        await scene.reconciler.reconcile(key)
        await scene.reconciler.reconcile(key)
        (pytorch_job,) = (await cluster.list_all(PYTORCHJOBS, namespace)).items
        assert pytorch_job["metadata"]["labels"][JOB_LABEL] == "run"

    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    cluster = Cluster.connect()
    try:
        asyncio.run(story(cluster))
    finally:
        cluster.close()


def taken_name(world: World) -> None:
    world.jobs["sample"] = {"metadata": {"name": "sample", "uid": "x"}, "spec": {}}


def taken_later_name(world: World) -> None:
    world.settle()
    world.jobs["sample-a2"] = {"metadata": {"name": "sample-a2", "uid": "x"}, "spec": {}}
    world.tell("sample", "Failed")
    world.settle()
    world.wait(10_000)


def taken_claim(world: World) -> None:
    world.claim = {"metadata": {"name": "sample-checkpoints"}}


def claim_that_goes(world: World) -> None:
    metadata = {"name": "sample-checkpoints", "labels": {JOB_LABEL: "sample"}}
    world.claim = {"metadata": {**metadata, "deletionTimestamp": "2026-01-01T00:00:00Z"}}


def missing_claim(world: World) -> None:
    world.body["spec"]["storage"]["checkpoints"] = {"claimName": "mine"}


def missing_kind(world: World) -> None:
    world.kind_present = False


def no_pods(world: World) -> None:
    world.settle()
    world.wait(61)


def missing_secret(world: World) -> None:
    world.settle()
    world.run_pods()
    status = world.pods[0]["status"]
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "token" not found'}
    status["phase"] = "Pending"
    status["containerStatuses"][0]["state"] = {"waiting": waiting}


def hidden(world: World) -> None:
    """Somebody takes the label off, so that no watch tells of it."""
    world.settle()
    world.run_pods()
    world.settle()
    world.jobs["sample"]["metadata"]["labels"].pop(JOB_LABEL)


def queued(world: World) -> None:
    world.edit(queueName="q")
    world.step()
    world.step()
    world.jobs["sample"]["metadata"]["labels"][QUEUE_LABEL] = "q"
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = True


@pytest.mark.parametrize(
    "begins",
    [
        taken_name,
        taken_later_name,
        taken_claim,
        claim_that_goes,
        missing_claim,
        missing_kind,
        no_pods,
        missing_secret,
        hidden,
        queued,
    ],
)
def test_every_wait_for_others_has_an_appointment(begins: Callable[[World], None]) -> None:
    world = World({"spec.maxRestarts": 9})
    begins(world)
    decision = world.settle()
    assert decision.requeue_after is not None
    assert decision.requeue_after <= LONGEST_SECONDS


def test_a_refusal_is_tried_again_soon_and_then_more_rarely() -> None:
    world = running()
    world.edit(suspend=True)
    world.step()
    asked = world.step(act=False, record=False)
    decision = refused(asked, world.body, "exceeded quota", world.now)
    assert decision.requeue_after is not None
    assert decision.requeue_after <= LONGEST_SECONDS


ERRORS = [
    each
    for each in vars(cluster_errors).values()
    if isinstance(each, type) and issubclass(each, ClusterError)
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_after_any_error_of_the_server_a_job_is_looked_at_soon(error: type[ClusterError]) -> None:
    cluster: Any = None
    service = Service(Settings(), cluster)
    key = Key("n", "run")
    for _ in range(20):
        service._failed(key, error("no"))
        due = service._queue._due.pop(key)
        assert due - service._queue._clock() <= LONGEST_SECONDS


def test_a_server_that_asks_for_a_longer_wait_gets_it() -> None:
    cluster: Any = None
    service = Service(Settings(), cluster)
    service._failed(Key("n", "run"), Unavailable("busy", code=429, retry_after=120))
    assert service._queue._due[Key("n", "run")] - service._queue._clock() > 119
