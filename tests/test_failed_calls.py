"""A call that the API server does not take is told in its words, and nothing is claimed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from osft_operator.actions import Decision
from osft_operator.failed_calls import not_done, not_read
from osft_operator.names import QUEUE_LABEL
from world import World, running, told

WEBHOOK = 'failed calling webhook "validator.pytorchjob": connection refused'


def attempt_failed() -> World:
    world = running({"spec.maxRestarts": 9})
    world.tell("sample", "Failed")
    world.step()
    return world


def suspended(**labels: str) -> World:
    world = running(labels=labels)
    world.edit(suspend=True)
    world.step()
    return world


def resumed() -> World:
    world = suspended()
    world.settle()
    world.edit(suspend=False)
    return world


def past_its_deadline() -> World:
    world = running({"spec.activeDeadlineSeconds": 10})
    world.wait(11)
    world.step()
    return world


def past_its_time_to_live() -> World:
    world = running({"spec.ttlSecondsAfterFinished": 1})
    world.tell("sample", "Succeeded")
    world.settle()
    world.wait(2)
    return world


def begun() -> World:
    world = World()
    world.step()
    return world


def begun_on_a_claim() -> World:
    world = World({"spec.storage.checkpoints": {"claimName": "mine"}})
    world.claim = {"metadata": {"name": "mine"}}
    world.step()
    return world


CALLS = [
    (begun, "PersistentVolumeClaim sample-checkpoints could not be made", "Running", "Pending"),
    (begun_on_a_claim, "PyTorchJob sample could not be made", "Running", "Pending"),
    (attempt_failed, "PyTorchJob sample could not be deleted", "Running", "Restarting"),
    (suspended, "PyTorchJob sample could not be suspended", "Suspended", "Suspending"),
    (
        lambda: suspended(**{QUEUE_LABEL: "team"}),
        "PyTorchJob sample could not be deleted",
        "Suspended",
        "Suspending",
    ),
    (resumed, "PyTorchJob sample could not be resumed", "Suspended", "Suspended"),
    (past_its_deadline, "PyTorchJob sample could not be deleted", "Running", "Failed"),
    (past_its_time_to_live, "OSFTJob sample could not be deleted", "Running", "Succeeded"),
]


def failing(world: World) -> Decision:
    """A pass whose first action fails once more."""
    decision = world.step(act=False, record=False)
    return not_done(decision, world.body, decision.actions[0], WEBHOOK, world.now)


@pytest.mark.parametrize(("scene", "lead", "condition", "phase"), CALLS)
def test_a_call_that_fails_is_told_once_and_the_status_says_what_is(
    scene: Callable[[], World], lead: str, condition: str, phase: str
) -> None:
    world = scene()
    first = failing(world)
    assert [event.reason for event in first.events][-1] == "WriteFailed"
    world.body["status"] = first.status
    said = world.condition(condition)
    assert said["message"] == f"{lead}; it is tried again: {WEBHOOK}"
    assert world.status["phase"] == phase
    if phase != "Succeeded":
        assert world.status["waitingFor"]["name"] in lead
    for _ in range(2):
        world.wait(15)
        again = failing(world)
        assert again.status == first.status, "a write would wake it at once"
        assert again.events == (), "told once"
    world.settle()
    assert WEBHOOK not in str(world.status), "what is over is not said any more"


def test_pods_train_on_while_the_suspension_fails() -> None:
    world = suspended()
    told(world, 5)
    decision = failing(world)
    world.body["status"] = decision.status
    assert world.condition("Running")["status"] == "True"
    assert world.condition("Suspended")["status"] == "False"
    assert decision.poll, "their progress is followed on"
    assert world.status["progress"]["step"] == 5


def test_what_cannot_be_read_is_told_and_nothing_else_changes() -> None:
    for world, status in ((running(), "True"), (begun(), "False")):
        first = not_read(world.observed(), "403: claims is forbidden", world.now)
        world.body["status"] = first.status
        said = world.condition("Running")
        assert (said["status"], said["message"][-24:]) == (status, "403: claims is forbidden")
        assert world.status["phase"] == ("Running" if status == "True" else "Pending")
        again = not_read(world.observed(), "403: claims is forbidden", world.now)
        assert (again.status, again.events) == (first.status, ())
