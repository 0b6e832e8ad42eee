"""What stands in a job's way: its own fields, the policy, other objects, the API server."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest

from osft_operator.decide import refused
from osft_operator.names import QUEUE_LABEL
from world import World, running


def test_a_wrong_spec_is_a_condition_with_the_field() -> None:
    world = World({"spec.training.maxSeqLen": 4096})
    decision = world.settle()
    assert world.status["phase"] == "Pending"
    assert world.status["reason"] == "InvalidSpec"
    assert "spec.training: maxSeqLen 4096" in world.condition("Accepted")["message"]
    assert decision.requeue_after is None
    assert world.events == ["InvalidSpec"]
    world.body["spec"]["training"]["maxSeqLen"] = 512
    world.settle()
    assert list(world.jobs) == ["sample"]


def tightened(changes: dict[str, object], **metadata: object) -> World:
    """A job that runs when an upgrade makes its spec invalid."""
    world = running(changes, **metadata)
    world.body["spec"]["training"]["maxSeqLen"] = 4096
    world.settle()
    assert world.condition("Accepted")["reason"] == "InvalidSpec"
    assert "maxSeqLen 4096" in world.condition("Accepted")["message"]
    assert (world.status["phase"], world.status["reason"]) == ("Running", "PodsRunning")
    return world


def forbidden(changes: dict[str, object], **metadata: object) -> World:
    """A job that runs when the administrator forbids what it asks for."""
    world = running(changes, **metadata)
    world.body["spec"]["podTemplate"] = {"spec": {"hostNetwork": True}}
    return world


@pytest.mark.parametrize("ill", [tightened, forbidden])
def test_a_run_that_may_not_begin_any_more_is_followed_to_its_end(
    ill: Callable[..., World],
) -> None:
    world = ill({})
    world.end(75)
    world.settle()
    assert world.status["restarts"] == 1
    assert world.settle().poll
    world.tell("sample", "Succeeded")
    world.settle()
    assert world.status["phase"] == "Succeeded"


@pytest.mark.parametrize("ill", [tightened, forbidden])
def test_a_run_that_may_not_begin_any_more_keeps_its_deadline_and_its_budget(
    ill: Callable[..., World],
) -> None:
    world = ill({"spec.activeDeadlineSeconds": 100})
    assert world.settle().requeue_after == 100
    world.wait(100)
    world.settle()
    assert world.status["reason"] == "DeadlineExceeded"
    assert not world.jobs
    world = ill({"spec.maxRestarts": 0})
    world.end(75)
    world.settle()
    assert world.status["reason"] == "MaxRestartsExceeded"


@pytest.mark.parametrize("labels", [{}, {QUEUE_LABEL: "team"}])
@pytest.mark.parametrize("ill", [tightened, forbidden])
def test_a_run_that_may_not_begin_any_more_is_suspended(
    ill: Callable[..., World], labels: dict[str, str]
) -> None:
    world = ill({}, labels=labels)
    world.edit(suspend=True)
    world.settle()
    assert world.status["phase"] == "Suspended"
    assert not world.jobs or world.jobs["sample"]["spec"]["runPolicy"]["suspend"] is True
    world.edit(suspend=False)
    world.settle()
    if labels:
        assert not world.jobs, "nothing is made of what is not allowed"
        assert world.status["phase"] == "Pending"
    else:
        assert world.jobs["sample"]["spec"]["runPolicy"]["suspend"] is False


@pytest.mark.parametrize(("ill", "reason"), [(tightened, "InvalidSpec"), (forbidden, "Denied")])
def test_between_two_attempts_nothing_is_made_and_the_deadline_goes_on(
    ill: Callable[..., World], reason: str
) -> None:
    world = ill({"spec.activeDeadlineSeconds": 100})
    world.wait(20)
    world.tell("sample", "Failed")
    assert world.settle().requeue_after == 80
    assert not world.jobs
    assert (world.status["phase"], world.status["reason"]) == ("Pending", reason)
    world.edit(suspend=True)
    world.settle()
    assert world.status["phase"] == "Suspended"
    world.wait(1000)
    world.edit(suspend=False)
    assert world.settle().requeue_after == 100
    world.wait(100)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "DeadlineExceeded")


def test_a_lost_status_of_an_invalid_job_is_found_again() -> None:
    world = running({"spec.nnodes": 2}, count=2)
    world.body["spec"]["training"]["maxSeqLen"] = 4096
    del world.body["status"]
    world.settle()
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    assert world.condition("Running")["message"] == "2 of 2 pods run"


def test_a_refused_wish_is_a_condition_with_the_field() -> None:
    world = World({"spec.podTemplate": {"spec": {"hostNetwork": True}}})
    world.settle()
    assert world.status["reason"] == "Denied"
    assert "spec.podTemplate.spec.hostNetwork" in world.condition("Accepted")["message"]
    assert not world.jobs


def test_a_run_is_not_given_up_while_its_kind_cannot_be_seen() -> None:
    world = running()
    seen, world.jobs, world.kind_present = dict(world.jobs), {}, False
    world.settle()
    assert world.condition("Running")["reason"] == "PyTorchJobKindMissing"
    assert world.status["restarts"] == 0
    world.jobs, world.kind_present = seen, True
    world.settle()
    assert list(world.jobs) == ["sample"]
    assert world.status["phase"] == "Running"


def test_the_missing_kind_is_said_and_picked_up() -> None:
    world = World()
    world.kind_present = False
    decision = world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Pending", "PyTorchJobKindMissing")
    assert "startTime" not in world.status
    assert decision.requeue_after == 30
    world.kind_present = True
    world.settle()
    assert list(world.jobs) == ["sample"]


def test_somebody_elses_pytorch_job_is_left_alone() -> None:
    world = World()
    owner = {"controller": True, "uid": "other", "kind": "Sweep", "name": "grid"}
    other = {"metadata": {"name": "sample", "uid": "x", "ownerReferences": [owner]}, "spec": {}}
    world.jobs["sample"] = other
    world.settle()
    assert world.status["reason"] == "NameTaken"
    assert "Sweep grid" in world.condition("Running")["message"]
    assert world.jobs["sample"] is other


@pytest.mark.parametrize(
    ("labels", "owner", "reason"),
    [
        ({"osft.dev/job": "sample"}, None, None),
        ({}, None, "ClaimTaken"),
        ({"osft.dev/job": "sample"}, "uid-0", "ClaimTaken"),
        ({"osft.dev/job": "sample"}, "uid-1", None),
    ],
)
def test_a_claim_that_is_there(
    labels: dict[str, str], owner: str | None, reason: str | None
) -> None:
    world = World()
    references = [{"controller": True, "uid": owner, "kind": "OSFTJob", "name": "s"}]
    world.claim = {
        "metadata": {
            "name": "sample-checkpoints",
            "labels": labels,
            "ownerReferences": references if owner else [],
        }
    }
    world.settle()
    assert (world.status["reason"] == reason) if reason else list(world.jobs) == ["sample"]


def test_a_users_claim_must_be_there() -> None:
    world = World({"spec.storage.checkpoints": {"claimName": "mine"}})
    assert world.settle().requeue_after == 30
    assert world.status["reason"] == "ClaimNotFound"
    world.claim = {"metadata": {"name": "mine"}}
    world.settle()
    assert list(world.jobs) == ["sample"]


def test_the_api_servers_refusal_stays_until_it_takes_it() -> None:
    world = World()
    world.step()
    decision = refused(world.step(act=False, record=False), world.body, "422: no", world.now)
    assert [event.reason for event in decision.events] == ["Refused"]
    status = world.body["status"] = decision.status
    assert (status["phase"], status["reason"]) == ("Pending", "Refused")
    world.wait(300)
    decision = world.step(act=False, record=False)
    assert decision.actions, "it is tried again"
    assert decision.status == status, "and nothing is written, which would wake it at once"
    world.settle()
    assert world.condition("Accepted")["status"] == "True"


def test_what_is_refused_for_a_running_attempt_is_told_once_and_it_is_asked_on() -> None:
    world = running()
    world.edit(suspend=True)
    world.step()
    asked = world.step(act=False, record=False)
    assert [type(action).__name__ for action in asked.actions] == ["SuspendPyTorchJob"]
    first = refused(asked, world.body, "denied by a webhook", world.now)
    assert [event.reason for event in first.events] == ["Refused"]
    world.body["status"] = first.status
    assert first.requeue_after == 30
    began = world.now
    for since, wait in ((300, 75), (600, 150), (1200, 300), (9000, 300)):
        world.now = began + datetime.timedelta(seconds=since)
        again = refused(
            world.step(act=False, record=False), world.body, "denied by a webhook", world.now
        )
        assert again.status == first.status, "a write would wake it at once"
        assert (again.events, again.requeue_after) == ((), wait)
    world.edit(suspend=False)
    running_on = world.settle()
    told = refused(running_on, world.body, "denied", world.now)
    assert told.poll == running_on.poll != ()


def test_what_else_was_decided_is_told_though_the_job_is_refused() -> None:
    world = World()
    world.step()
    world.edit(suspend=True)
    world.settle()
    world.edit(suspend=False)
    resumed = world.step(act=False, record=False)
    made = [type(action).__name__ for action in resumed.actions]
    assert made == ["CreateClaim", "CreatePyTorchJob"]
    told = refused(resumed, world.body, "422: no", world.now)
    assert [event.reason for event in told.events] == ["Resumed", "Refused"]
    world.body["status"] = told.status
    again = refused(world.step(act=False, record=False), world.body, "422: no", world.now)
    assert (again.status, again.events) == (told.status, ()), "once"


def test_a_refusal_takes_the_place_of_what_was_thought_of_the_spec() -> None:
    """Else both would be news in each pass: the status has room for one of them."""
    world = running()
    world.edit(suspend=True)
    world.step()
    world.body["spec"]["training"]["maxSeqLen"] = 4096
    for _ in range(2):
        asked = world.step(act=False, record=False)
        assert [event.reason for event in asked.events] == ["InvalidSpec"]
        told = refused(asked, world.body, "denied", world.now)
        assert "InvalidSpec" not in [event.reason for event in told.events]
        world.body["status"] = told.status


def test_a_pod_that_cannot_start_is_explained() -> None:
    world = running()
    status = world.pods[0]["status"]
    status["phase"] = "Pending"
    status["containerStatuses"][0]["state"] = {
        "waiting": {"reason": "ImagePullBackOff", "message": "no such image"}
    }
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Starting", "ImagePullBackOff")
    assert "no such image" in world.condition("Running")["message"]
