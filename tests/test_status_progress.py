"""How far a run is, as pods tell it, and that none of them can tell what is not so."""

from __future__ import annotations

import sys

from osft_operator.decide import PollTarget
from osft_trainer.report import Metric, Progress
from world import World, last_words, running


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


def test_numbers_that_are_none_reach_no_status() -> None:
    assert Progress.parse(b'{"runId": "u", "loss": NaN}') is None
    assert Progress.parse(b'{"runId": "u", "loss": 1e999}') is None
    assert Progress.parse(b'{"runId": "u", "loss": "NaN"}') is None
