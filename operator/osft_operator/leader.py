"""Which replica works: a Lease that one holds and renews.

Called by service. The standby tries to take the Lease and does nothing else; the leader renews it
and ends its process when that fails for too long: no answer of the API server, of whatever kind,
ends a leader whose Lease still holds. Other replicas' clocks are not trusted: a Lease has run out
when it did not change for its duration on this machine's clock, as in client-go. Before each write
the leader looks at its own clock (`check`), so a process that was paused does not write as if
nothing had happened.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable

from osft_operator import metrics
from osft_operator.cluster import Cluster, ClusterError, NotFound
from osft_operator.kinds import LEASES, Object
from osft_operator.settings import Settings

logger = logging.getLogger(__name__)


STANDBY_LOOKS = 8
"""How often a standby looks at the Lease while it lasts: a dead leader's is then taken up to a
quarter of its duration late, not two renewals."""


class LeaseLost(Exception):
    """This process may no longer write: another replica may be the leader now."""


class Leader:
    """This replica's part in the election."""

    def __init__(
        self, cluster: Cluster, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._namespace = settings.operator_namespace
        self._name = settings.lease_name
        self._identity = settings.instance_name
        self._duration = settings.lease_duration_seconds
        self._interval = settings.lease_renew_seconds
        self._pause = min(self._interval, self._duration / STANDBY_LOOKS)
        self._clock = clock
        self._seen: tuple[str, float] = ("", float("-inf"))
        self._renewed = float("-inf")
        self._lease: Object | None = None
        metrics.leader.labels(self._name).set(0)

    def check(self) -> None:
        """Make sure that no other replica can hold the Lease now.

        Raises:
            LeaseLost: when the Lease was not renewed in time.
        """
        age = self._clock() - self._renewed
        if age >= self._duration:
            raise LeaseLost(
                f"the Lease {self._namespace}/{self._name} was renewed {age:.0f} s ago "
                f"and lasts {self._duration} s"
            )

    async def acquire(self, standby: Callable[[], None] = lambda: None) -> None:
        """Wait until this replica is the leader.

        Args:
            standby: called when another replica is; not while the Lease cannot be read.
        """
        while not await self._try():
            if self._lease is not None:
                standby()
            await asyncio.sleep(self._pause)
        logger.info("This replica is the leader", extra={"lease": self._name})
        metrics.leader.labels(self._name).set(1)

    async def keep(self) -> None:
        """Renew until it is lost.

        Raises:
            LeaseLost: when another replica holds it, or when renewing failed for too long.
        """
        is_renewed = True
        while True:
            # What passes soon must not cost several renewals.
            await asyncio.sleep(self._interval if is_renewed else self._pause)
            is_renewed = await self._try()
            if not is_renewed and self._holder() != self._identity:
                raise LeaseLost(f"the Lease {self._name} is held by {self._holder()} now")
            self.check()

    async def release(self) -> None:
        """Let another replica have it at once. Called when nothing writes any more."""
        metrics.leader.labels(self._name).set(0)
        if self._lease is None or self._holder() != self._identity:
            return
        spec = {**self._lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
        self._renewed = float("-inf")
        try:
            await self._write({**self._lease, "spec": spec})
        except ClusterError as error:
            logger.warning("The Lease could not be released, it will run out: %s", error)

    async def _try(self) -> bool:
        """Take or renew the Lease once; False when another replica has it or it did not succeed."""
        # The time before the request: the server cannot have counted from later than its answer.
        now = self._clock()
        try:
            return await self._take(now)
        except ClusterError as error:
            # Also a refusal: rights come and go, and only the Lease's own time ends a leader.
            logger.warning("The Lease could not be taken or renewed: %s", error)
            return False

    async def _take(self, now: float) -> bool:
        try:
            lease = await self._cluster.get(LEASES, self._namespace, self._name)
        except NotFound:
            await self._create()
            self._renewed = now
            return True
        self._lease = lease
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, now)
        spec = lease.get("spec", {})
        holder = spec.get("holderIdentity") or ""
        lasts = float(spec.get("leaseDurationSeconds") or self._duration)
        if holder not in ("", self._identity) and now < self._seen[1] + lasts:
            return False
        changes = spec.get("leaseTransitions", 0) + (holder != self._identity)
        acquired = spec.get("acquireTime") if holder == self._identity else _timestamp()
        await self._write(
            {**lease, "spec": self._spec(acquired=acquired or _timestamp(), changes=changes)}
        )
        self._renewed = now
        return True

    async def _create(self) -> None:
        self._lease = await self._cluster.create(
            LEASES,
            self._namespace,
            {
                "apiVersion": LEASES.api_version,
                "kind": LEASES.kind,
                "metadata": {"name": self._name, "namespace": self._namespace},
                "spec": self._spec(acquired=_timestamp(), changes=0),
            },
        )

    async def _write(self, lease: Object) -> None:
        self._lease = await self._cluster.replace(LEASES, self._namespace, self._name, lease)
        self._seen = (self._lease["metadata"]["resourceVersion"], self._clock())

    def _spec(self, *, acquired: str, changes: int) -> Object:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._duration,
            "acquireTime": acquired,
            "renewTime": _timestamp(),
            "leaseTransitions": changes,
        }

    def _holder(self) -> str:
        return (self._lease or {}).get("spec", {}).get("holderIdentity") or ""


def _timestamp() -> str:
    """Now as the API's MicroTime."""
    now = datetime.datetime.now(datetime.UTC)
    return now.isoformat(timespec="microseconds").replace("+00:00", "Z")
