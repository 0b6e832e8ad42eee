"""The operator dies before or after each write of a job's life: the end is that of a quiet life.

On a real API server, with one reconciler after another: the first ends at the k-th write, the next
begins with lists, as a new process does. With OSFT_SOAK set every write is tried both ways, else
each one way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import job_samples
from cluster.control_plane import ControlPlane
from drawn import SOAK
from osft_operator.cluster import Cluster
from osft_operator.kinds import LEASES, OSFTJOBS, PYTORCHJOBS, Kind, Object
from osft_operator.names import JOB_LABEL
from reconcile_scene import Scene

pytestmark = pytest.mark.cluster

AT_ONCE = 8
"""Lives that are lived beside each other."""
CHANGING = (
    "lastTransitionTime",
    "pyTorchJobUID",
    "startTime",
    "completionTime",
    "newest",
    "since",
)


class Crash(BaseException):
    """The end of the process, which no handler of errors outlives."""


class Mortal:
    """Counts the writes of a client, and ends it at one of them."""

    def __init__(self, cluster: Cluster, at: int | None, after: bool) -> None:
        self.writes = 0
        self._raw = cluster._raw
        self._at, self._after = at, after
        cluster._raw = self._call  # type: ignore[method-assign]

    def _call(self, method: str, kind: Kind, url: str, body: Object | None, *more: Any) -> bytes:
        if method == "GET" or kind is LEASES:
            return self._raw(method, kind, url, body, *more)
        self.writes += 1
        dies = self.writes == self._at
        if dies and not self._after:
            raise Crash
        answer = self._raw(method, kind, url, body, *more)
        if dies:
            raise Crash
        return answer


class Life:
    """One job from its first pass to its end, with one crash or none."""

    def __init__(self, namespace: str, at: int | None, after: bool) -> None:
        self.namespace = namespace
        self.name = f"life-{at}-{'after' if after else 'before'}" if at else "life"
        self.user = Cluster.connect(threads=1)
        self._mortal_cluster = Cluster.connect(threads=1)
        self.mortal = Mortal(self._mortal_cluster, at, after)
        self.scene = Scene(self._mortal_cluster, namespace)
        self.crashed = False
        self.seen: list[Any] = []

    async def live(self) -> list[Any]:
        """All of it; what there was to see after each happening."""
        body = job_samples.job({"spec.maxRestarts": 3}, name=self.name)
        await self.user.create(OSFTJOBS, self.namespace, body)
        await self._until("made", lambda s: s.get("pyTorchJobUID") and s["attempt"] == 1)
        await self._tell(self.name, "Failed")
        await self._until("restarted", lambda s: s.get("pyTorchJobUID") and s["attempt"] == 2)
        await self._edit(suspend=True)
        await self._until("suspended", lambda s: s["phase"] == "Suspended", suspended=True)
        await self._edit(suspend=False)
        await self._until("resumed", lambda s: s["phase"] == "Starting", suspended=False)
        await self._tell(f"{self.name}-a2", "Succeeded")
        await self._until("done", lambda s: s["phase"] == "Succeeded")
        await self._edit(ttlSecondsAfterFinished=0)
        await self._until("deleted", lambda s: False)
        return self.seen

    def close(self) -> None:
        self.user.close()
        self._mortal_cluster.close()

    async def _until(
        self, what: str, reached: Callable[[Any], Any], suspended: bool | None = None
    ) -> None:
        """Passes until it is so and nothing is due at once; then remember what there is."""
        for _ in range(200):
            # long enough for what was held back, so that every write is tried
            self.scene.now += 60
            due = await self._one_pass()
            job = self.scene.cache.get(OSFTJOBS, self.namespace, self.name)
            status = (job or {}).get("status") or {}
            jobs = self._pytorch_jobs()
            held = [bool(spec["runPolicy"].get("suspend")) for spec in jobs.values()]
            as_told = suspended is None or held == [suspended]
            if due != 0 and as_told and (job is None or (status and reached(status))):
                self.seen.append((what, _plain(status, self.name), sorted(self._names())))
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{self.name}: never {what}")

    async def _one_pass(self) -> float | None:
        try:
            return await self.scene.one_pass(self.name)
        except Crash:
            assert not self.crashed
            self.crashed = True
            self.scene = Scene(self.user, self.namespace)
            return 0

    def _pytorch_jobs(self) -> dict[str, Any]:
        return {
            body["metadata"]["name"]: body["spec"]
            for body in self.scene.cache.all(PYTORCHJOBS)
            if body["metadata"]["labels"].get(JOB_LABEL) == self.name
        }

    def _names(self) -> list[str]:
        return [name.removeprefix(self.name) for name in self._pytorch_jobs()]

    async def _edit(self, **spec: Any) -> None:
        await self.user.patch(OSFTJOBS, self.namespace, self.name, {"spec": spec})

    async def _tell(self, pytorch_job: str, condition: str) -> None:
        told = {"conditions": [{"type": condition, "status": "True", "message": "told"}]}
        body = {"status": told}
        await self.user.patch(PYTORCHJOBS, self.namespace, pytorch_job, body, sub="status")


def _plain(value: Any, name: str) -> Any:
    """A status without what differs between two lives."""
    if isinstance(value, dict):
        return {k: _plain(v, name) for k, v in value.items() if k not in CHANGING}
    if isinstance(value, list):
        return [_plain(each, name) for each in value]
    return value.replace(name, "NAME") if isinstance(value, str) else value


@pytest.fixture
def namespace_of_lives(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    return namespace


def test_a_crash_at_any_write_changes_nothing(
    namespace_of_lives: str, record_property: Callable[[str, object], None]
) -> None:
    async def whole() -> None:
        quiet, writes = await _lived(namespace_of_lives, None, False)
        assert len(quiet) == 6
        assert quiet[-1] == ("deleted", {}, quiet[-1][2])
        crashes = [
            (at, after)
            for at in range(1, writes + 1)
            for after in (False, True)
            if SOAK or after == bool(at % 2)
        ]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(at: int, after: bool) -> None:
            async with places:
                seen, _ = await _lived(namespace_of_lives, at, after)
            # after its deletion the children go by themselves, when it suits the cluster
            assert seen[:-1] == quiet[:-1], f"after a crash {'after' if after else 'before'} {at}"

        await asyncio.gather(*(one(at, after) for at, after in crashes))
        record_property("writes", writes)
        record_property("crashes", len(crashes))
        print(f"{writes} writes, {len(crashes)} crashes")

    asyncio.run(whole())


async def _lived(namespace: str, at: int | None, after: bool) -> tuple[list[Any], int]:
    life = Life(namespace, at, after)
    try:
        seen = await life.live()
    finally:
        life.close()
    assert life.crashed == (at is not None)
    return seen, life.mortal.writes
