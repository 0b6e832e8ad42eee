"""What is done to an operator, and what is measured meanwhile.

Called by operator_load. Times are taken by this program's own watches of PyTorchJobs and OSFTJobs,
from the answer to `create` on; the API server's clock is not asked.
"""

from __future__ import annotations

import collections
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

import job_samples
from bench.load_operators import Operator
from cluster.api import Api, ApiError
from cluster.control_plane import ControlPlane

logger = logging.getLogger("bench")

TENANTS = 10
"""Namespaces that the jobs are spread over."""
THREADS = 8
WRITES = ("create", "update", "patch", "delete")
JOBS = "/apis/osft.dev/v1alpha1/namespaces/{0}/osftjobs"
PYTORCH_JOBS = "/apis/kubeflow.org/v1/namespaces/{0}/pytorchjobs"
PODS = "/api/v1/namespaces/{0}/pods"

Name = tuple[str, str]


class Seen(threading.Thread):
    """When each object was first seen, and in which phase it was last seen."""

    def __init__(self, api: Api, path: str) -> None:
        super().__init__(daemon=True)
        self._api, self._path = api, path
        self.first: dict[Name, float] = {}
        self.bodies: dict[Name, dict[str, Any]] = {}
        self.stopped = False
        listed = api.get(path)
        self._version = listed["metadata"]["resourceVersion"]
        self.start()

    def run(self) -> None:
        while not self.stopped:
            try:
                for event in self._api.watch(self._path, self._version):
                    body, now = event["object"], time.monotonic()
                    name = (body["metadata"]["namespace"], body["metadata"]["name"])
                    self._version = body["metadata"]["resourceVersion"]
                    self.first.setdefault(name, now)
                    self.bodies[name] = body
            except (ApiError, urllib3.exceptions.HTTPError) as error:
                if not self.stopped:
                    logger.warning("a watch of the benchmark broke: %s", error)
                    time.sleep(0.2)


class Story:
    """One operator's measurements."""

    def __init__(self, plane: ControlPlane, operator: Operator, jobs: int) -> None:
        self._plane, self._api, self._operator = plane, plane.api, operator
        self._jobs = jobs
        self._made: dict[Name, float] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def play(self, *, rate: float, idle_seconds: float) -> dict[str, Any]:
        """Everything, in this order: each part builds on what the one before left."""
        tenants = [f"tenant-{number}" for number in range(TENANTS)] + ["crowd", "single"]
        for tenant in tenants:
            self._plane.create_namespace(tenant)
        self._children = Seen(self._api, "/apis/kubeflow.org/v1/pytorchjobs")
        self._osftjobs = Seen(self._api, "/apis/osft.dev/v1alpha1/osftjobs")
        self._operator.start()
        self._wait([self._create("tenant-0", "warm-up")], 60)
        time.sleep(2)
        self._before = self._writes()
        result: dict[str, Any] = {"empty_mib": round(self._operator.memory_mib(), 1)}
        names = [(tenants[n % TENANTS], f"job-{n:05}") for n in range(self._jobs)]
        result["apply_to_pytorchjob"] = self._load(names, rate)
        result["lives"] = self._live(names)
        result["idle"] = self._idle(idle_seconds)
        result["restart"] = self._restart()
        result["crowd"] = self._crowd(self._jobs // 2)
        result["peak_mib"] = round(self._operator.memory_mib("VmHWM"), 1)
        self._operator.stop()
        self._children.stopped = self._osftjobs.stopped = True
        return result

    def _load(self, names: list[Name], rate: float) -> dict[str, Any]:
        """Create at a steady rate, whatever the operator does."""
        logger.info("creating %d OSFTJobs", len(names))
        start = time.monotonic()

        def create(number: int) -> None:
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
            self._create(*names[number])

        list(self._pool.map(create, range(len(names))))
        took = time.monotonic() - start
        lost = self._wait(names, 120 + len(names) / 10)
        waits = sorted(self._children.first[n] - self._made[n] for n in names if n not in lost)
        return {
            "creates_per_second": round(len(names) / took, 1),
            "p50_seconds": _percentile(waits, 50),
            "p99_seconds": _percentile(waits, 99),
            "max_seconds": round(waits[-1], 3),
            "not_made": len(lost),
        }

    def _live(self, names: list[Name]) -> dict[str, Any]:
        """Each job gets a pod, runs, and succeeds."""
        logger.info("%d lives", len(names))
        list(self._pool.map(self._run, names))
        self._until(names, "Running", 60)
        list(self._pool.map(self._succeed, names))
        start = time.monotonic()
        missing = self._until(names, "Succeeded", 120 + len(names) / 10)
        seconds = time.monotonic() - start
        time.sleep(2)
        writes = self._writes() - self._before
        return {
            "not_succeeded": len(missing),
            "last_success_to_status_seconds": round(seconds, 2),
            "api_writes_per_job": round(sum(writes.values()) / len(names), 2),
            "api_writes_per_job_by_kind": {
                kind: round(count / len(names), 2) for kind, count in sorted(writes.items())
            },
        }

    def _idle(self, seconds: float) -> dict[str, Any]:
        logger.info("idle")
        time.sleep(3)
        before = self._operator.cpu_seconds()
        time.sleep(seconds)
        used = self._operator.cpu_seconds() - before
        return {
            "cpu_percent_of_a_core": round(100 * used / seconds, 2),
            "mib": round(self._operator.memory_mib(), 1),
        }

    def _restart(self) -> dict[str, Any]:
        """From the start of a process among all jobs to its first right decision."""
        logger.info("restart")
        self._operator.stop()
        before = len(self._children.first)
        name = self._create("tenant-0", "made-meanwhile")
        start = time.monotonic()
        self._operator.start()
        lost = self._wait([name], 600)
        time.sleep(2)
        return {
            "to_first_decision_seconds": None
            if lost
            else round(self._children.first[name] - start, 2),
            "made_twice": len(self._children.first) - before - 1,
            "mib": round(self._operator.memory_mib(), 1),
        }

    def _crowd(self, count: int) -> dict[str, Any]:
        """One tenant creates as fast as it can; another waits for its single job."""
        logger.info("a crowd of %d", count)
        crowd = [("crowd", f"job-{number:05}") for number in range(count)]
        list(self._pool.map(lambda name: self._create(*name), crowd))
        behind = sum(name not in self._children.first for name in crowd)
        name = self._create("single", "job")
        lost = self._wait([name], 300)
        seconds = None if lost else round(self._children.first[name] - self._made[name], 3)
        self._wait(crowd, 120 + count / 5)
        return {"crowd": count, "crowd_waiting": behind, "single_seconds": seconds}

    def _create(self, namespace: str, name: str) -> Name:
        body = job_samples.job(name=name)
        self._api.post(JOBS.format(namespace), body)
        self._made[namespace, name] = time.monotonic()
        return namespace, name

    def _run(self, name: Name) -> None:
        """The pod of a job, as the training-operator makes it and the kubelet reports it."""
        namespace, job = name
        child = self._children.bodies.get(name)
        if child is None:
            return
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
            "training.kubeflow.org/job-role": "master",
        }
        metadata = {"name": f"{job}-master-0", "labels": labels, "ownerReferences": [owner]}
        container = {"name": "pytorch", "image": "x"}
        body = {"metadata": metadata, "spec": {"containers": [container]}}
        self._api.post(PODS.format(namespace), {"apiVersion": "v1", "kind": "Pod", **body})
        self._pod(name, "Running", {"running": {"startedAt": _now()}})
        self._say(name, "Running")

    def _succeed(self, name: Name) -> None:
        if name not in self._children.bodies:
            return
        ended = {"exitCode": 0, "reason": "Completed", "finishedAt": _now()}
        self._pod(name, "Succeeded", {"terminated": ended})
        self._say(name, "Succeeded")

    def _pod(self, name: Name, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "pytorch", "image": "x", "imageID": "", "ready": phase == "Running"}
        statuses = [{**container, "restartCount": 0, "state": state}]
        # no pod answers at this address: the operator polls in vain, as it does when a pod starts
        status = {"phase": phase, "podIP": "127.0.0.1", "containerStatuses": statuses}
        path = f"{PODS.format(name[0])}/{name[1]}-master-0/status"
        self._api.patch(path, {"status": status})

    def _say(self, name: Name, condition: str) -> None:
        entry = {"type": condition, "status": "True", "reason": "R", "message": "m"}
        path = f"{PYTORCH_JOBS.format(name[0])}/{name[1]}/status"
        self._api.patch(path, {"status": {"conditions": [entry]}})

    def _wait(self, names: Iterable[Name], seconds: float) -> set[Name]:
        """Wait for PyTorchJobs; returns those that never came."""
        return _wait_for(set(names), lambda name: name in self._children.first, seconds)

    def _until(self, names: Iterable[Name], phase: str, seconds: float) -> set[Name]:
        def reached(name: Name) -> bool:
            status = self._osftjobs.bodies.get(name, {}).get("status") or {}
            return bool(status.get("phase") == phase)

        return _wait_for(set(names), reached, seconds)

    def _writes(self) -> collections.Counter[str]:
        """What the operator has written in the tenants' namespaces so far, by verb and kind."""
        counts: collections.Counter[str] = collections.Counter()
        with self._plane.audit_log.open(encoding="utf-8") as lines:
            for line in lines:
                if self._operator.user not in line:
                    continue
                entry = json.loads(line)
                about = entry.get("objectRef", {})
                is_tenants = about.get("namespace", "").startswith("tenant-")
                is_own = entry["user"]["username"] == self._operator.user
                if is_own and is_tenants and entry["verb"] in WRITES:
                    part = f"/{about['subresource']}" if about.get("subresource") else ""
                    counts[f"{entry['verb']} {about['resource']}{part}"] += 1
        return counts


def _wait_for(names: set[Name], reached: Callable[[Name], bool], seconds: float) -> set[Name]:
    end = time.monotonic() + seconds
    left = set(names)
    while left and time.monotonic() < end:
        left = {name for name in left if not reached(name)}
        time.sleep(0.05)
    return left


def _percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return round(values[0], 3)
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 3)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
