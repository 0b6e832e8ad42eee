"""The leader while its Lease can not be renewed: it leads as long as the Lease holds, no longer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from osft_operator import cluster_errors
from osft_operator.cluster import ClusterError, NotFound
from osft_operator.kinds import Kind, Object
from osft_operator.leader import Leader, LeaseLost
from osft_operator.settings import Settings

ERRORS = [
    each
    for each in vars(cluster_errors).values()
    if isinstance(each, type) and issubclass(each, ClusterError)
]
TRY_SECONDS = 1.0
"""How far the clock goes with each request."""


class Server:
    """Holds one Lease, or answers every request with an error. Its clock moves with requests."""

    def __init__(self) -> None:
        self.error: ClusterError | None = None
        self.heals_at = float("inf")
        self.now = 100.0
        self.lease: Object | None = None
        self.version = 0

    def clock(self) -> float:
        return self.now

    def _ask(self) -> None:
        self.now += TRY_SECONDS
        if self.error is not None and self.now < self.heals_at:
            raise self.error

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        self._ask()
        if self.lease is None:
            raise NotFound("no such Lease")
        return self.lease

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        return await self.replace(kind, namespace, "", body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        self._ask()
        self.version += 1
        metadata = {**body["metadata"], "resourceVersion": str(self.version)}
        self.lease = {**body, "metadata": metadata}
        return self.lease


def replica(server: Server, name: str = "leader") -> Leader:
    quick: dict[str, Any] = {"lease_duration_seconds": 15, "lease_renew_seconds": 0.001}
    settings = Settings(instance_name=name, **quick)
    return Leader(server, settings, clock=server.clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_that_passes_ends_no_leader(error: type[ClusterError]) -> None:
    async def story() -> None:
        server = Server()
        leader = replica(server)
        await leader.acquire()
        server.error, server.heals_at = error("not now"), server.now + 12
        keeping = asyncio.create_task(leader.keep())
        while server.now < 200 and not keeping.done():
            await asyncio.sleep(0.001)
        assert not keeping.done(), keeping.exception()
        leader.check()
        keeping.cancel()

    asyncio.run(story())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_that_stays_ends_it_with_the_lease(error: type[ClusterError]) -> None:
    async def story() -> None:
        server = Server()
        leader = replica(server)
        await leader.acquire()
        began = server.now
        server.error = error("no")
        with pytest.raises(LeaseLost, match="lasts 15 s"):
            await asyncio.wait_for(leader.keep(), 10)
        assert began + 12 < server.now < began + 17
        await leader.release()

    asyncio.run(story())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_a_lease_that_can_not_be_read_makes_neither_leader_nor_standby(
    error: type[ClusterError],
) -> None:
    async def story() -> None:
        server = Server()
        server.error, server.heals_at = error("no"), server.now + 5
        standing_by: list[float] = []
        await asyncio.wait_for(replica(server).acquire(lambda: standing_by.append(server.now)), 10)
        assert standing_by == []
        assert server.now > 105
        server.error = None
        waiting = asyncio.create_task(
            replica(server, "other").acquire(lambda: standing_by.append(server.now))
        )
        while not standing_by:
            await asyncio.sleep(0.001)
        waiting.cancel()

    asyncio.run(story())
