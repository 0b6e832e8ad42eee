"""Reads Kueue's Workload of a PyTorchJob that waits in a queue.

Called by observer. Kueue's kinds may be missing, in another version, or not ours to read: that is
remembered for some minutes, and a job in a queue is then only said to wait. Must never change
anything of Kueue's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from osft_operator.cluster import Cluster, ClusterError, NotFound, Refused
from osft_operator.kinds import WORKLOADS, Kind, Object
from osft_operator.names import QUEUE_LABEL, WORKLOAD_JOB_LABEL
from osft_operator.observed import controller, is_suspended

logger = logging.getLogger(__name__)

FORGET_SECONDS = 300.0
"""After so long it is tried again to read what could not be read."""


class Workloads:
    """Kueue's Workloads, as far as they can be read."""

    def __init__(
        self, cluster: Cluster, *, wanted: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cluster = cluster
        self._wanted = wanted
        self._clock = clock
        self._kinds: Sequence[Kind] = WORKLOADS
        self._missing_until = float("-inf")

    async def of(self, job: Object, pytorch_jobs: Sequence[Object]) -> Object | None:
        """The Workload of the OSFTJob's PyTorchJob that waits in a queue, if it can be read."""
        uid = job["metadata"]["uid"]
        for each in pytorch_jobs:
            queued = QUEUE_LABEL in (each["metadata"].get("labels") or {})
            if queued and is_suspended(each) and controller(each).get("uid") == uid:
                return await self._read(each)
        return None

    async def _read(self, pytorch_job: Object) -> Object | None:
        if not self._wanted or self._clock() < self._missing_until:
            return None
        metadata = pytorch_job["metadata"]
        labels = f"{WORKLOAD_JOB_LABEL}={metadata['uid']}"
        for kind in self._kinds:
            try:
                found = await self._cluster.list_all(kind, metadata["namespace"], labels=labels)
            except NotFound:
                continue
            except Refused as error:
                logger.warning("Kueue's Workloads cannot be read: %s", error)
                break
            except ClusterError as error:
                logger.warning("Kueue's Workloads could not be read: %s", error)
                return None
            self._kinds = (kind,)
            return found.items[0] if found.items else None
        self._kinds = WORKLOADS
        self._missing_until = self._clock() + FORGET_SECONDS
        return None
