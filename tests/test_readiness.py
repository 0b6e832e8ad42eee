"""What kstatus and Argo CD make of an OSFTJob; World asserts the first in every test of decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import kstatus
from job_samples import job
from osft_operator import crd
from osft_operator.actions import Decision
from osft_operator.decide import refused
from osft_operator.internal_error import verdict
from osft_operator.observed import Said
from world import START, World, last_words


def invalid() -> World:
    world = World({"spec.training.maxSeqLen": 99999})
    world.settle()
    return world


def running() -> World:
    world = World()
    world.settle()
    world.run_pods()
    world.settle()
    return world


def still() -> World:
    world = World({"spec.stall": {"timeoutSeconds": 60}})
    world.settle()
    world.run_pods()
    world.settle()
    world.wait(1000)
    world.settle()
    return world


def failed() -> World:
    world = running()
    world.end(2, last_words("BadInput", 2, "data_path: nothing there"))
    world.settle()
    return world


def complete() -> World:
    world = running()
    world.tell("sample", "Succeeded")
    world.settle()
    return world


def mended() -> World:
    world = invalid()
    world.body["spec"]["training"]["maxSeqLen"] = 128
    world.body["metadata"]["generation"] = 2
    world.settle()
    return world


CASES: list[tuple[Callable[[], World], str, str, tuple[str, str]]] = [
    (invalid, "Pending", "Failed", ("True", "InvalidSpec")),
    (mended, "Starting", "InProgress", ("False", "NotStalled")),
    (running, "Running", "InProgress", ("False", "NotYet")),
    (still, "Running", "Failed", ("True", "NoProgress")),
    (failed, "Failed", "Failed", ("True", "BadInput")),
    (complete, "Succeeded", "Current", ("False", "NotYet")),
]


@pytest.mark.parametrize(("made", "phase", "seen", "stalled"), CASES)
def test_each_phase_is_seen_as_what_it_is(
    made: Callable[[], World], phase: str, seen: str, stalled: tuple[str, str]
) -> None:
    world = made()
    assert world.status["phase"] == phase
    assert kstatus.of(world.body) == seen
    condition = world.condition("Stalled")
    assert (condition["status"], condition["reason"]) == stalled
    ready = world.condition("Ready")
    assert ready["status"] == ("True" if phase == "Succeeded" else "False")
    assert ready["reason"] == world.status["reason"]
    events = world.events
    assert len(events) == len(set(events)), "Stalled tells nobody of what another condition told"


def test_a_failure_says_in_both_what_happened() -> None:
    world = failed()
    for kind in ("Ready", "Stalled"):
        assert "data_path: nothing there" in world.condition(kind)["message"]


def test_what_the_server_refuses_is_no_success_and_keeps_its_time() -> None:
    world = World()
    decision = world.step(act=False)
    first = refused(decision, world.body, "exceeded quota", START)
    body = {**world.body, "status": first.status}
    assert kstatus.of(body) == "Failed"
    later = START.replace(hour=23)
    assert refused(Decision(first.status), body, "exceeded quota", later).status == first.status


def test_a_bug_of_ours_is_no_success() -> None:
    body: dict[str, Any] = job(generation=1)
    body["status"] = verdict(body, RuntimeError("oops"), START).status
    assert kstatus.of(body) == "Failed"


def test_a_job_that_no_operator_has_seen_is_in_progress() -> None:
    """By the status that the definition gives it."""
    seen_by_nobody = crd.schema()["properties"]["status"]["default"]
    assert kstatus.of({**job(generation=1), "status": seen_by_nobody}) == "InProgress"
    world = World()
    world.body["status"] = dict(seen_by_nobody)
    world.refusal = Said("FailedCreate", "no")
    world.settle()
    assert world.status["observedGeneration"] == 1
