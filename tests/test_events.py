"""Events that are written after the pass that says them: all of them, or dropped in words.

What a single event looks like, and how repeated ones are counted, is in test_reconcile.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from typing import Any

import pytest

from osft_operator import events
from osft_operator.actions import Event
from osft_operator.cluster import AlreadyExists, Cluster, Listing, NotFound, Unavailable
from osft_operator.events import Backlog, Recorder

JOB = {
    "apiVersion": "osft.dev/v1alpha1",
    "kind": "OSFTJob",
    "metadata": {"name": "run", "namespace": "ns", "uid": "u", "resourceVersion": "1"},
}


class Slow(Cluster):
    """A cluster whose answers wait for the test."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.written: list[str] = []

    async def create(self, _: Any, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        await self.gate.wait()
        if body["reason"] == "Lost":
            raise Unavailable("away")
        self.written.append(body["reason"])
        return body


def event(reason: str) -> Event:
    return Event("Normal", reason, "words")


def test_nobody_waits_for_an_event_and_a_lost_one_stops_none() -> None:
    async def story() -> None:
        cluster = Slow()
        backlog = Backlog(cluster, "test")
        running = asyncio.create_task(backlog.run())
        strange = {"metadata": {"namespace": "ns"}}
        await backlog.record(strange, event("Bug"))
        for reason in ("First", "Lost", "Second", "Third"):
            await asyncio.wait_for(backlog.record(JOB, event(reason)), 1)
        await asyncio.sleep(0)
        assert cluster.written == []
        cluster.gate.set()
        await asyncio.sleep(0.05)
        assert cluster.written == ["First", "Second", "Third"]
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(story())


def test_what_waits_at_the_end_is_still_written() -> None:
    async def story() -> None:
        cluster = Slow()
        backlog = Backlog(cluster, "test")
        running = asyncio.create_task(backlog.run())
        for number in range(5):
            await backlog.record(JOB, event(f"Said{number}"))
        await asyncio.sleep(0.01)  # two of them are under way
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        cluster.gate.set()
        await backlog.drain()
        assert sorted(cluster.written) == [f"Said{number}" for number in range(5)]

    asyncio.run(story())


def test_a_backlog_without_end_drops_the_oldest_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "MAX_BACKLOG", 3)

    async def story() -> None:
        cluster = Slow()
        cluster.gate.set()
        backlog = Backlog(cluster, "test")
        for number in range(5):
            await backlog.record(JOB, event(f"Said{number}"))
        await backlog.drain()
        assert cluster.written == ["Said2", "Said3", "Said4"]

    asyncio.run(story())
    assert "the oldest is lost" in caplog.text


def test_the_many_events_of_one_namespace_cost_no_other_its_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MAX_BACKLOG", 10)

    async def story() -> None:
        cluster = Slow()
        cluster.gate.set()
        backlog = Backlog(cluster, "test")
        other = {**JOB, "metadata": {**JOB["metadata"], "namespace": "other"}}
        await backlog.record(other, event("Few"))
        for number in range(50):
            await backlog.record(JOB, event(f"Many{number}"))
        await backlog.record(other, event("Last"))
        await backlog.drain()
        assert cluster.written[:4] == ["Few", "Many42", "Last", "Many43"]
        assert len(cluster.written) == 10

    asyncio.run(story())


class Store(Cluster):
    """Events of an API server, whose every answer takes a while."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}

    async def create(self, _: Any, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        if body["metadata"]["name"] in self.events:
            raise AlreadyExists("there")
        self.events[body["metadata"]["name"]] = body
        return body

    async def patch(
        self, _: Any, namespace: str, name: str, body: dict[str, Any], **__: Any
    ) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        if name not in self.events:
            raise NotFound("gone")
        self.events[name].update(body)
        return self.events[name]

    async def list_all(self, _: Any, namespace: str | None, **__: Any) -> Listing:
        await asyncio.sleep(0.01)
        return Listing([dict(body) for body in self.events.values()], "1")


class Clock:
    """A time that the test sets."""

    def __init__(self) -> None:
        self.seconds = 0

    def __call__(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.seconds, datetime.UTC)


def told(cluster: Store) -> tuple[int, str, str]:
    """Count, first and last time of the one event that there is, as kubectl reads them."""
    (event,) = cluster.events.values()
    return event["count"], event["firstTimestamp"][14:19], event["lastTimestamp"][14:19]


def test_an_event_tells_when_it_happened_and_not_when_it_was_written() -> None:
    async def story() -> None:
        cluster, clock = Store(), Clock()
        backlog = Backlog(cluster, "test", now=clock)
        for clock.seconds in (10, 20, 30):
            await backlog.record(JOB, event("Again"))
        clock.seconds = 300  # the API server was away
        await backlog.drain()
        assert told(cluster) == (3, "00:10", "00:30")

    asyncio.run(story())


def test_no_two_writers_lose_a_count() -> None:
    async def story() -> None:
        cluster, clock = Store(), Clock()
        backlog = Backlog(cluster, "test", now=clock)
        running = asyncio.create_task(backlog.run())
        for clock.seconds in range(1, 8):
            await backlog.record(JOB, event("Again"))
        await asyncio.sleep(0.5)
        assert told(cluster) == (7, "00:01", "00:07")
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        # a new process finds the event by its name, and goes on counting
        later = Backlog(cluster, "other", now=clock)
        clock.seconds = 60
        await asyncio.gather(*(Recorder.record(later, JOB, event("Again")) for _ in range(3)))
        assert told(cluster) == (10, "00:01", "01:00")
        cluster.events.clear()  # events live an hour
        await Recorder.record(later, JOB, event("Again"))
        assert told(cluster) == (1, "01:00", "01:00")

    asyncio.run(story())
