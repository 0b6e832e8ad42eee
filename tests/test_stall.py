"""Runs that stand still: when that is said, and when they are restarted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from osft_operator.decide import decide
from osft_operator.observed import text_of
from world import World, running, told


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
    assert not world.jobs, "its pod runs on"
    world.pods = []
    world.settle()
    assert list(world.jobs) == ["sample-a2"]


def test_a_run_that_stands_still_without_restarts_left_fails() -> None:
    world = stalled("Restart", **{"spec.maxRestarts": 0})
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "Stalled")
    assert "still at Starting step 7" in world.condition("Failed")["message"]
    assert (world.condition("Stalled")["status"], world.events.count("Stalled")) == ("True", 1)
    assert not world.jobs


def succeeds(world: World) -> None:
    world.tell("sample", "Succeeded")


def is_too_late(world: World) -> None:
    world.wait(10000)


def is_given_up(world: World) -> None:
    world.jobs.clear()


ENDS = [
    ({}, succeeds, "Succeeded", "Done"),
    ({"spec.activeDeadlineSeconds": 9000}, is_too_late, "Failed", "DeadlineExceeded"),
    ({"spec.maxRestarts": 0}, is_given_up, "Failed", "PyTorchJobDeleted"),
]


@pytest.mark.parametrize(("changes", "ends", "phase", "reason"), ENDS)
def test_a_run_that_is_over_does_not_stand_still(
    changes: dict[str, object], ends: Callable[[World], None], phase: str, reason: str
) -> None:
    world = stalled(**changes)
    world.settle()
    words = world.condition("Stalled")["message"]
    ends(world)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == (phase, reason)
    condition = world.condition("Stalled")
    # of a failed job it says so, for tools that know no other condition
    is_stuck, why = ("True", reason) if phase == "Failed" else ("False", "Complete")
    assert (condition["status"], condition["reason"]) == (is_stuck, why)
    assert condition["message"].endswith(words), "what came before the end is still told"
    assert world.events[-2:] == ["NoProgress", reason], "and is no news"


def test_an_attempt_that_is_gone_does_not_stand_still() -> None:
    world = stalled()
    world.settle()
    world.jobs.clear()
    world.claim = None
    world.edit(storage={"checkpoints": {"claimName": "mine"}})
    world.settle()
    assert world.condition("Running")["reason"] == "ClaimNotFound"
    condition = world.condition("Stalled")
    assert (condition["status"], condition["reason"]) == ("False", "NotRunning")


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
