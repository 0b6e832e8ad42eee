"""Restarts that are counted, waits and deadlines that are kept, runs that stand still, queues."""

from __future__ import annotations

import dataclasses
import datetime

import pytest

from osft_operator.decide import decide
from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from osft_operator.restarts import wait_seconds
from osft_trainer.report import Progress
from world import World


def running(changes: dict[str, object] | None = None, count: int = 1, **metadata: object) -> World:
    world = World({"spec.nnodes": count, **(changes or {})}, **metadata)
    world.settle()
    world.run_pods(count=count)
    world.settle()
    return world


def told(world: World, step: int, **changes: object) -> None:
    """Rank 0 answers."""
    attempt = world.status["attempt"]
    world.progress = Progress.model_validate(
        {"run_id": "uid-1", "step": step, "total_steps": 1000, "attempt": attempt, **changes}
    )


def test_an_evicted_pod_is_a_restart() -> None:
    world = running()
    for restarts in (1, 2, 3):
        world.wait(100)
        world.replace_pod()
        world.settle()
        assert world.status["restarts"] == restarts
        assert world.status["phase"] == "Running"
    world.wait(100)
    world.replace_pod()
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "MaxRestartsExceeded")
    assert world.status["restarts"] == 3


def test_a_pod_that_was_lost_while_the_operator_was_away_is_counted() -> None:
    world = running()
    world.pods = []
    world.wait(3600)
    world.pods = [world._pod("sample", 0)]
    world.settle()
    assert world.status["restarts"] == 1


def test_containers_restarts_come_on_top_of_a_lost_pods() -> None:
    world = running({"spec.maxRestarts": 9})
    world.end(75)
    world.settle()
    world.wait(100)
    world.replace_pod()
    world.settle()
    assert world.status["restarts"] == 2
    world.end(75)
    world.settle()
    assert world.status["restarts"] == 3


@pytest.mark.parametrize("who_is_seen_first", ["the lost pod", "the others"])
def test_one_lost_pod_of_a_gang_is_one_restart(who_is_seen_first: str) -> None:
    """The others fail with it; whichever is seen first, it is one failure."""
    world = running({"spec.maxRestarts": 9}, count=3)
    for restarts in (1, 2):
        world.wait(100)
        if who_is_seen_first == "the lost pod":
            world.replace_pod(2)
            world.settle()
        for index in (0, 1):
            world.end(75, index=index)
        world.settle()
        if who_is_seen_first == "the others":
            world.replace_pod(2)
            world.settle()
        assert world.status["restarts"] == restarts


def test_all_pods_lost_at_once_are_one_restart() -> None:
    world = running(count=3)
    world.wait(500)
    for index, seconds in enumerate((0, 5, 20)):
        world.wait(seconds)
        world.replace_pod(index)
        world.settle()
    assert world.status["restarts"] == 1


def test_restarts_are_counted_on_after_a_suspension() -> None:
    world = running({"spec.maxRestarts": 3})
    world.end(75)
    world.end(75)
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.wait(500)
    world.edit(suspend=False)
    world.settle()
    world.run_pods()
    world.settle()
    assert world.status["restarts"] == 2
    world.end(75)
    world.settle()
    assert world.status["restarts"] == 3
    world.end(75)
    world.settle()
    assert world.status["reason"] == "MaxRestartsExceeded"


def test_a_lower_budget_ends_no_healthy_run_but_the_next_failure_does() -> None:
    world = running({"spec.maxRestarts": 5})
    for _ in range(3):
        world.end(75)
    world.settle()
    world.edit(maxRestarts=1)
    world.wait(1000)
    world.settle()
    assert (world.status["phase"], world.status["restarts"]) == ("Running", 3)
    world.end(75)
    world.settle()
    assert (world.status["phase"], world.status["restarts"]) == ("Failed", 3)


def test_attempts_wait_longer_each_time_and_across_operators() -> None:
    assert [wait_seconds(n) for n in (0, 1, 2, 3, 4, 7, 99)] == [0, 0, 10, 20, 40, 300, 300]
    world = running({"spec.maxRestarts": 9})
    world.tell("sample", "Failed")
    world.settle()
    assert list(world.jobs) == ["sample-a2"], "no wait after the first failure"
    world.run_pods("sample-a2")
    world.settle()
    world.tell("sample-a2", "Failed")
    world.settle()
    assert not world.jobs
    assert world.status["phase"] == "Restarting"
    assert "attempt 3 follows in 10s" in world.condition("Running")["message"]
    due = world.status["nextAttemptTime"]
    assert due == text_of(world.now + datetime.timedelta(seconds=10))
    world.wait(4)
    assert world.settle().requeue_after == pytest.approx(6)
    assert world.status["nextAttemptTime"] == due, "all that there is of the wait is recorded"
    world.wait(6)
    world.settle()
    assert list(world.jobs) == ["sample-a3"]


def test_a_deadline_comes_also_while_an_attempt_waits() -> None:
    world = running({"spec.maxRestarts": 9, "spec.activeDeadlineSeconds": 100})
    world.wait(95)
    world.tell("sample", "Failed")
    world.settle()
    world.run_pods("sample-a2")
    world.tell("sample-a2", "Failed")
    assert world.settle().requeue_after == pytest.approx(5)
    world.wait(5)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "DeadlineExceeded")


def test_a_resumed_job_does_not_wait() -> None:
    world = running({"spec.maxRestarts": 9}, labels={QUEUE_LABEL: "team"})
    for _ in range(5):
        world.end(75)
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert list(world.jobs) == ["sample-a2"]


# a run that stands still


def stalled(action: str = "Report", **changes: object) -> World:
    """A job at step 7 that has stood still for its 600 seconds."""
    world = running({"spec.stall": {"timeoutSeconds": 600, "action": action}, **changes})
    world.wait(30)
    told(world, 7)
    world.settle()
    world.wait(599)
    assert world.settle().requeue_after == pytest.approx(1)
    assert world.condition("Stalled")["status"] == "False"
    world.wait(1)
    return world


def test_a_run_that_stands_still_is_said_and_goes_on() -> None:
    world = stalled()
    world.settle()
    condition = world.condition("Stalled")
    assert (condition["status"], condition["reason"]) == ("True", "NoProgress")
    assert "still at Starting step 7" in condition["message"]
    assert (world.status["phase"], world.status["reason"]) == ("Running", "NoProgress")
    assert world.events.count("NoProgress") == 1
    assert world.made == 1
    world.wait(50)
    told(world, 8)
    world.settle()
    assert world.condition("Stalled")["reason"] == "Progressing"
    assert world.status["reason"] == "PodsRunning"
    assert world.settle().requeue_after == pytest.approx(600)


def test_a_run_that_stands_still_is_restarted_where_asked_and_counted() -> None:
    world = stalled("Restart")
    world.step()
    assert world.condition("Stalled")["status"] == "True", "said before anything is done"
    assert world.jobs
    world.settle()
    assert list(world.jobs) == ["sample-a2"]
    assert world.status["restarts"] == 1
    assert world.condition("Stalled")["reason"] == "Restarted"
    world.run_pods("sample-a2")
    world.wait(599)
    world.settle()
    assert world.condition("Stalled")["status"] == "False", "the time of the new attempt counts"


def test_an_attempt_whose_owner_was_taken_off_is_not_left_to_run_beside_the_next() -> None:
    world = stalled("Restart")
    world.jobs["sample"]["metadata"]["ownerReferences"] = []
    world.settle()
    assert world.status["attempt"] == 2
    assert list(world.jobs) == ["sample"]
    assert world.condition("Running")["reason"] == "NameTaken"
    assert "PyTorchJob sample is there, owned by nobody" in world.condition("Running")["message"]
    world.jobs.clear()
    world.settle()
    assert list(world.jobs) == ["sample-a2"]


def test_a_run_that_stands_still_without_restarts_left_fails() -> None:
    world = stalled("Restart", **{"spec.maxRestarts": 0})
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "Stalled")
    assert "still at Starting step 7" in world.condition("Failed")["message"]
    assert not world.jobs


def test_what_was_never_heard_is_no_reason_to_restart() -> None:
    world = running({"spec.stall": {"timeoutSeconds": 600, "action": "Restart"}})
    world.wait(600)
    world.settle()
    words = world.condition("Stalled")["message"]
    assert world.condition("Stalled")["status"] == "True"
    assert "NetworkPolicy" in words
    assert "not restarted" in words
    assert world.made == 1


def test_what_is_not_heard_now_is_no_reason_to_restart() -> None:
    world = stalled("Restart")
    world.progress, world.listening = None, 3600.0
    world.settle()
    assert world.condition("Stalled")["status"] == "True"
    assert "nothing is heard from it now" in world.condition("Stalled")["message"]
    assert world.made == 1


def test_pods_that_cannot_be_asked_are_said_to_stand_still() -> None:
    world = running({"spec.stall": {"timeoutSeconds": 600}})
    del world.pods[0]["status"]["podIP"]
    world.listening = 0.0
    world.wait(600)
    world.settle()
    assert world.condition("Stalled")["status"] == "True"


@pytest.mark.parametrize("step", [7, 900])
def test_a_new_operator_listens_before_it_judges(step: int) -> None:
    """It was away for an hour: the recorded step is old, the run may be well."""
    world = stalled("Restart")
    world.wait(3600)
    world.progress, world.listening = None, 0.0
    assert world.settle().requeue_after == pytest.approx(10)
    assert world.condition("Stalled")["status"] == "False"
    told(world, step)
    world.settle()
    assert world.made == (2 if step == 7 else 1)


def test_the_time_of_a_step_is_when_it_was_heard_first() -> None:
    """The status of a step is written late; what counts is when the pod told of it."""
    world = running({"spec.stall": {"timeoutSeconds": 600}})
    told(world, 7)
    observed = world.observed()
    since = world.now
    world.wait(25)
    decision = decide(dataclasses.replace(observed, progress_since=since), world.now)
    assert decision.status["progress"]["advancedTime"] == text_of(since)
    assert decision.requeue_after == pytest.approx(575)


@pytest.mark.parametrize("change", [{"phase": "Saving"}, {"latest_checkpoint": "/c/step-00000007"}])
def test_a_phase_or_a_checkpoint_is_progress(change: dict[str, str]) -> None:
    world = stalled()
    told(world, 7, **change)
    world.settle()
    assert world.condition("Stalled")["status"] == "False"


def test_a_suspended_run_does_not_stand_still() -> None:
    world = stalled()
    world.settle()
    world.edit(suspend=True)
    world.settle()
    assert world.condition("Stalled")["reason"] == "NotRunning"
    world.wait(5000)
    assert world.settle().requeue_after is None


# queues


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
