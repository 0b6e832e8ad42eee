"""Jobs in a Kueue queue, and PyTorchJobs that Kueue manages elsewhere."""

from __future__ import annotations

import pytest

from world import World, running


def queued() -> World:
    world = World({"spec.queueName": "team"})
    world.step()
    world.step()
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = True
    return world


def workload(*conditions: dict[str, str], **spec: object) -> dict[str, object]:
    return {"metadata": {"name": "w"}, "spec": spec, "status": {"conditions": list(conditions)}}


PENDING = {
    "type": "QuotaReserved",
    "status": "False",
    "reason": "Pending",
    "message": "couldn't assign flavors to pod set master: insufficient quota for nvidia.com/gpu",
}
PREEMPTED = {
    "type": "Evicted",
    "status": "True",
    "reason": "Preempted",
    "message": "Preempted to accommodate a workload with higher priority",
}


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([PENDING], "waits in queue team: Pending: couldn't assign flavors"),
        ([PREEMPTED, PENDING], "Preempted: Preempted to accommodate"),
        ([], "waits in queue team"),
        ([{"type": "QuotaReserved", "status": "True"}], "waits in queue team"),
    ],
)
def test_a_queued_job_says_why_in_kueues_words(
    conditions: list[dict[str, str]], words: str
) -> None:
    world = queued()
    world.workload = workload(*conditions)
    decision = world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Queued", "Queued")
    assert words in world.condition("Suspended")["message"]
    assert decision.requeue_after == 30
    world.wait(3600)
    assert world.settle().requeue_after == 300, "less often the longer it takes"


def test_kueues_suspension_is_never_fought() -> None:
    world = queued()
    world.workload = workload(active=False)
    for _ in range(5):
        world.wait(60)
        assert world.step().actions == ()
    assert "not active" in world.condition("Suspended")["message"]
    assert world.jobs["sample"]["spec"]["runPolicy"]["suspend"] is True


def test_preempted_by_kueue_and_admitted_again_costs_no_restart() -> None:
    world = running({"spec.queueName": "team", "spec.maxRestarts": 0})
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = True
    world.pods = []
    world.settle()
    assert world.status["phase"] == "Queued"
    world.wait(1000)
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = False
    world.settle()
    world.run_pods()
    world.settle()
    assert (world.status["phase"], world.status["restarts"]) == ("Running", 0)
    assert world.made == 1


def test_a_pytorch_job_that_is_managed_elsewhere_is_left_alone() -> None:
    world = World({"spec.queueName": "team", "spec.stall": {"timeoutSeconds": 60}})
    world.settle()
    policy = world.jobs["sample"]["spec"]["runPolicy"]
    policy["managedBy"] = "kueue.x-k8s.io/multikueue"
    world.wait(3600)
    for _ in range(3):
        assert world.step().actions == ()
    assert (world.status["phase"], world.status["reason"]) == ("Starting", "Waiting")
    assert "multikueue" in world.condition("Running")["message"]
    world.tell("sample", "Running")
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Running", "ManagedElsewhere")
    world.wait(3600)
    world.settle()
    assert world.condition("Stalled")["status"] == "False", "nothing can be heard from there"
    assert policy["managedBy"] == "kueue.x-k8s.io/multikueue"
    world.tell("sample", "Succeeded")
    world.settle()
    assert world.status["phase"] == "Succeeded"
