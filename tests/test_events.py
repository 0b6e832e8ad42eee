"""Events that are written after the pass that says them: all of them, or dropped in words.

What a single event looks like, and how repeated ones are counted, is in test_reconcile.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from osft_operator import events
from osft_operator.actions import Event
from osft_operator.cluster import Cluster, Unavailable
from osft_operator.events import Backlog

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
