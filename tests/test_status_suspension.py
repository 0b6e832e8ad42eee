"""Suspended, queued, resumed, past its deadline, gone after a time: what time does to a job."""

from __future__ import annotations

import pytest

from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from world import World, running


def test_suspend_and_resume_without_a_queue() -> None:
    world = running()
    world.edit(suspend=True)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Suspended", "SuspendRequested")
    assert world.jobs["sample"]["spec"]["runPolicy"]["suspend"] is True
    world.wait(100)
    world.edit(suspend=False)
    world.settle()
    assert world.jobs["sample"]["spec"]["runPolicy"]["suspend"] is False
    assert world.status["phase"] == "Starting"
    assert world.condition("Suspended")["lastTransitionTime"] == text_of(world.now)
    assert world.status["restarts"] == 0
    assert "Resumed" in world.events


def test_suspend_and_resume_in_a_queue_gives_the_quota_back() -> None:
    world = running(labels={QUEUE_LABEL: "team"})
    world.edit(suspend=True)
    world.settle()
    assert not world.jobs
    assert world.status["phase"] == "Suspended"
    world.edit(suspend=False)
    world.settle()
    assert list(world.jobs) == ["sample-a2"]
    assert world.jobs["sample-a2"]["metadata"]["labels"][QUEUE_LABEL] == "team"
    assert world.status["restarts"] == 0


@pytest.mark.parametrize("labels", [{}, {QUEUE_LABEL: "team"}])
def test_suspended_is_said_only_once_no_pod_is_left(labels: dict[str, str]) -> None:
    world = running({"spec.activeDeadlineSeconds": 100}, labels=labels)
    world.lingers = True
    world.edit(suspend=True)
    world.step()
    assert (world.status["phase"], world.status["reason"]) == ("Suspending", "Suspending")
    assert world.condition("Running")["status"] == "True", "its pods train on"
    assert world.settle().poll, "and are asked on"
    assert world.condition("Suspended")["status"] == "False"
    assert "pod sample-master-0 ends since" in world.condition("Suspended")["message"]
    assert world.status["waitingFor"]["name"] == "sample-master-0"
    world.wait(120)
    world.settle()
    assert world.status["phase"] == "Suspending", "no deadline counts while it stops"
    world.wait(600)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Suspending", "NodeLost")
    world.pods_end()
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Suspended", "SuspendRequested")
    assert world.condition("Running")["status"] == "False"
    assert world.events.count("SuspendRequested") == 1


def test_a_job_that_begins_suspended_makes_nothing() -> None:
    world = World({"spec.suspend": True})
    world.settle()
    assert world.status["phase"] == "Suspended"
    assert "startTime" not in world.status, "so that it can still be edited"
    assert not world.jobs
    world.edit(suspend=False)
    world.settle()
    assert list(world.jobs) == ["sample"]


def test_kueue_holds_a_job() -> None:
    world = World({"spec.queueName": "team"})
    world.step()
    world.step()
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = True
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Queued", "Queued")
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = False
    world.settle()
    assert world.status["phase"] == "Starting"


def test_the_deadline_counts_active_time_only() -> None:
    world = running({"spec.activeDeadlineSeconds": 100})
    world.wait(60)
    world.edit(suspend=True)
    world.settle()
    world.wait(1000)
    assert world.step().requeue_after is None
    world.edit(suspend=False)
    world.settle()
    world.run_pods()
    world.wait(60)
    assert world.settle().requeue_after == pytest.approx(40)
    world.wait(40)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "DeadlineExceeded")
    assert not world.jobs


def test_a_finished_job_goes_after_its_time_to_live() -> None:
    world = running({"spec.ttlSecondsAfterFinished": 50})
    world.tell("sample", "Succeeded")
    assert world.settle().requeue_after == 50
    world.wait(49)
    world.step()
    assert not world.gone
    world.wait(1)
    world.step()
    assert world.gone
