"""Pods that are not made, one of several or all: said after a minute, with the cure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from osft_operator.cache import Cache
from osft_operator.cluster import Cluster, Listing
from osft_operator.kinds import CLAIMS, EVENTS, OSFTJOBS, PODS, PYTORCHJOBS, Kind
from osft_operator.observed import Said, text_of
from osft_operator.observer import PODS_ASKED, Observer
from osft_operator.queue import Key
from osft_operator.settings import Settings
from reconcile_scene import Told
from world import World, running

QUOTA = (
    'Error creating: pods "sample-worker-0" is forbidden: exceeded quota: team, requested: '
    "requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8"
)
INIT = (
    'Error creating: pods "sample-worker-0" is forbidden: violates PodSecurity "restricted:latest":'
    ' allowPrivilegeEscalation != false (container "init-pytorch" must set '
    "securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container "
    '"init-pytorch" must set securityContext.capabilities.drop=["ALL"])'
)
WORDS = {
    "quota": (QUOTA, "wait until others give it back"),
    "the init container": (INIT, "trainer.pytorchJobShape: worker-only"),
    "the init container, quota": (
        'Error creating: pods "a" is forbidden: failed quota: team: must specify '
        "limits.ephemeral-storage for: init-pytorch",
        "trainer.pytorchJobShape: worker-only",
    ),
    "a mount of the user's": (
        'Error creating: pods "a" is forbidden: violates PodSecurity "baseline:latest": hostPath '
        'volumes (volume "data")',
        "spec.podTemplate",
    ),
    "no limits": (
        'Error creating: pods "a" is forbidden: failed quota: team: must specify limits.cpu for: '
        "pytorch",
        "spec.resources",
    ),
    "limit range": (
        'Error creating: pods "a" is forbidden: maximum cpu usage per Container is 2, but limit '
        "is 4",
        "LimitRange",
    ),
    "priority class": (
        'Error creating: pods "a" is forbidden: no PriorityClass with name high was found',
        "spec.priorityClassName",
    ),
    "service account": (
        'Error creating: pods "a" is forbidden: error looking up service account team/x: '
        'serviceaccount "x" not found',
        "make the ServiceAccount",
    ),
    "a webhook": (
        'Error creating: admission webhook "policy.example.com" denied the request: no',
        "denied the request: no",
    ),
}


def half_made(**changes: Any) -> World:
    world = World({"spec.nnodes": 2, **changes})
    world.settle()
    world.run_pods(count=1)
    world.settle()
    return world


@pytest.mark.parametrize(("words", "cure"), WORDS.values(), ids=WORDS)
@pytest.mark.parametrize("made", [0, 1])
def test_refused_pods_are_explained_whether_others_run_or_not(
    words: str, cure: str, made: int
) -> None:
    world = half_made()
    world.pods = world.pods[:made]
    world.wait(59)
    world.settle()
    assert world.status["reason"] == "PodsStarting"
    world.wait(2)
    world.refusal = Said("FailedCreatePod", words)
    decision = world.settle()
    message = world.condition("Running")["message"]
    assert world.status["reason"] == "PodsNotCreated"
    assert message.startswith(f"{made} of 2 pods are made: FailedCreatePod: Error creating: ")
    assert cure in message
    assert world.status["waitingFor"]["kind"] == "PyTorchJob"
    assert decision.requeue_after == 30
    assert world.events.count("PodsNotCreated") == 1


def test_pods_of_which_nothing_is_known_point_at_who_should_make_them() -> None:
    world = half_made()
    world.wait(61)
    world.settle()
    assert world.status["reason"] == "PodsNotCreated"
    assert "is the training-operator running?" in world.condition("Running")["message"]
    world.run_pods(count=2)
    world.settle()
    assert world.status["phase"] == "Running"


def test_a_lost_pod_that_is_not_made_again_is_explained_after_a_minute_of_its_own() -> None:
    world = running(count=2)
    world.wait(3600)
    world.pods[1]["metadata"]["deletionTimestamp"] = text_of(world.now)
    world.settle()
    world.wait(300)  # it saves
    world.settle()
    lost = world.pods.pop()
    world.settle()
    assert world.status["reason"] != "PodsNotCreated", "it has just gone"
    world.wait(40)
    world.settle()
    assert world.status["reason"] != "PodsNotCreated"
    world.wait(21)
    world.refusal = Said("FailedCreatePod", QUOTA)
    world.settle()
    assert world.status["reason"] == "PodsNotCreated"
    world.pods.append(lost)
    world.replace_pod(1)
    world.refusal = None
    world.settle()
    assert world.status["phase"] == "Running"


def test_a_resumed_job_has_its_minute() -> None:
    world = running(count=2)
    world.edit(suspend=True)
    world.settle()
    world.pods = []
    world.wait(3600)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert world.status["reason"] == "PodsStarting"
    world.wait(61)
    world.refusal = Said("FailedCreatePod", INIT)
    world.settle()
    assert world.status["reason"] == "PodsNotCreated"
    assert "worker-only" in world.condition("Running")["message"]


def test_what_keeps_the_other_pods_is_said_too() -> None:
    world = half_made()
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    world.pods[0]["status"]["phase"] = "Pending"
    world.pods[0]["status"]["containerStatuses"][0]["state"] = waiting
    world.wait(61)
    world.settle()
    assert world.status["reason"] == "ImagePullBackOff", "of the missing pod nothing is known"
    world.refusal = Said("FailedCreatePod", QUOTA)
    world.settle()
    assert world.status["reason"] == "PodsNotCreated"
    message = world.condition("Running")["message"]
    assert "exceeded quota" in message
    assert "no such image" in message


class Answering(Cluster):
    """A cluster that answers with events, and knows which were asked for."""

    def __init__(self, events: dict[str, list[dict[str, Any]]]) -> None:
        self.events = events
        self.asked: list[str] = []

    async def list_all(self, kind: Kind, namespace: str | None, **query: Any) -> Listing:
        assert kind is EVENTS
        uid = str(query["fields"]).partition("=")[2]
        self.asked.append(uid)
        return Listing(self.events.get(uid, []), "1")


def observed(world: World, events: dict[str, list[dict[str, Any]]]) -> tuple[Any, list[str]]:
    """What the operator sees of a world, and about which objects it asked for events."""
    cluster, cache = Answering(events), Cache()
    cache.put(OSFTJOBS, world.body)
    kept = [(PYTORCHJOBS, job) for job in world.jobs.values()]
    kept += [(PODS, pod) for pod in world.pods]
    kept += [(CLAIMS, world.claim)] if world.claim else []
    for kind, body in kept:
        body["metadata"].setdefault("namespace", "ns")
        body["metadata"].setdefault("labels", {})["osft.dev/job"] = "sample"
        body["metadata"].setdefault("uid", body["metadata"]["name"])
        cache.put(kind, {**body, "metadata": {**body["metadata"], "resourceVersion": "1"}})
    told: Any = Told()
    observer = Observer(Settings(kueue=False), cluster, cache, told, lambda _: True)
    seen = asyncio.run(observer.observe(Key("ns", "sample"), world.body, world.now))
    return seen, cluster.asked


def event(world: World, reason: str, message: str, kind: str = "Warning") -> dict[str, Any]:
    metadata = {"name": reason, "creationTimestamp": text_of(world.now)}
    return {"metadata": metadata, "type": kind, "reason": reason, "message": message}


def test_events_are_asked_for_when_one_pod_of_two_has_been_missing() -> None:
    world = half_made()
    uid = world.jobs["sample"]["metadata"]["uid"]
    resumed = event(world, "PyTorchJobResumed", "PyTorchJob sample is resumed.", "Normal")
    told = {uid: [event(world, "FailedCreatePod", QUOTA), resumed]}
    assert observed(world, told)[1] == []
    world.wait(61)
    seen, asked = observed(world, told)
    assert asked == [uid]
    assert seen.refusal == Said("FailedCreatePod", QUOTA)


def test_pods_of_an_earlier_attempt_do_not_hide_that_there_are_none() -> None:
    world = half_made()
    world.pods[0]["metadata"]["ownerReferences"][0]["uid"] = "an earlier attempt's"
    world.wait(61)
    uid = world.jobs["sample"]["metadata"]["uid"]
    assert uid in observed(world, {})[1]


def test_of_many_late_pods_those_are_asked_about_of_which_no_status_tells() -> None:
    world = World({"spec.nnodes": 6})
    world.settle()
    world.run_pods(count=6)
    for index, pod in enumerate(world.pods):
        pod["status"]["phase"] = "Pending"
        pod["spec"] = {"nodeName": "node-1"} if index % 2 else {}
    world.pods[1]["metadata"]["deletionTimestamp"] = text_of(world.now)
    uids = [pod["metadata"]["uid"] for pod in world.pods]
    world.wait(31)
    told = {uids[5]: [event(world, "FailedMount", "no such volume")]}
    seen, asked = observed(world, told)
    assert asked[:2] == [uids[3], uids[5]], "they have a node, and the first of all ends"
    assert len(asked) == PODS_ASKED
    assert seen.news == {uids[5]: Said("FailedMount", "no such volume")}
