"""What is done to an operator, and what is measured meanwhile.

Called by operator_load. A wait counts from the API server's answer to `create` until this
program's own watch shows the PyTorchJob.
"""

from __future__ import annotations

import collections
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import job_samples
from bench import load_before, load_rate
from bench.load_before import JOBS
from bench.load_node import Node
from bench.load_operators import Operator
from bench.load_rate import Post
from bench.load_watch import Name, Seen
from cluster.control_plane import ControlPlane

logger = logging.getLogger("bench")

TENANTS = [f"tenant-{number}" for number in range(10)]
"""Namespaces that the jobs are spread over."""
THREADS = 8
PATIENCE_SECONDS = 600
"""How long a first decision is waited for."""
LIVES = 80
"""Jobs whose writes are counted one by one."""
WRITES = ("create", "update", "patch", "delete")


class Story:
    """One operator's measurements."""

    def __init__(self, plane: ControlPlane, operator: Operator, jobs: int, before: int) -> None:
        """A story of `jobs` OSFTJobs, of which `before` have ended before the operator starts."""
        self._plane, self._api, self._operator = plane, plane.api, operator
        self._jobs, self._before = jobs, before
        self._made: dict[Name, Post] = {}
        self._pool = ThreadPoolExecutor(THREADS)

    def play(self, *, rate: float, idle_seconds: float, running: int) -> dict[str, Any]:
        """Everything, in this order: each part builds on what the one before left.

        Args:
            rate: creates a second.
            idle_seconds: how long idleness is measured.
            running: jobs that run and are polled in a further part; 0 leaves it out.
        """
        for namespace in [*TENANTS, "crowd", "lives", "single", "running"]:
            self._plane.create_namespace(namespace)
        names = [(TENANTS[n % len(TENANTS)], f"job-{n:05}") for n in range(self._jobs)]
        self._children = Seen(self._api, "/apis/kubeflow.org/v1/pytorchjobs")
        self._osftjobs = Seen(self._api, "/apis/osft.dev/v1alpha1/osftjobs")
        self._node = Node(self._api, self._children)
        self._finish_before(names[: self._before])
        result: dict[str, Any] = {"start": self._first_decision(("single", "warm-up"))}
        result["mib_at_start"] = round(self._operator.memory_mib(), 1)
        if result["start"]["to_first_decision_seconds"] is None:
            return result  # whatever came next would be the start's figure again
        result["apply_to_pytorchjob"] = self._load(names[self._before :], rate)
        result["lives"] = self._live(names[self._before :])
        result["lives"] |= self._count_writes()
        result["idle"] = self._idle(idle_seconds)
        if running:
            result["running"] = self._polled(running)
        result["restart"] = self._restart()
        result["crowd"] = self._crowd(self._jobs // 2)
        result["peak_mib_of_last_process"] = round(self._operator.memory_mib("VmHWM"), 1)
        return result

    def close(self) -> None:
        """Stop the operator and the watches."""
        self._operator.stop()
        self._children.stopped = self._osftjobs.stopped = True

    def _finish_before(self, names: list[Name]) -> None:
        logger.info("%d OSFTJobs that have ended", len(names))
        if not names:
            return

        def make(name: Name) -> None:
            load_before.finished(self._api, self._node, name, self._operator.annotations)

        list(self._pool.map(make, names))
        self._children.wait_for(names, 60)

    def _load(self, names: list[Name], rate: float) -> dict[str, Any]:
        """Create at a steady rate, whatever the operator does."""
        logger.info("creating %d OSFTJobs", len(names))
        trees = {"operator": self._operator.tree, "control_plane": self._plane.mark}
        times = load_rate.Times(self._made, self._osftjobs.first, self._children.first)
        return load_rate.create(
            names,
            rate,
            self._create,
            times,
            trees,
            pool=self._pool,
            wait_for=self._children.wait_for,
        )

    def _live(self, names: list[Name]) -> dict[str, Any]:
        """Each job gets a pod, runs, and succeeds, all at one time; nobody tells of progress."""
        logger.info("%d lives", len(names))
        list(self._pool.map(self._node.run, names))
        self._osftjobs.wait_for_phase(names, "Running", 60 + len(names) / 20)
        list(self._pool.map(self._node.succeed, names))
        start = time.monotonic()
        missing = self._osftjobs.wait_for_phase(names, "Succeeded", 120 + len(names) / 10)
        seconds = time.monotonic() - start
        return {
            "not_succeeded": len(missing),
            "last_success_to_status_seconds": round(seconds, 2),
        }

    def _count_writes(self) -> dict[str, Any]:
        """What is written for jobs whose pods run as soon as their PyTorchJobs are there."""
        names = [("lives", f"job-{number:05}") for number in range(LIVES)]
        missing: set[Name] = set()
        for first in range(0, LIVES, THREADS):
            some = names[first : first + THREADS]
            list(self._pool.map(self._create, some))
            self._children.wait_for(some, 60)
            list(self._pool.map(self._node.run, some))
            self._osftjobs.wait_for_phase(some, "Running", 60)
            list(self._pool.map(self._node.succeed, some))
            missing |= self._osftjobs.wait_for_phase(some, "Succeeded", 60)
        time.sleep(3)
        writes = self._writes("lives")
        assert not missing, f"{len(missing)} of {LIVES} lives did not end"
        return {
            "api_writes_per_job": round(sum(writes.values()) / LIVES, 2),
            "api_writes_per_job_without_events": round(
                sum(count for what, count in writes.items() if "events" not in what) / LIVES, 2
            ),
            "api_writes_per_job_by_kind": {
                what: round(count / LIVES, 2) for what, count in sorted(writes.items())
            },
        }

    def _idle(self, seconds: float) -> dict[str, Any]:
        logger.info("idle")
        time.sleep(3)
        return {
            "cpu_percent_of_a_core": self._cpu_percent(seconds),
            "mib": round(self._operator.memory_mib(), 1),
        }

    def _polled(self, count: int) -> dict[str, Any]:
        """Jobs that run and tell a step a second, beside all that have finished."""
        logger.info("%d running jobs", count)
        names = [("running", f"job-{number:05}") for number in range(count)]
        with self._node.progress():
            list(self._pool.map(self._create, names))
            self._children.wait_for(names, 60 + count / 5)
            list(self._pool.map(self._node.run, names))
            missing = self._osftjobs.wait_for_phase(names, "Running", 60 + count / 5)
            time.sleep(60)  # the first answers are milestones, and written at once
            before, seconds = self._writes("running"), 60
            percent = self._cpu_percent(seconds)
            writes = sum((self._writes("running") - before).values())
            told = sum("progress" in (self._osftjobs.bodies[n].get("status") or {}) for n in names)
        return {
            "jobs": count,
            "not_running": len(missing),
            "with_progress": told,
            "cpu_percent_of_a_core": percent,
            "status_writes_per_job_and_minute": round(writes * 60 / seconds / count, 2),
        }

    def _restart(self) -> dict[str, Any]:
        """The same among all jobs, once the operator has known them all."""
        logger.info("restart")
        self._operator.stop()
        before = len(self._children.first)
        found = self._first_decision(("single", "made-meanwhile"))
        time.sleep(2)
        lost = found["to_first_decision_seconds"] is None
        made_twice = len(self._children.first) - before - (0 if lost else 1)
        return found | {
            "made_twice": made_twice,
            "mib": round(self._operator.memory_mib(), 1),
        }

    def _first_decision(self, name: Name) -> dict[str, Any]:
        """From the start of a process among all jobs to its first right decision."""
        self._create(name)
        start = time.monotonic()
        self._operator.start()
        lost = self._children.wait_for([name], PATIENCE_SECONDS)
        seconds = None if lost else round(self._children.first[name] - start, 2)
        return {"to_first_decision_seconds": seconds, "waited_at_most_seconds": PATIENCE_SECONDS}

    def _crowd(self, count: int) -> dict[str, Any]:
        """One tenant creates as fast as it can; another waits for its single job."""
        logger.info("a crowd of %d", count)
        crowd = [("crowd", f"job-{number:05}") for number in range(count)]
        list(self._pool.map(self._create, crowd))
        behind = sum(name not in self._children.first for name in crowd)
        name = self._create(("single", "job"))
        lost = self._children.wait_for([name], 300)
        seconds = None if lost else round(self._children.first[name] - self._made[name].answered, 3)
        self._children.wait_for(crowd, 120 + count / 5)
        return {"crowd": count, "crowd_waiting": behind, "single_seconds": seconds}

    def _create(self, name: Name) -> Name:
        asked = time.monotonic()
        self._api.post(JOBS.format(name[0]), job_samples.job(name=name[1]))
        self._made[name] = Post(asked, time.monotonic())
        return name

    def _cpu_percent(self, seconds: float) -> float:
        before = self._operator.cpu_seconds()
        time.sleep(seconds)
        return round(100 * (self._operator.cpu_seconds() - before) / seconds, 2)

    def _writes(self, *namespaces: str) -> collections.Counter[str]:
        """What the operator has written in some namespaces so far, by verb and kind."""
        counts: collections.Counter[str] = collections.Counter()
        with self._plane.audit_log.open(encoding="utf-8") as lines:
            for line in lines:
                if self._operator.user not in line:
                    continue
                entry = json.loads(line)
                about = entry.get("objectRef", {})
                is_own = entry["user"]["username"] == self._operator.user
                if is_own and about.get("namespace") in namespaces and entry["verb"] in WRITES:
                    part = f"/{about['subresource']}" if about.get("subresource") else ""
                    counts[f"{entry['verb']} {about['resource']}{part}"] += 1
        return counts
