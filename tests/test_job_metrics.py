"""What is counted and logged of a job's life, and that nothing of a job stays when it is gone."""

from __future__ import annotations

import datetime
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from osft_operator import job_metrics, logs, transitions
from osft_operator.decide import refused
from osft_operator.job_metrics import Survey
from osft_operator.metrics import registry
from osft_operator.names import QUEUE_LABEL
from osft_operator.observed import text_of
from osft_operator.queue import Key
from osft_operator.status_model import PHASES
from world import START, World, last_words, running

KEY = Key("ns", "sample")


def value(name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


class Counted:
    """How much the counters have grown since it was made."""

    NAMES = (
        "osftjob_restarts_total",
        "osftjob_queue_seconds_count",
        "osftjob_queue_seconds_sum",
        "osftjob_start_seconds_count",
        "osftjob_start_seconds_sum",
    )

    def __init__(self) -> None:
        self._before = {name: value(name) for name in self.NAMES}

    def __call__(self, name: str) -> float:
        return value(name) - self._before[name]


def tell(world: World) -> None:
    """Passes until nothing changes, each status write told as reconcile does."""
    for _ in range(12):
        before, there = dict(world.status), sorted(world.jobs)
        world.step()
        if before != world.status:
            transitions.tell(KEY, before, world.status)
        elif there == sorted(world.jobs):
            return
    raise AssertionError("no end")


def test_the_wait_the_start_and_the_run_are_measured_from_the_recorded_status() -> None:
    grown, ended = Counted(), value("osftjob_completed_total", result="succeeded", reason="Done")
    ran = value("osftjob_run_seconds_sum", result="succeeded")
    world = World(labels={QUEUE_LABEL: "q"})
    tell(world)
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = True
    tell(world)
    assert world.status["phase"] == "Queued"
    world.wait(600)
    world.jobs["sample"]["spec"]["runPolicy"]["suspend"] = False
    tell(world)
    assert grown("osftjob_queue_seconds_count") == 1
    assert grown("osftjob_queue_seconds_sum") == 600
    world.wait(30)
    world.run_pods()
    tell(world)
    assert grown("osftjob_start_seconds_sum") == 30, "the queue is no part of the start"
    world.wait(1000)
    world.tell("sample", "Succeeded")
    tell(world)
    assert value("osftjob_completed_total", result="succeeded", reason="Done") == ended + 1
    assert value("osftjob_run_seconds_sum", result="succeeded") == ran + 1630
    tell(world)
    assert grown("osftjob_start_seconds_count") == 1, "told once"


def test_restarts_and_ends_are_counted_and_a_pods_own_word_is_no_label() -> None:
    grown = Counted()
    other = value("osftjob_completed_total", result="failed", reason="Other")
    world = World({"spec.maxRestarts": 1})
    tell(world)
    world.run_pods()
    tell(world)
    world.tell("sample", "Failed")
    tell(world)
    assert grown("osftjob_restarts_total") == 1
    world.run_pods("sample-a2")
    world.end(2, last_words("MyOwnWord", 2, "x"))
    tell(world)
    assert world.status["reason"] == "MyOwnWord"
    assert value("osftjob_completed_total", result="failed", reason="Other") == other + 1


def body(name: str, phase: str, status: dict[str, Any] | None = None, gpus: int = 0) -> Any:
    limits = {"nvidia.com/gpu": gpus} if gpus else {}
    return {
        "metadata": {
            "namespace": "ns",
            "name": name,
            "creationTimestamp": "2026-01-02T03:00:00Z",
        },
        "spec": {"resources": {"limits": limits}},
        "status": {"phase": phase, **(status or {})},
    }


def condition(kind: str, status: str, time: str) -> dict[str, str]:
    return {"type": kind, "status": status, "lastTransitionTime": time}


def test_the_survey_counts_phases_waits_stalls_and_lost_losses() -> None:
    bodies = [
        body("a", "Running", {"progress": {"step": 3, "loss": 1.0}}),
        body("b", "Running", {"progress": {"step": 3}}),
        body("c", "Running", {"progress": {"step": 0}}),
        body("d", "Pending", gpus=8),
        body("e", "Queued", {"conditions": [condition("Suspended", "True", later(60))]}, gpus=1),
        body("f", "Starting", {"conditions": [condition("Running", "False", later(40))]}),
        body("g", "Running", {"conditions": [condition("Stalled", "True", later(0))]}),
        body("h", "Suspended", gpus=1),
    ]
    survey = Survey(per_job=False)
    survey.take(bodies, START + datetime.timedelta(seconds=100))
    assert value("osftjob_jobs", phase="Running") == 4
    assert value("osftjob_stalled") == 1
    assert value("osftjob_loss_not_finite") == 1
    assert value("osftjob_oldest_waiting_seconds", gpu="true") == 245 + 100
    assert value("osftjob_oldest_waiting_seconds", gpu="false") == 60
    survey.take([], START)
    assert value("osftjob_jobs", phase="Running") == 0
    assert value("osftjob_oldest_waiting_seconds", gpu="true") == 0
    assert list(survey.collect()) == [], "nothing of single jobs unless wanted"


def later(seconds: int) -> str:
    return (START + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize("phase", PHASES)
def test_only_a_job_that_runs_stands_still(phase: str) -> None:
    """An alert on it would never end for a job that has."""
    told = {"conditions": [condition("Stalled", "True", later(0))]}
    Survey(per_job=False).take([body("a", phase, told)], START)
    assert value("osftjob_stalled") == (phase == "Running")


def test_a_job_that_stood_still_until_its_end_is_not_counted() -> None:
    world = running({"spec.stall": {"timeoutSeconds": 600}, "spec.activeDeadlineSeconds": 700})
    survey = Survey(per_job=False)
    for seconds, phase, count in ((600, "Running", 1), (100, "Failed", 0)):
        world.wait(seconds)
        world.settle()
        assert world.status["phase"] == phase
        survey.take([world.body], world.now)
        assert value("osftjob_stalled") == count


FOR_ROOM = (
    "Starting", "PodsStarting", "Waiting", "Unschedulable", "ClaimPending", "PodsNotCreated",
    "NodeLost", "InitStuck", "PyTorchJobKindMissing", "FailedAttachVolume", "WriteFailed",
)  # fmt: skip
"""Reasons that the cluster or its administrator sees to."""
FOR_ITS_AUTHOR = (
    "NameTaken", "ClaimTaken", "ClaimNotFound", "ClaimTerminating", "ClaimNotShared",
    "ClaimDiffers", "ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName",
    "CreateContainerConfigError", "FailedMount", "InitContainerFailing", "PodsNotEnding",
    "FolderInUse",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "reason", "counts"),
    [("Running", reason, True) for reason in FOR_ROOM]
    + [("Running", reason, False) for reason in FOR_ITS_AUTHOR]
    + [("Accepted", reason, False) for reason in ("Denied", "InvalidSpec", "Refused")],
)
def test_who_waits_for_its_author_does_not_wait_for_gpus(
    kind: str, reason: str, counts: bool
) -> None:
    told = {"conditions": [{**condition(kind, "False", later(0)), "reason": reason}]}
    now = START + datetime.timedelta(seconds=100)
    Survey(per_job=False).take([body("a", "Starting", told, gpus=1)], now)
    assert (value("osftjob_oldest_waiting_seconds", gpu="true") > 0) == counts


def test_a_restart_that_is_held_up_waits_and_one_that_goes_on_does_not() -> None:
    for reason, counts in (("Restarting", False), ("NodeLost", True), ("WriteFailed", True)):
        told = {"reason": reason}
        told |= {"conditions": [{**condition("Running", "False", later(0)), "reason": reason}]}
        now = START + datetime.timedelta(seconds=100)
        Survey(per_job=False).take([body("a", "Restarting", told, gpus=1)], now)
        assert (value("osftjob_oldest_waiting_seconds", gpu="true") > 0) == counts


def is_denied(world: World) -> None:
    world.edit(podTemplate={"spec": {"hostNetwork": True}})
    world.settle()
    world.wait(3600)
    world.edit(podTemplate=None)


def lacks_its_claim(world: World) -> None:
    world.edit(storage={"checkpoints": {"claimName": "mine"}})
    world.settle()
    world.wait(3600)
    world.claim = {"metadata": {"name": "mine"}}


def is_refused(world: World) -> None:
    world.step()
    decision = refused(world.step(act=False, record=False), world.body, "422: no", world.now)
    world.body["status"] = decision.status
    world.wait(3600)


@pytest.mark.parametrize("waits", [is_denied, lacks_its_claim, is_refused])
def test_the_wait_for_room_begins_when_the_author_is_done(waits: Callable[[World], None]) -> None:
    world = World(creationTimestamp=text_of(START))
    waits(world)
    world.settle()
    world.wait(20)
    Survey(per_job=False).take([world.body], world.now)
    assert world.status["phase"] == "Starting"
    assert value("osftjob_oldest_waiting_seconds", gpu="false") == 20


def test_single_jobs_are_told_when_wanted_and_go_with_their_job() -> None:
    progress = {
        "progressPercentage": 42,
        "step": 1,
        "loss": 0.5,
        "tokensPerSecond": 1000.0,
        "lastUpdatedTime": "2026-01-02T03:04:05Z",
    }
    strange = {"progressPercentage": 1, "lastUpdatedTime": "soon"}
    own = CollectorRegistry()
    survey = Survey(per_job=True)
    own.register(survey)
    running = body("a", "Running", {"progress": progress})
    survey.take([running, body("b", "Running", {"progress": strange})], START)
    text = generate_latest(own).decode()
    assert 'osftjob_progress_ratio{name="a",namespace="ns"} 0.42' in text
    assert 'osftjob_loss{name="a",namespace="ns"} 0.5' in text
    assert 'osftjob_info{name="b",namespace="ns",phase="Running"} 1.0' in text
    seen = 'osftjob_last_progress_timestamp_seconds{name="a",namespace="ns"} 1.767323045e+09'
    assert seen in text
    survey.take([], START)
    assert "name=" not in generate_latest(own).decode()


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """The lines that the operator's log has at the end, parsed."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JSONFormatter())
    target = logging.getLogger("osft_operator")
    level = target.level
    target.addHandler(handler)
    target.setLevel("INFO")
    lines: list[dict[str, Any]] = []
    try:
        yield lines
    finally:
        target.removeHandler(handler)
        target.setLevel(level)
        lines += [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_change_of_state_is_one_line_that_names_the_job_and_the_pass() -> None:
    world = World()
    with logged() as lines, logs.about(osftjob=str(KEY), reconcile_id="abc"):
        tell(world)
        world.run_pods()
        tell(world)
        tell(world)
    assert [line["message"] for line in lines] == [
        "New -> Starting",
        "still Starting",
        "Starting -> Running",
    ]
    last = lines[-1]
    assert (last["osftjob"], last["reconcile_id"]) == ("ns/sample", "abc")
    assert (last["reason"], last["detail"]) == ("PodsRunning", "1 of 1 pods run")
    assert (last["pytorchjob"], last["generation"]) == ("sample", 1)


def test_every_end_has_its_series_before_the_first_job_ends() -> None:
    samples = {
        (sample.labels["result"], sample.labels["reason"])
        for metric in job_metrics.completed.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert ("failed", "Diverged") in samples
    assert len(samples) == 2 * (len(job_metrics.OUTCOMES) + 1)
