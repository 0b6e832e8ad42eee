"""What kstatus and Argo CD make of an OSFTJob; World asserts the first in every test of decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lupa import lua51

import kstatus
from job_samples import job
from osft_operator import crd
from osft_operator.actions import Decision
from osft_operator.decide import refused
from osft_operator.internal_error import verdict
from osft_operator.observed import Said
from world import START, World, last_words

HEALTH_CHECK = (
    Path(__file__).parents[1] / "charts" / "osft-operator" / "files" / "argo-cd" / "health.lua"
)


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


def suspended() -> World:
    world = World({"spec.suspend": True})
    world.settle()
    return world


CASES: list[tuple[Callable[[], World], str, str, tuple[str, str]]] = [
    (invalid, "Pending", "Failed", ("True", "InvalidSpec")),
    (mended, "Starting", "InProgress", ("False", "NotYet")),
    (running, "Running", "InProgress", ("False", "NotYet")),
    (suspended, "Suspended", "InProgress", ("False", "NotYet")),
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


HEALTH = [
    (invalid, "Degraded", "InvalidSpec: "),
    (mended, "Progressing", "PodsStarting: "),
    (running, "Progressing", "PodsRunning: 1 of 1 pods run"),
    (suspended, "Suspended", "SuspendRequested: spec.suspend is true"),
    (still, "Degraded", "NoProgress: "),
    (failed, "Degraded", "BadInput: container pytorch of pod"),
    (complete, "Healthy", "Done: the training is done"),
]


def health(body: dict[str, Any]) -> tuple[str, str]:
    """What Argo CD shows: its Lua is 5.1, the object is `obj`, the answer a table."""
    lua = lua51.LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = _table(lua, body)
    answer = lua.execute(HEALTH_CHECK.read_text())
    return answer["status"], answer["message"]


def _table(lua: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return lua.table_from({name: _table(lua, each) for name, each in value.items()})
    if isinstance(value, list):
        return lua.table_from([_table(lua, each) for each in value])
    return value


@pytest.mark.parametrize(("made", "seen", "words"), HEALTH)
def test_argo_cd_shows_the_health_of_a_job(
    made: Callable[[], World], seen: str, words: str
) -> None:
    world = made()
    status, message = health(world.body)
    assert status == seen
    assert message.startswith(words)
    world.body["metadata"]["generation"] += 1
    assert health(world.body)[0] == "Progressing", "the status is about an earlier spec"


@pytest.mark.parametrize("status", [None, {}, {"observedGeneration": -1}, {"phase": "Pending"}])
def test_argo_cd_waits_for_the_operator(status: dict[str, Any] | None) -> None:
    body: dict[str, Any] = job(generation=1)
    if status is not None:
        body["status"] = status
    assert health(body)[0] == "Progressing"


def test_argo_cd_shows_how_far_a_run_is() -> None:
    world = running()
    world.body["status"]["progress"] = {"summary": "42% 840/2000"}
    assert health(world.body) == ("Progressing", "42% 840/2000")


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
