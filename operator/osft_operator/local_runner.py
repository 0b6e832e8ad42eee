"""Runs one Pod as processes of this machine: init containers in turn, then all containers.

Called by `osft run` and by the tests' kubelet, with the pods of local_pods. It knows neither the
API server nor PyTorchJobs, starts no thread and never blocks: the owner calls `poll` (ten times a
second is plenty) from a thread or an event loop. Not carried over from a node: resource limits,
security contexts, probes, read-only mounts, `preStop` hooks.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from osft_operator.local_command import Surroundings, image_environment
from osft_operator.local_container import BackOff, ContainerProcess, timestamp
from osft_operator.local_pods import INIT_CONTAINER

__all__ = ["BackOff", "PodProcess", "Surroundings", "free_port", "image_environment"]

DEFAULT_GRACE_SECONDS = 30.0


class PodProcess:
    """A pod that runs on this machine; see the module for what its owner has to do."""

    def __init__(
        self,
        pod: Mapping[str, Any],
        at: Surroundings,
        *,
        back_off: BackOff | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pod = pod
        self.at = at
        self._clock = clock
        spec = pod["spec"]
        policy = spec.get("restartPolicy", "Always")
        pause = back_off or BackOff()

        def process(container: Mapping[str, Any], restart_policy: str) -> ContainerProcess:
            return ContainerProcess(
                pod, container, at, restart_policy=restart_policy, back_off=pause, clock=clock
            )

        # the controller's own wait for the master's name needs no turn: addresses are known here
        self._init = [
            process(container, "Never" if policy == "Never" else "OnFailure")
            for container in spec.get("initContainers") or []
            if container["name"] != INIT_CONTAINER
        ]
        self._skipped = [
            container
            for container in spec.get("initContainers") or []
            if container["name"] == INIT_CONTAINER
        ]
        self._containers = [process(container, policy) for container in spec["containers"]]
        self._started: float | None = None
        self._kill_at: float | None = None
        self._stopping = False
        self._init_failed = False

    @property
    def phase(self) -> str:
        """Pending, Running, Succeeded or Failed."""
        if self._init_failed:
            return "Failed"
        if not any(each.started for each in self._containers):
            return "Failed" if self._stopping and self.finished else "Pending"
        if not all(each.finished for each in self._containers):
            return "Running"
        good = all(each.exit_code == 0 for each in self._containers)
        return "Succeeded" if good else "Failed"

    @property
    def finished(self) -> bool:
        """Whether no process is left and none will be started."""
        everything = [*self._init, *self._containers]
        if self._stopping or self._init_failed:
            return not any(each.running for each in everything)
        return all(each.finished for each in everything)

    @property
    def restart_count(self) -> int:
        """Restarts of all its containers together."""
        return sum(each.restart_count for each in [*self._init, *self._containers])

    def start(self) -> None:
        """Start the first containers."""
        self.at.work_dir.mkdir(parents=True, exist_ok=True)
        self._started = self._clock()
        self._advance()

    def poll(self) -> bool:
        """Look once at every process; True when the status has changed."""
        if self._kill_at is not None and self._clock() >= self._kill_at:
            self.kill()
        # a list: every container gets its look
        changed = any([each.poll() for each in [*self._init, *self._containers]])
        if changed and not self._stopping:
            self._advance()
        return changed

    def stop(self, grace_seconds: float | None = None) -> None:
        """Ask the pod to end: SIGTERM now, SIGKILL to its whole tree after the grace period.

        Args:
            grace_seconds: absent, the pod's `terminationGracePeriodSeconds`. A second call may
                only shorten the time that is left.
        """
        if grace_seconds is None:
            grace_seconds = self.pod["spec"].get(
                "terminationGracePeriodSeconds", DEFAULT_GRACE_SECONDS
            )
        kill_at = self._clock() + grace_seconds
        self._kill_at = kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        if not self._stopping:
            self._stopping = True
            for each in [*self._init, *self._containers]:
                each.terminate()

    def kill(self) -> None:
        """End the whole tree now; `poll` then reports it."""
        self._stopping, self._kill_at = True, None
        for each in [*self._init, *self._containers]:
            each.kill()

    def container(self, name: str) -> ContainerProcess:
        """The container of that name.

        Raises:
            KeyError: the pod has none.
        """
        for each in [*self._init, *self._containers]:
            if each.name == name:
                return each
        raise KeyError(name)

    def log_path(self, name: str = "pytorch", *, previous: bool = False) -> Path | None:
        """The log file of a container's newest attempt, or of the one before."""
        return self.container(name).log_path(previous)

    def status(self) -> dict[str, Any]:
        """The pod's status in Kubernetes' words."""
        ready = self.phase == "Running" and all(each.running for each in self._containers)
        initialized = all(each.finished for each in self._init) and not self._init_failed
        conditions = {
            "PodScheduled": True,
            "Initialized": initialized,
            "ContainersReady": ready,
            "Ready": ready,
        }
        began = timestamp(self._started) if self._started else None
        return {
            "phase": self.phase,
            "hostIP": "127.0.0.1",
            "podIP": self.at.pod_ip,
            "podIPs": [{"ip": self.at.pod_ip}],
            "startTime": began,
            "conditions": [
                {"type": kind, "status": str(value)}
                # a kubelet never takes one away without a reason
                | ({} if value else {"reason": "ContainersNotReady"})
                for kind, value in conditions.items()
            ],
            "initContainerStatuses": [
                *(each.status() for each in self._init),
                *(_skipped_status(each, began) for each in self._skipped),
            ],
            "containerStatuses": [each.status() for each in self._containers],
        }

    def _advance(self) -> None:
        for each in self._init:
            if not each.started:
                each.start()
            if each.finished and each.exit_code != 0:
                self._init_failed = True
            if not each.finished or self._init_failed:
                return
        for each in self._containers:
            if not each.started:
                each.start()


def free_port() -> int:
    """A port that nothing listens on, below the range from which clients are given theirs."""
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")


def _skipped_status(container: Mapping[str, Any], when: str | None) -> dict[str, Any]:
    ended = {"exitCode": 0, "reason": "Completed", "startedAt": when, "finishedAt": when}
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": True,
        "restartCount": 0,
        "state": {"terminated": {**ended, "message": "not run on this machine"}},
        "lastState": {},
    }
