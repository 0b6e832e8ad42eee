"""Events of the stand-in training-operator, written as a controller's event recorder does.

Called by training_pass. What is said again is the same event with a higher count and a later time.
Of one object some two dozen events are written at once, and then one every few minutes: so what is
said in each of many passes hides what is said later.
"""

from __future__ import annotations

import time
import zlib

from cluster.api import Api
from osft_operator.local_container import timestamp
from osft_operator.local_pods import Object

AT_ONCE = 25
REFILL_SECONDS = 300.0


class Recorder:
    """Says what happens to PyTorchJobs."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._counts: dict[str, int] = {}
        self._left: dict[str, tuple[float, float]] = {}

    def say(self, job: Object, reason: str, message: str, kind: str = "Normal") -> None:
        """Write an event about a PyTorchJob, or count the one that is there."""
        metadata = job["metadata"]
        if not self._may(metadata["uid"]):
            return
        digest = zlib.crc32("\0".join((metadata["uid"], kind, reason, message)).encode())
        name = f"{metadata['name']}.{digest:08x}"
        path = f"/api/v1/namespaces/{metadata['namespace']}/events"
        count = self._counts[name] = self._counts.get(name, 0) + 1
        now = timestamp(time.time())
        if count > 1:
            change = {"count": count, "lastTimestamp": now}
            self._api.attempt("PATCH", f"{path}/{name}", change, "application/merge-patch+json")
            return
        involved = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob"}
        involved |= {key: metadata[key] for key in ("name", "namespace", "uid")}
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": involved,
            "reason": reason,
            "message": message,
            "type": kind,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": "pytorchjob-controller"},
        }
        self._api.attempt("POST", path, body)

    def _may(self, uid: str) -> bool:
        now = time.monotonic()
        left, since = self._left.get(uid, (float(AT_ONCE), now))
        left = min(float(AT_ONCE), left + (now - since) / REFILL_SECONDS)
        self._left[uid] = (left - 1 if left >= 1 else left, now)
        return left >= 1
