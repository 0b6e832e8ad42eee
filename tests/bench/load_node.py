"""Plays training-operator, kubelet and trainer for the benchmark: pods, their states, /progress.

Called by load_story. Nothing runs in a pod: its status is written, and one server on the loopback
network answers for all pods, each by an address of its own.
"""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.load_watch import Name, Seen
from cluster.api import Api
from osft_trainer.report import METRICS_PORT, Progress

Object = dict[str, Any]

PYTORCH_JOBS = "/apis/kubeflow.org/v1/namespaces/{0}/pytorchjobs"
PODS = "/api/v1/namespaces/{0}/pods"


class Node:
    """Pods of PyTorchJobs that were seen."""

    def __init__(self, api: Api, children: Seen) -> None:
        self._api, self._children = api, children
        self._uids: dict[str, str] = {}
        self._begun = time.monotonic()

    def run(self, name: Name) -> None:
        """The pod of a job, as the training-operator makes it and the kubelet reports it."""
        child = self._children.bodies.get(name)
        if child is None:
            return
        (osftjob,) = child["metadata"]["ownerReferences"]
        self.pod(name[0], child, "Running", self._address(osftjob["uid"]))
        self._say(name, "Running")

    def pod(self, namespace: str, child: Object, phase: str, address: str | None = None) -> None:
        """Make the pod of a PyTorchJob, in a phase."""
        job = child["metadata"]["name"]
        owner = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "name": job,
            "uid": child["metadata"]["uid"],
            "controller": True,
        }
        labels = {
            **child["metadata"]["labels"],
            "training.kubeflow.org/job-name": job,
            "training.kubeflow.org/replica-type": "master",
            "training.kubeflow.org/replica-index": "0",
        }
        metadata = {"name": f"{job}-master-0", "labels": labels, "ownerReferences": [owner]}
        container = {"name": "pytorch", "image": "x"}
        body = {"metadata": metadata, "spec": {"containers": [container]}}
        self._api.post(PODS.format(namespace), {"apiVersion": "v1", "kind": "Pod", **body})
        state = {"running": {"startedAt": _now()}} if phase == "Running" else _ended()
        self._pod((namespace, job), phase, state, address)

    def succeed(self, name: Name) -> None:
        """The pod ends well, and the training-operator says so."""
        if name not in self._children.bodies:
            return
        self._pod(name, "Succeeded", _ended(), None)
        self._say(name, "Succeeded")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Answer for every running pod: a step a second."""
        node = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                uid = node._uids.get(self.connection.getsockname()[0], "")
                body = node._document(uid).to_json().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """No line for each question."""

        server = _Server(("0.0.0.0", METRICS_PORT), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def _document(self, uid: str) -> Progress:
        step = int(time.monotonic() - self._begun)
        return Progress(
            run_id=uid,
            phase="Training",
            step=step,
            total_steps=100_000,
            epoch=step / 100_000,
            loss=1 / (1 + step),
            tokens_per_second=1000.0,
            last_updated_time=_now(),
        )

    def _address(self, uid: str) -> str:
        number = len(self._uids)
        address = f"127.{1 + number // 62500}.{number // 250 % 250}.{1 + number % 250}"
        self._uids[address] = uid
        return address

    def _pod(self, name: Name, phase: str, state: Object, address: str | None) -> None:
        container = {"name": "pytorch", "image": "x", "imageID": "", "ready": phase == "Running"}
        statuses = [{**container, "restartCount": 0, "state": state}]
        status = {"phase": phase, "podIP": address, "containerStatuses": statuses}
        path = f"{PODS.format(name[0])}/{name[1]}-master-0/status"
        self._api.patch(path, {"status": status})

    def _say(self, name: Name, condition: str) -> None:
        entry = {"type": condition, "status": "True", "reason": "R", "message": "m"}
        path = f"{PYTORCH_JOBS.format(name[0])}/{name[1]}/status"
        self._api.patch(path, {"status": {"conditions": [entry]}})


class _Server(http.server.ThreadingHTTPServer):
    """One thread per question."""

    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        """Nothing: an operator does not wait for ever, and hangs up."""


def _ended() -> Object:
    return {"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": _now()}}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
