"""The life of an OSFTJob, decided step by step on plain objects: begun, run, restarted, ended."""

from __future__ import annotations

import json

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from drawn import examples
from osft_operator.decide import DeletePyTorchJob
from osft_operator.observed import text_of
from world import START, World, last_words, running


def test_the_first_attempt_is_recorded_before_it_is_made() -> None:
    world = World()
    decision = world.step()
    assert decision.actions == ()
    assert decision.requeue_after == 0
    assert world.status["startTime"] == text_of(START)
    assert world.status["resolved"]["image"] == "trainer:1"
    world.step()
    assert list(world.jobs) == ["sample"]
    assert world.claim is not None
    assert world.claim["metadata"]["name"] == "sample-checkpoints"


def test_a_job_runs_and_succeeds() -> None:
    world = running({"spec.nnodes": 2}, count=2)
    assert world.status["phase"] == "Running"
    assert world.condition("Running")["message"] == "2 of 2 pods run"
    world.wait(60)
    world.tell("sample", "Succeeded")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert world.status["completionTime"] == text_of(world.now)
    assert list(world.jobs) == ["sample"], "its pods keep their logs"
    assert world.events == ["Done"], "what goes as it should is in the status"


def test_what_finished_stays_finished() -> None:
    world = running()
    world.tell("sample", "Succeeded")
    world.settle()
    world.jobs.clear()
    world.pods = []
    world.kind_present = False
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert not world.jobs


def test_one_of_two_pods_is_not_running() -> None:
    world = running({"spec.nnodes": 2}, count=1)
    assert (world.status["phase"], world.status["reason"]) == ("Starting", "PodsStarting")


@pytest.mark.parametrize(("code", "reason"), [(2, "BadInput"), (3, "Diverged")])
def test_what_no_retry_can_help_is_final(code: int, reason: str) -> None:
    world = running({"spec.nnodes": 2}, count=2)
    world.end(75, last_words("TryAgain", 75, "peer gone"), index=0)
    world.end(code, last_words(reason, code, "dataPath: no such file"), index=1)
    decision = world.step()
    assert decision.actions == (), "the reason is recorded before the evidence is deleted"
    assert (world.status["phase"], world.status["reason"]) == ("Failed", reason)
    assert world.status["failure"] == {
        "pod": "sample-worker-0",
        "container": "pytorch",
        "reason": reason,
        "exitCode": code,
        "message": "dataPath: no such file",
        "finishedAt": text_of(START),
        "attempt": 1,
    }
    assert "dataPath: no such file" in world.condition("Failed")["message"]
    assert world.step().actions == (DeletePyTorchJob("sample", "job-1"),)
    world.settle()
    assert world.status["phase"] == "Failed"
    assert world.made == 1


def test_a_failure_in_place_is_counted_and_explained() -> None:
    world = running({"spec.maxRestarts": 2})
    world.end(137, reason="OOMKilled")
    state = world.pods[0]["status"]["containerStatuses"][0]
    state["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    world.settle()
    assert world.status["phase"] == "Restarting"
    assert world.status["restarts"] == 1
    assert "resources.limits.memory" in world.status["failure"]["message"]
    state["state"] = {"running": {}}
    world.settle()
    assert world.status["phase"] == "Running"
    assert world.status["failure"]["reason"] == "OOMKilled", "kept for people"


def test_the_restart_budget_ends() -> None:
    world = running({"spec.maxRestarts": 1})
    world.end(75)
    world.settle()
    assert world.status["phase"] == "Running"
    world.end(75, "Traceback\x1b[31m\x00 boom")
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "MaxRestartsExceeded")
    assert world.status["restarts"] == 1
    assert "boom" in world.condition("Failed")["message"]
    assert "\x1b" not in json.dumps(world.status, ensure_ascii=False)
    assert not world.jobs


def test_a_failed_pytorch_job_is_made_anew() -> None:
    world = running({"spec.maxRestarts": 2})
    world.end(75)
    world.tell("sample", "Failed", "backoff")
    world.step()
    assert world.status["attempt"] == 2
    assert world.status["phase"] == "Restarting"
    world.wait(10)
    world.settle()
    assert list(world.jobs) == ["sample-a2"]
    assert world.status["restarts"] == 2
    arguments = world.jobs["sample-a2"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    assert "--attempt=2" in arguments["spec"]["containers"][0]["args"]
    world.run_pods("sample-a2")
    world.settle()
    assert world.status["phase"] == "Running"
    world.tell("sample-a2", "Failed")
    world.settle()
    assert world.status["reason"] == "MaxRestartsExceeded"


def test_two_attempts_never_run_at_once() -> None:
    world = running()
    world.tell("sample", "Failed")
    world.step()
    world.jobs["sample"]["metadata"]["deletionTimestamp"] = text_of(world.now)
    decision = world.step()
    assert decision.actions == ()
    assert decision.requeue_after
    assert list(world.jobs) == ["sample"]


def test_a_pytorch_job_that_somebody_deletes_comes_back() -> None:
    world = running()
    world.jobs.clear()
    world.pods = []
    world.settle()
    assert list(world.jobs) == ["sample-a2"]
    assert world.status["restarts"] == 1


def test_an_upgrade_changes_no_running_job() -> None:
    world = running()
    world.status["resolved"]["image"] = "trainer:old"
    world.status["resolved"]["runAsUser"] = 7
    world.tell("sample", "Failed")
    world.settle()
    pod = world.jobs["sample-a2"]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "trainer:old"
    assert pod["securityContext"]["runAsUser"] == 7


def test_a_finished_job_does_not_fail_later() -> None:
    world = running()
    world.tell("sample", "Succeeded")
    world.settle()
    world.end(137, "", reason="OOMKilled")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert "failure" not in world.status


def test_what_still_runs_after_the_end_is_named() -> None:
    world = running({"spec.activeDeadlineSeconds": 10})
    world.lingers = True
    world.wait(11)
    world.settle()
    ended = world.status["completionTime"]
    assert world.status["phase"] == "Failed"
    assert world.condition("Running")["message"] == f"pod sample-master-0 has to end since {ended}"
    assert world.status["waitingFor"]["name"] == "sample-master-0"
    world.pods[0]["status"]["phase"] = "Unknown"
    world.settle()
    assert "its node node-1 does not answer" in world.condition("Running")["message"]
    world.pods_end()
    world.settle()
    assert world.condition("Running")["message"] == ""
    assert "waitingFor" not in world.status
    assert world.events == ["DeadlineExceeded"]


def test_a_condition_keeps_its_time() -> None:
    world = running()
    before = world.condition("Running")["lastTransitionTime"]
    world.wait(500)
    world.settle()
    assert world.condition("Running")["lastTransitionTime"] == before


def test_a_lost_status_is_found_again() -> None:
    world = running()
    del world.body["status"]
    world.settle()
    assert world.made == 1
    assert world.status["phase"] == "Running"


HAPPENINGS = ("fail", "die", "suspend", "resume", "delete", "run", "pods end", "node lost")


@settings(max_examples=examples(80), deadline=None, phases=[Phase.generate])
@given(
    crashes=st.lists(st.sampled_from(["none", "before", "between"]), max_size=30),
    happenings=st.lists(
        st.sampled_from([*HAPPENINGS, "nothing"]),
        max_size=12,
    ),
)
def test_crashes_at_any_point_change_nothing(crashes: list[str], happenings: list[str]) -> None:
    """With crashes anywhere: never two attempts at once, and the budget holds."""
    world = World({"spec.maxRestarts": 3})
    world.lingers = True
    pending = list(crashes)
    for happening in [*happenings, "nothing"]:
        _happen(world, happening)
        for _ in range(6):
            crash = pending.pop() if pending else "none"
            world.wait(7)
            world.step(act=crash != "before", record=crash == "none")
            _one_at_a_time(world)
    world.edit(suspend=False)
    world.settle()
    world.pods_end()
    world.settle()
    world.wait(300)
    world.settle()
    assert world.status["phase"] == "Failed" or len(world.jobs) == 1
    assert world.status["restarts"] <= 3
    assert world.made <= 4 + happenings.count("resume") + happenings.count("delete")


def _one_at_a_time(world: World) -> None:
    """One attempt, counted in pods; that whoever waits says for what is seen to in `World.step`."""
    assert len(world.jobs) <= 1
    attempts = {pod["metadata"]["labels"]["osft.dev/attempt"] for pod in world.pods}
    attempts |= {job["metadata"]["labels"]["osft.dev/attempt"] for job in world.jobs.values()}
    assert len(attempts) <= 1, attempts


def _happen(world: World, happening: str) -> None:
    name = next(iter(world.jobs), None)
    if happening in ("suspend", "resume"):
        world.edit(suspend=happening == "suspend")
    elif happening == "pods end":
        world.pods_end()
    elif happening == "node lost" and world.pods:
        world.pods[0]["status"]["reason"] = "NodeLost"
    elif name is None:
        return
    elif happening == "run":
        if not world.pods and not world.jobs[name]["spec"]["runPolicy"].get("suspend"):
            world.run_pods(name)
    elif happening == "die" and world.pods:
        world.end(75)
    elif happening == "fail":
        world.tell(name, "Failed")
    elif happening == "delete":
        world.delete_pods(name)
        world.jobs.clear()
