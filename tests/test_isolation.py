"""An object that breaks a loop over objects is set aside, counted and told; the others go on."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from job_samples import job
from osft_operator import cache as caches
from osft_operator.actions import PollTarget
from osft_operator.cache import Cache
from osft_operator.cluster import Listing
from osft_operator.internal_error import REASON, verdict
from osft_operator.isolation import set_aside
from osft_operator.job_metrics import Survey
from osft_operator.kinds import OSFTJOBS, PODS, Kind
from osft_operator.leader import LeaseLost
from osft_operator.metrics import PARTS, registry
from osft_operator.names import JOB_LABEL
from osft_operator.observed import find_condition, text_of, time_of
from osft_operator.places import Places
from osft_operator.polling import Poller
from osft_operator.queue import Key
from osft_operator.resync import Resync
from osft_operator.settings import Settings
from osft_operator.spec import problems
from osft_trainer.report import Progress
from world import START, World

Object = dict[str, Any]


def counted(part: str) -> float:
    name, labels = "osft_operator_set_aside_total", {"part": part, "reason": REASON}
    return registry.get_sample_value(name, labels) or 0.0


def body(name: str, **more: Any) -> Object:
    made = job(name=name, namespace="n", uid=name, resourceVersion="5", generation=1)
    made["metadata"]["creationTimestamp"] = "2026-01-02T03:00:00Z"
    return {**made, **more}


def test_an_error_is_logged_once_with_its_stack_and_counted_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = counted("list")
    with caplog.at_level(logging.INFO, "osft_operator.isolation"):
        for _ in range(3):
            with set_aside("list", "OSFTJob n/only-here"):
                raise OverflowError("too much")
    (record,) = caplog.records
    assert "OSFTJob n/only-here is set aside (list): OverflowError: too much" in record.message
    assert record.exc_info is not None
    assert counted("list") == before + 3


def test_what_concerns_all_passes_through() -> None:
    with pytest.raises(LeaseLost), set_aside("event", "x"):
        raise LeaseLost("held by another")
    with pytest.raises(asyncio.CancelledError), set_aside("poll", "x"):
        raise asyncio.CancelledError


def test_every_part_has_a_series_before_its_first_error() -> None:
    """Else an alert on its increase would miss the first."""
    for part in PARTS:
        assert registry.get_sample_value(
            "osft_operator_set_aside_total", {"part": part, "reason": REASON}
        ) is not None  # fmt: skip


BROKEN = [
    {"status": {"phase": "Running", "conditions": [3]}},
    {"status": {"phase": "Pending", "startTime": "soon"}},
    {"status": {"phase": "Running", "progress": {"step": "many"}}},
    {"status": "Running"},
    {"spec": 7},
]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
@pytest.mark.parametrize("per_job", [True, False])
def test_the_survey_counts_the_others(broken: Object, per_job: bool) -> None:
    before = counted("survey")
    survey = Survey(per_job=per_job)
    running = {"phase": "Running", "progress": {"step": 1, "loss": 2.0}}
    bodies = [body("a", status=running), body("b", **broken), body("c", status=running)]
    survey.take(bodies, START)
    assert (registry.get_sample_value("osftjob_jobs", {"phase": "Running"}) or 0) >= 2
    assert counted("survey") == before + 1
    survey.take([], START)


class Lists:
    """A server that lists three OSFTJobs, and one pod of the first."""

    async def pages(self, kind: Kind, *_: object, **__: object) -> AsyncIterator[Listing]:
        items = [body(name) for name in ("a", "b", "c")] if kind is OSFTJOBS else []
        if kind is PODS:
            pod = {"name": "p", "namespace": "n", "uid": "p", "resourceVersion": "6"}
            items = [{"metadata": {**pod, "labels": {JOB_LABEL: "a"}}}]
        yield Listing(items, "9")


@pytest.mark.parametrize("breaks", ["_trimmed", "_newer"])
def test_a_list_goes_on_past_an_object_that_cannot_be_read(
    breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of our code it breaks: what is read of it, or how it is compared."""
    original = getattr(caches, breaks)

    def broken(*told: Any) -> Any:
        if any(isinstance(each, dict) and each["metadata"]["name"] == "b" for each in told):
            raise RecursionError("maximum recursion depth exceeded")
        return original(*told)

    cache, before = Cache(), counted("list") + counted("watch")
    resync = Resync(Lists(), cache, Places([]))  # type: ignore[arg-type]
    asyncio.run(resync.run())
    monkeypatch.setattr(caches, breaks, broken)
    for uid in ("a", "b", "c"):
        cache._objects[OSFTJOBS]["n", uid]["metadata"]["resourceVersion"] = "1"
    changed = asyncio.run(resync.run())
    assert {Key("n", "a"), Key("n", "c")} <= changed
    assert cache.jobs() == [Key("n", name) for name in "abc"], "a list forgets what it has seen"
    assert counted("list") + counted("watch") == before + 1


def test_an_object_that_cannot_be_read_is_kept_as_far_as_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(caches, "_trimmed", broken)
    cache = Cache()
    assert cache.put(OSFTJOBS, body("x")) == Key("n", "x")
    kept = cache.get(OSFTJOBS, "n", "x")
    assert kept is not None
    assert problems(kept) == ["spec: the operator cannot read this object; see its log"]


def test_a_poll_that_breaks_ends_no_other() -> None:
    told: list[Key] = []

    def news(key: Key, _: bool) -> None:
        told.append(key)
        raise KeyError(key)

    async def story() -> None:
        before = counted("poll")
        async with Poller(Settings(), news) as poller:

            async def fetch(pod: PollTarget) -> Any:
                return Progress(run_id="u", step=3, total_steps=9, loss=0.5)

            poller._fetch = fetch  # type: ignore[method-assign]
            for name in ("a", "b"):
                poller.watch(Key("n", name), [PollTarget(name, "127.0.0.1", 1)])
            asking = asyncio.create_task(poller.run())
            await asyncio.sleep(0.05)
            assert not asking.done()
            asking.cancel()
        assert sorted(key.name for key in told) == ["a", "b"]
        assert counted("poll") == before + 2

    asyncio.run(story())


def test_the_author_is_told_of_a_bug_once() -> None:
    world = World()
    world.settle()
    decision = verdict(world.body, OverflowError("at 0x7f12345678ab"), START)
    accepted = find_condition(decision.status, "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InternalError")
    assert accepted["message"].startswith("OverflowError: at 0x...: a bug of the operator")
    assert [event.reason for event in decision.events] == ["InternalError"]
    world.body["status"] = decision.status
    again = verdict(world.body, OverflowError("at 0x7fffffffffff"), START)
    assert again.events == ()
    assert again.status == decision.status, "nothing is written again"
    world.settle()
    assert world.condition("Accepted")["reason"] == "SpecValid", "it is over when the bug is"


def test_a_bug_after_the_end_leaves_no_mark_for_ever() -> None:
    world = World()
    world.settle()
    world.run_pods()
    world.tell("sample", "Succeeded")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    world.body["status"] = verdict(world.body, ValueError("x"), START).status
    world.settle()
    assert world.condition("Accepted")["status"] == "True"


@pytest.mark.parametrize("status", [{}, {"conditions": [{"type": "Accepted"}]}, {"conditions": 3}])
def test_a_verdict_needs_nothing_of_what_is_recorded(status: Object) -> None:
    decision = verdict(body("x", status=status), ValueError("x\x00y"), START)
    (accepted,) = (each for each in decision.status["conditions"] if each["type"] == "Accepted")
    assert accepted["reason"] == "InternalError"
    assert "\x00" not in accepted["message"]


TIMES = {
    "2026-01-01T00:00:00Z": "2026-01-01T00:00:00Z",
    "2026-01-01t00:00:00z": "2026-01-01T00:00:00Z",
    "2026-01-01T02:00:00.123456789012+02:00": "2026-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z": "0002-01-01T00:00:00Z",
    "0001-01-01T00:00:00+23:59": "0002-01-01T00:00:00Z",
    "9999-12-31T23:59:59-23:59": "9998-01-01T00:00:00Z",
    "2026-01-01T00:00:00+99:99": "2026-01-01T00:00:00Z",
    "2026-01-01T00:00:00|00:00": "2026-01-01T00:00:00Z",
}
"""What the API server takes for a date-time, and how it is read."""


@pytest.mark.parametrize("text", TIMES)
def test_every_time_that_the_server_takes_is_read(text: str) -> None:
    read = time_of(text)
    assert text_of(read) == TIMES[text]
    assert abs((START - read).total_seconds()) < 10**12
    assert read - datetime.timedelta(days=300) < read + datetime.timedelta(days=300)
    assert read.tzinfo is not None
    with pytest.raises(ValueError):
        time_of(f"x{text}")


@pytest.mark.parametrize("text", TIMES)
@pytest.mark.parametrize(
    "field", ["startTime", "completionTime", "nextAttemptTime", "lastTransitionTime"]
)
def test_no_time_in_a_status_keeps_its_job_from_being_judged(field: str, text: str) -> None:
    world = World({"spec.activeDeadlineSeconds": 60, "spec.ttlSecondsAfterFinished": 60})
    world.settle()
    world.run_pods()
    world.settle()
    if field == "completionTime":
        world.tell("sample", "Succeeded")
        world.settle()
    places = world.status["conditions"] if field == "lastTransitionTime" else [world.status]
    for place in places:
        place[field] = text
    world.step()
    Survey(per_job=True).take([world.body], world.now + datetime.timedelta(seconds=1))
    Survey(per_job=True).take([], world.now)
