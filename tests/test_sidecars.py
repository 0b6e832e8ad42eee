"""A container that outlives the trainers is named, and holds no GPUs for ever."""

from __future__ import annotations

from typing import Any

import pytest

from osft_operator.observed import text_of
from test_stall import stalled
from world import World, last_words, running

PROXY = {"name": "linkerd-proxy", "restartCount": 0, "state": {"running": {}}}
CRASHING = {**PROXY, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
FAILED = {**PROXY, "state": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-02T03:04:05Z"}}}
DONE = {**PROXY, "state": {"terminated": {"exitCode": 0, "finishedAt": "2026-01-02T03:04:05Z"}}}


def with_sidecars(count: int = 2, sidecar: dict[str, Any] = PROXY, **changes: Any) -> World:
    world = running({"spec.nnodes": count, **changes}, count=count)
    for pod in world.pods:
        pod["status"]["containerStatuses"].insert(0, dict(sidecar))
    world.settle()
    return world


def trainer_ends(world: World, index: int, code: int = 0, words: str = "") -> None:
    trainer = world.pods[index]["status"]["containerStatuses"][-1]
    ended = {"exitCode": code, "finishedAt": text_of(world.now), "message": words}
    trainer["state"] = {"terminated": ended}


@pytest.mark.parametrize("sidecar", [PROXY, CRASHING, FAILED], ids=["runs", "crashes", "failed"])
def test_the_job_ends_by_its_trainers_word(sidecar: dict[str, Any]) -> None:
    world = with_sidecars(sidecar=sidecar)
    trainer_ends(world, 1)
    world.wait(500)
    world.settle()
    assert world.status["reason"] == "PodsRunning", "a trainer is at work"
    trainer_ends(world, 0)
    ended = text_of(world.now)
    decision = world.settle()
    assert decision.requeue_after == 60
    assert (world.status["phase"], world.status["reason"]) == ("Running", "SidecarsRunning")
    words = world.condition("Running")["message"]
    assert f"ended well since {ended}" in words
    assert "container linkerd-proxy of pod sample-master-0 still runs" in words
    assert world.status["waitingFor"] == {"kind": "Pod", "name": "sample-master-0", "since": ended}
    assert "SidecarsRunning" in world.events
    world.wait(59)
    world.settle()
    assert list(world.jobs) == ["sample"]
    world.wait(1)
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Succeeded", "Done")
    assert not world.jobs, "its GPUs are given back"


def test_a_worker_without_a_sidecar_has_ended_before() -> None:
    world = with_sidecars()
    world.pods[1]["status"] = {"phase": "Succeeded"}
    trainer_ends(world, 0)
    world.settle()
    assert world.status["reason"] == "SidecarsRunning"


def test_a_pod_whose_containers_have_all_ended_is_left_to_its_controller() -> None:
    world = with_sidecars(sidecar=DONE)
    for index in (0, 1):
        trainer_ends(world, index)
    world.wait(500)
    world.settle()
    assert world.status["reason"] == "PodsRunning"


def test_bad_input_ends_the_job_beside_a_living_sidecar() -> None:
    world = with_sidecars()
    trainer_ends(world, 1, 2, last_words("BadInput", 2, "dataPath: no such file"))
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "BadInput")
    assert not world.jobs


@pytest.mark.parametrize("asked", [{"suspend": True}, {"activeDeadlineSeconds": 30}])
def test_what_is_done_is_neither_suspended_nor_late(asked: dict[str, Any]) -> None:
    world = with_sidecars()
    for index in (0, 1):
        trainer_ends(world, index)
    world.edit(**asked)
    world.settle()
    world.wait(61)
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_what_is_done_does_not_stand_still() -> None:
    world = stalled("Restart")
    world.pods[0]["status"]["containerStatuses"].append(dict(PROXY))
    trainer = world.pods[0]["status"]["containerStatuses"][0]
    trainer["state"] = {"terminated": {"exitCode": 0, "finishedAt": text_of(world.now)}}
    world.settle()
    assert world.status["restarts"] == 0
    world.wait(60)
    world.settle()
    assert world.status["phase"] == "Succeeded"
