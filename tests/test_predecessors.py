"""No attempt is made while a pod of an earlier one is left; the status says what it waits for."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest
from rich.console import Console

from job_samples import job
from osft_operator import run_folder
from osft_operator.cache import Cache, trimmed
from osft_operator.kinds import PODS
from osft_operator.local_pods import pods
from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from osft_operator.remote_view import view
from osft_operator.render import pytorch_job, resolve
from osft_operator.run_folder import RunFolder
from osft_operator.spec import OSFTJob
from world import SETTINGS, START, World, running, told


def lingering(changes: dict[str, object] | None = None, **metadata: object) -> World:
    """A job that runs, whose pod takes its time to end."""
    world = running({"spec.maxRestarts": 9, **(changes or {})}, **metadata)
    world.lingers = True
    world.wait(100)
    return world


def deleted_by_somebody() -> World:
    world = lingering()
    world.delete_pods("sample")
    world.jobs.clear()
    return world


def failed() -> World:
    world = lingering()
    world.tell("sample", "Failed")
    return world


def stalled() -> World:
    world = lingering({"spec.stall": {"timeoutSeconds": 60, "action": "Restart"}})
    told(world, 5)
    world.settle()
    world.wait(61)
    return world


def resumed_in_a_queue() -> World:
    world = lingering(labels={QUEUE_LABEL: "team"})
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    return world


def resumed() -> World:
    world = lingering()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    return world


def applied_again() -> World:
    """The OSFTJob was deleted and applied again: another uid, no status."""
    world = deleted_by_somebody()
    world.body["metadata"]["uid"] = "uid-2"
    del world.body["status"]
    return world


def applied_again_before_the_cluster_has_deleted_anything() -> World:
    world = lingering()
    world.body["metadata"]["uid"] = "uid-2"
    del world.body["status"]
    return world


def gone_before_it_was_recorded() -> World:
    """The operator ended before it wrote which PyTorchJob it had made, and that was deleted."""
    world = deleted_by_somebody()
    del world.status["pyTorchJobUID"]
    return world


WAYS = [
    deleted_by_somebody,
    failed,
    stalled,
    resumed_in_a_queue,
    resumed,
    applied_again,
    applied_again_before_the_cluster_has_deleted_anything,
    gone_before_it_was_recorded,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_next_attempt_waits_until_the_pods_of_before_have_ended(
    way: Callable[[], World],
) -> None:
    world = way()
    made = world.made
    decision = world.settle()
    assert world.made == made, "the old pod still saves"
    assert world.condition("Running")["reason"] in ("PodsStopping", "Waiting")
    assert world.status["waitingFor"]["name"] in ("sample-master-0", "sample")
    assert decision.requeue_after is not None
    assert decision.requeue_after <= 10
    world.delete_pods("sample")
    world.jobs = {name: job for name, job in world.jobs.items() if name != "sample"} or world.jobs
    world.settle()
    assert world.condition("Running")["reason"] == "PodsStopping"
    waits = world.status["waitingFor"]
    assert (waits["kind"], waits["name"]) == ("Pod", "sample-master-0")
    assert waits["since"] <= text_of(world.now)
    world.pods_end()
    if way in (applied_again_before_the_cluster_has_deleted_anything,):
        world.jobs.clear()
    world.settle()
    assert len(world.jobs) == 1
    assert not world.pods


LOST = "sample-master-0: its node node-1 does not answer"


@pytest.mark.parametrize("sign", ["node controller", "grace period long over"])
@pytest.mark.parametrize("way", [deleted_by_somebody, failed, applied_again])
def test_a_node_that_does_not_answer_is_named_with_the_cure(
    way: Callable[[], World], sign: str
) -> None:
    world = way()
    world.settle()
    asked = world.status["waitingFor"]["since"]
    if sign == "node controller":
        silent = text_of(world.now)
        condition = {"type": "Ready", "status": "False", "lastTransitionTime": silent}
        world.pods[0]["status"]["conditions"] = [condition]
    else:
        world.wait(600 + 61)
    for _ in range(2):
        decision = world.settle()
        running_ = world.condition("Running")
        assert running_["reason"] == world.status["reason"] == "NodeLost"
        assert world.status["phase"] == ("Pending" if way is applied_again else "Restarting")
        for words in (
            LOST,
            "since 20",
            "kubectl delete pod sample-master-0 -n NAMESPACE --force --grace-period=0",
            "kubectl taint nodes node-1 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
        ):
            assert words in running_["message"]
        assert world.status["waitingFor"]["since"] == asked, "since it was told to end"
        assert decision.actions == (), "nothing is ended by force"
        assert decision.requeue_after is not None
        world.wait(36_000)
    assert "NodeLost" in world.events
    console = Console(width=400)
    with console.capture() as shown:
        console.print(view(world.body))
    assert f"Pod sample-master-0 since {asked}" in shown.get()
    world.pods, world.jobs = [], {}
    world.settle()
    assert len(world.jobs) == 1


def test_orphans_that_nobody_ends_are_named() -> None:
    """`kubectl delete pytorchjob --cascade=orphan`: its pods train on without an owner."""
    world = running({"spec.maxRestarts": 9})
    world.jobs.clear()
    world.pods[0]["metadata"]["ownerReferences"] = []
    world.settle()
    assert not world.jobs
    assert world.status["reason"] == "PodsStopping"
    world.wait(100)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Restarting", "PodsNotEnding")
    assert "no owner any more: delete it" in world.condition("Running")["message"]
    world.pods = []
    world.settle()
    assert list(world.jobs) == ["sample-a2"]


def test_what_has_ended_or_is_no_attempts_is_not_waited_for() -> None:
    world = applied_again()
    world.pods[0]["status"]["phase"] = "Succeeded"
    reader = {"name": "look", "labels": {"osft.dev/job": "sample"}, "uid": "r"}
    world.pods.append({"metadata": reader, "status": {"phase": "Running"}})
    world.settle()
    assert list(world.jobs) == ["sample"]


def test_a_pytorch_job_that_others_hold_back_is_named_with_who_does() -> None:
    world = running({"spec.maxRestarts": 9})
    world.jobs["sample"]["metadata"] |= {
        "deletionTimestamp": text_of(world.now),
        "finalizers": ["foregroundDeletion", "example.com/audit"],
    }
    world.pods = []
    world.settle()
    assert world.status["reason"] == "Waiting"
    assert "its finalizers are done: example.com/audit" in world.condition("Running")["message"]
    assert world.status["waitingFor"] == {
        "kind": "PyTorchJob",
        "name": "sample",
        "since": text_of(world.now),
    }


def test_the_training_can_still_be_edited_while_an_earlier_run_ends() -> None:
    world = applied_again()
    world.settle()
    assert world.status["phase"] == "Pending"
    assert "startTime" not in world.status
    assert world.now - START < datetime.timedelta(hours=1)


def test_another_jobs_pods_in_the_same_folder_are_waited_for() -> None:
    world = World()
    world.neighbours = [
        {
            "metadata": {"name": "other-master-0", "labels": {"osft.dev/job": "other"}},
            "status": {"phase": "Running"},
        }
    ]
    for attempt, phase in ((1, "Pending"), (2, "Restarting")):
        decision = world.settle()
        assert not world.jobs
        assert (world.status["phase"], world.status["reason"]) == (phase, "FolderInUse")
        assert "pod other-master-0 of OSFTJob other" in world.condition("Running")["message"]
        assert decision.requeue_after == 30
        other = world.neighbours[0]
        other["metadata"]["deletionTimestamp"] = text_of(world.now)
        world.settle()
        assert world.status["reason"] == "PodsStopping", "it may still save"
        world.neighbours = []
        world.settle()
        assert world.status["attempt"] == attempt
        world.run_pods("sample" if attempt == 1 else "sample-a2")
        world.settle()
        del other["metadata"]["deletionTimestamp"]
        if attempt == 1:
            world.tell("sample", "Failed")
            world.neighbours = [other]


CHECKPOINTS = {"claimName": "shared", "mountPath": "/out", "subPath": "team"}


@pytest.mark.parametrize(
    ("changes", "folder"),
    [
        ({}, ("sample-checkpoints", "sample")),
        ({"spec.storage.checkpoints": CHECKPOINTS}, ("shared", "team/sample")),
        (
            {
                "spec.storage.checkpoints": CHECKPOINTS,
                "spec.training.ckptOutputDir": "/out/a/./b$(c)",
            },
            ("shared", "team/a/b$(c)"),
        ),
    ],
)
def test_a_jobs_folder_is_that_of_its_pods(
    changes: dict[str, object], folder: tuple[str, str]
) -> None:
    body = job({"spec.training.ckptOutputDir": None, **changes}, uid="uid-1", namespace="ns")
    whole = OSFTJob.model_validate(body)
    (pod,) = pods(pytorch_job(whole, resolve(whole, SETTINGS)))
    pod["metadata"] |= {"uid": "p", "resourceVersion": "1"}
    assert run_folder.of_job(body) == run_folder.of_pod(pod) == folder
    cache = Cache()
    cache.put(PODS, trimmed(PODS, pod))  # the watches hand on what is trimmed already
    (found,) = cache.writers("ns", run_folder.of_job(body))
    assert found["metadata"]["name"] == "sample-master-0"
    assert cache.writers("ns", RunFolder("shared", "elsewhere")) == []
    cache.put(PODS, {**found, "metadata": {**found["metadata"], "resourceVersion": "2"}})
    cache.remove(PODS, pod)
    assert cache.writers("ns", run_folder.of_job(body)) == []
