"""The election, on a real Lease of a real API server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from cluster.control_plane import ControlPlane
from osft_operator.cluster import Cluster
from osft_operator.kinds import LEASES
from osft_operator.leader import Leader, LeaseLost
from osft_operator.settings import Settings

pytestmark = pytest.mark.cluster


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def connected(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig))
    cluster = Cluster.connect()
    try:
        yield cluster
    finally:
        cluster.close()


def replica(cluster: Cluster, namespace: str, name: str, clock: Callable[[], float]) -> Leader:
    settings = Settings(
        operator_namespace=namespace,
        instance_name=name,
        lease_duration_seconds=2,
        lease_renew_seconds=0.05,
    )
    return Leader(cluster, settings, clock=clock)


async def waits(part: Awaitable[None]) -> bool:
    try:
        await asyncio.wait_for(part, 0.5)
    except TimeoutError:
        return True
    return False


def test_one_leads_the_other_waits_and_takes_over_when_the_lease_runs_out(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        first_clock, second_clock = Clock(), Clock()
        first = replica(cluster, namespace, "first", first_clock)
        second = replica(cluster, namespace, "second", second_clock)
        await first.acquire()
        first.check()
        assert await waits(second.acquire())
        with pytest.raises(LeaseLost):
            second.check()
        second_clock.now += 2.5
        await second.acquire()
        second.check()
        lease = await cluster.get(LEASES, namespace, "osft-operator")
        assert lease["spec"]["holderIdentity"] == "second"
        assert lease["spec"]["leaseTransitions"] == 1
        # The first one was paused: its own clock tells it before it writes, the Lease soon after.
        first_clock.now += 2.5
        with pytest.raises(LeaseLost, match="renewed 2 s ago"):
            first.check()
        with pytest.raises(LeaseLost, match="held by second"):
            await asyncio.wait_for(first.keep(), 5)

    with connected(control_plane, monkeypatch) as cluster:
        asyncio.run(story(cluster))


def test_a_leader_that_renews_keeps_the_lease(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        first_clock, second_clock = Clock(), Clock()
        first = replica(cluster, namespace, "first", first_clock)
        second = replica(cluster, namespace, "second", second_clock)
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        for _ in range(4):
            # Less than the duration each time, more in sum: only a renewal explains the wait.
            assert await waits(second.acquire())
            second_clock.now += 1.5
        keeping.cancel()

    with connected(control_plane, monkeypatch) as cluster:
        asyncio.run(story(cluster))


def test_calls_without_an_answer_do_not_keep_the_lease_from_being_renewed(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        leader = replica(cluster, namespace, "leader", Clock())
        await leader.acquire()
        slow = threading.Event()
        waiting = [cluster._threads.submit(slow.wait) for _ in range(cluster._threads._max_workers)]
        try:
            assert await asyncio.wait_for(leader._try(), 3)
        finally:
            slow.set()
        assert all(each.result() for each in waiting)

    with connected(control_plane, monkeypatch) as cluster:
        asyncio.run(story(cluster))


def test_a_released_lease_is_free_at_once(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        first = replica(cluster, namespace, "first", Clock())
        second = replica(cluster, namespace, "second", Clock())
        await first.acquire()
        await first.release()
        with pytest.raises(LeaseLost):
            first.check()
        await asyncio.wait_for(second.acquire(), 5)

    with connected(control_plane, monkeypatch) as cluster:
        asyncio.run(story(cluster))
