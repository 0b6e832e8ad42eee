"""The life of an OSFTJob, decided step by step on plain objects."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from osft_operator.decide import DeletePyTorchJob, PollTarget, refused
from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from osft_trainer.report import Metric, Progress
from world import START, World, last_words


def running(changes: dict[str, object] | None = None, count: int = 1, **metadata: object) -> World:
    world = World(changes, **metadata)
    world.settle()
    world.run_pods(count=count)
    world.settle()
    return world


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


def test_a_finished_job_does_not_fail_later() -> None:
    world = running()
    world.tell("sample", "Succeeded")
    world.settle()
    world.end(137, "", reason="OOMKilled")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert "failure" not in world.status


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
    for _ in range(3):
        world.wait(300)
        again = refused(
            world.step(act=False, record=False), world.body, "denied by a webhook", world.now
        )
        assert again.status == first.status, "a write would wake it at once"
        assert (again.events, again.requeue_after) == ((), 300)
    world.edit(suspend=False)
    running_on = world.settle()
    told = refused(running_on, world.body, "denied", world.now)
    assert told.poll == running_on.poll != ()


def test_pods_that_are_not_made_are_explained() -> None:
    world = World()
    world.settle()
    world.newest_event = "exceeded quota"
    world.wait(61)
    world.settle()
    assert world.status["reason"] == "PodsNotCreated"
    assert world.condition("Running")["message"] == "exceeded quota"


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


def test_a_stranger_cannot_speak_for_the_job() -> None:
    world = running()
    world.pods[0]["metadata"]["ownerReferences"][0]["uid"] = "another"
    world.end(2, last_words("BadInput", 2, "lies"))
    world.settle()
    assert world.status["phase"] != "Failed"
    assert "failure" not in world.status


def test_progress_is_rounded_and_belongs_to_the_run() -> None:
    world = running()
    world.progress = Progress(
        run_id="uid-1",
        step=840,
        total_steps=2000,
        loss=1.23456,
        tokens_per_second=12345.6,
        estimated_remaining_seconds=12300,
        learning_rate=5e-6,
        epoch=1.23456,
        latest_checkpoint="/checkpoints/sample/checkpoints/step-00000800",
        latest_checkpoint_step=800,
        metrics=[Metric(name="leak", value="1e-9")],
    )
    decision = world.settle()
    assert decision.poll == (PollTarget("sample-master-0", "10.0.0.1", 28080),)
    progress = world.status["progress"]
    assert progress["summary"] == "42% 840/2000"
    assert (progress["loss"], progress["tokensPerSecond"]) == (1.235, 12300)
    assert (progress["eta"], progress["epoch"]) == ("3h25m", 1.23)
    assert world.status["checkpoint"]["latestStep"] == 800
    world.progress = Progress(run_id="another", step=1999, total_steps=2000)
    world.settle()
    assert world.status["progress"]["step"] == 840


def test_no_number_of_a_pod_stops_the_operator() -> None:
    world = running()
    world.progress = Progress(
        run_id="uid-1", loss=-sys.float_info.max, learning_rate=sys.float_info.max, step=2**53
    )
    world.settle()
    assert world.status["progress"]["step"] == 2**53
    assert "loss" not in world.status["progress"]


def test_the_last_word_comes_from_the_termination_message() -> None:
    world = running()
    final = Progress(run_id="uid-1", step=9, total_steps=9, final="/checkpoints/sample/final")
    state = world.pods[0]["status"]["containerStatuses"][0]
    words = last_words("Done", 0, "done", final)
    state["state"] = {"terminated": {"exitCode": 0, "message": words}}
    world.tell("sample", "Succeeded")
    world.settle()
    assert world.status["progress"]["progressPercentage"] == 100
    assert "/checkpoints/sample/final" in world.condition("Complete")["message"]


def at(step: int, time: str, **changes: object) -> Progress:
    """What a trainer says whose node's clock shows this time."""
    told = {"run_id": "uid-1", "total_steps": 900, "last_updated_time": f"2026-01-02T{time}Z"}
    return Progress.model_validate({**told, "step": step, **changes})


def heard(world: World, progress: Progress | None) -> int:
    """The step that the status shows after an answer that is new now."""
    world.progress = progress
    world.since = world.now
    world.settle()
    step: int = world.status["progress"]["step"]
    return step


def test_progress_goes_on_at_a_node_whose_clock_is_behind() -> None:
    world = running({"spec.maxRestarts": 9})
    assert heard(world, at(80, "10:00:00")) == 80
    world.wait(60)
    world.replace_pod()
    assert heard(world, at(81, "08:00:00")) == 81, "the pod was made again elsewhere"
    world.wait(60)
    world.tell("sample", "Failed")
    world.progress = None
    world.settle()
    world.wait(10)
    world.settle()
    world.run_pods("sample-a2")
    assert heard(world, at(50, "06:00:00", attempt=2)) == 50
    assert heard(world, at(900, "11:00:00", attempt=1)) == 50, "an earlier attempt's words"


def test_an_answer_from_before_the_last_words_is_no_news() -> None:
    world = running({"spec.maxRestarts": 9})
    old = at(119, "10:00:00")
    assert heard(world, old) == 119
    world.wait(1)
    world.end(75, last_words("TryAgain", 75, "peer gone", at(120, "10:00:01")))
    container = world.pods[0]["status"]["containerStatuses"][0]
    container["state"], container["lastState"] = container["lastState"], {}
    world.settle()
    assert world.status["progress"]["step"] == 120, "the poller still has the answer of before"
    container["state"], container["lastState"] = {"running": {}}, container["state"]
    world.wait(30)
    assert heard(world, at(100, "09:00:00")) == 100, "from the newest checkpoint"
    world.settle()
    assert world.status["progress"]["step"] == 100


def test_last_words_from_a_node_whose_clock_is_behind_are_news() -> None:
    world = running({"spec.maxRestarts": 9})
    assert heard(world, at(80, "10:00:00")) == 80
    world.progress = None
    world.replace_pod()
    world.end(75, last_words("TryAgain", 75, "peer gone", at(95, "09:00:00")))
    world.settle()
    assert world.status["progress"]["step"] == 95


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


@settings(max_examples=80, deadline=None, phases=[Phase.generate])
@given(
    crashes=st.lists(st.sampled_from(["none", "before", "between"]), max_size=30),
    happenings=st.lists(
        st.sampled_from(["fail", "die", "suspend", "resume", "delete", "run", "nothing"]),
        max_size=12,
    ),
)
def test_crashes_at_any_point_change_nothing(crashes: list[str], happenings: list[str]) -> None:
    """With crashes anywhere: never two attempts at once, and the budget holds."""
    world = World({"spec.maxRestarts": 3})
    pending = list(crashes)
    for happening in [*happenings, "nothing"]:
        _happen(world, happening)
        for _ in range(6):
            crash = pending.pop() if pending else "none"
            world.wait(7)
            world.step(act=crash != "before", record=crash == "none")
            assert len(world.jobs) <= 1
    world.edit(suspend=False)
    world.settle()
    world.wait(300)
    world.settle()
    assert world.status["phase"] == "Failed" or len(world.jobs) == 1
    assert world.status["restarts"] <= 3
    assert world.made <= 4 + happenings.count("resume") + happenings.count("delete")


def _happen(world: World, happening: str) -> None:
    name = next(iter(world.jobs), None)
    if happening in ("suspend", "resume"):
        world.edit(suspend=happening == "suspend")
    elif name is None:
        return
    elif happening == "run":
        world.run_pods(name)
    elif happening == "die" and world.pods:
        world.end(75)
    elif happening == "fail":
        world.tell(name, "Failed")
    elif happening == "delete":
        world.jobs.clear()
        world.pods = []
