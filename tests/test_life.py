"""Restarts that are counted, and waits and deadlines that are kept."""

from __future__ import annotations

import datetime

import pytest

from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from osft_operator.restarts import wait_seconds
from world import running


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
