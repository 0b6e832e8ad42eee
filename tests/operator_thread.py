"""The operator inside the test's process, for tests that need many of them or look inside.

Called by the tests of faults. The same Service that the program runs, on a thread with a loop of
its own; where the program would end, this starts it anew at once, as a kubelet does.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from cluster.api import wait_for
from osft_operator.cluster import Cluster, ClusterError
from osft_operator.informer import WatchEnded
from osft_operator.leader import LeaseLost
from osft_operator.service import Service
from osft_operator.settings import Settings

QUICK: dict[str, Any] = {
    "bind_address": "127.0.0.1",
    "probe_port": 0,
    "metrics_port": 0,
    "lease_duration_seconds": 4,
    "lease_renew_seconds": 1,
    "kind_check_seconds": 2,
}
"""Settings under which a test need not wait long; all else is as it is shipped."""


class OperatorThread:
    """One replica that starts anew whenever it ends; a context manager.

    The environment's KUBECONFIG says where it works, when it is entered.
    """

    def __init__(self, namespace: str, **settings: Any) -> None:
        told = {**QUICK, "namespaces": (namespace,), "operator_namespace": namespace, **settings}
        self.settings = Settings(**told)
        self.ends: list[BaseException] = []
        """What it ended by, each time."""
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopping = False
        self.service: Service | None = None
        self._thread = threading.Thread(target=self._work, name="operator", daemon=True)

    def __enter__(self) -> OperatorThread:
        self._thread.start()
        wait_for("the operator", lambda: self.problems("ready") == [], timeout_seconds=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the operator does not end"

    def problems(self, probe: str = "live") -> list[str]:
        """What the probes would say."""
        if self.service is None:
            return ["not begun"]
        health = self.service._health
        if probe == "ready":
            return [] if health.ready else ["not ready"]
        return health.problems()

    def _work(self) -> None:
        while not self._stopping:
            asyncio.run(self._life())

    async def _life(self) -> None:
        cluster = Cluster.connect(
            timeout_seconds=self.settings.api_timeout_seconds, threads=self.settings.workers + 2
        )
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if self._stopping:
            return
        self.service = Service(self.settings, cluster)
        try:
            await self.service.run(self._stop)
        except (LeaseLost, WatchEnded, ClusterError) as error:
            self.ends.append(error)
        finally:
            await asyncio.to_thread(cluster.close)
