"""The operators that are measured, each a process under an account of its own.

Called by operator_load. `osft` is installed by the chart and runs with the chart's settings and
rights; `kopf` is kopf_peer with every right, since it would need some to write annotations.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import kopf

import chart_release
from bench import load_machine
from cluster.control_plane import ControlPlane
from operator_process import OperatorProcess
from osft_operator import process_tree

HOME = "bench-system"


class Operator:
    """One operator's process: start, stop, and what the kernel says of it."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        log: Path,
        user: str,
        annotations: Callable[[dict[str, Any]], dict[str, str]] = lambda _: {},
    ) -> None:
        self._command, self._environment, self._log = command, environment, log
        self.user = user
        """Its name in the audit log."""
        self.tree = environment[process_tree.VARIABLE]
        """The mark of its processes."""
        self.annotations = annotations
        """What it writes on an OSFTJob that it has dealt with."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to one that takes its time."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cpu_seconds(self) -> float:
        """CPU time it has used, in user and system mode."""
        return load_machine.process_seconds(self._pid)

    def memory_mib(self, key: str = "VmRSS") -> float:
        """Memory it holds now, or held at most with VmHWM."""
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
        raise AssertionError(key)

    @property
    def _pid(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            words = self._log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the operator ended with {self._process.returncode}:\n{words}")
        return self._process.pid


@contextmanager
def ours(plane: ControlPlane, folder: Path, mark: str) -> Iterator[Operator]:
    """The operator of the installed chart."""
    plane.create_namespace(HOME)
    # a running job is asked every 30 s
    values = {"progress": {"pollSeconds": 30}}
    with chart_release.installed(plane, HOME, folder / "chart", values):
        settings = OperatorProcess(plane, HOME, folder, mark).environment
        command = [sys.executable, "-m", "osft_operator"]
        user = f"system:serviceaccount:{HOME}:{chart_release.ACCOUNT}"
        yield Operator(command, settings, folder / "osft.log", user)


@contextmanager
def peer(plane: ControlPlane, folder: Path, mark: str) -> Iterator[Operator]:
    """The plain kopf operator."""
    plane.create_namespace(HOME)
    rbac = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
    subject = {"kind": "ServiceAccount", "name": "default", "namespace": HOME}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    binding = {"metadata": {"name": "peer"}, "subjects": [subject], "roleRef": role}
    plane.api.post(rbac, {"apiVersion": "rbac.authorization.k8s.io/v1", **binding})
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "KUBECONFIG": str(plane.service_account_kubeconfig(HOME, "default")),
        process_tree.VARIABLE: f"{mark}/peer",
    }
    script = Path(__file__).with_name("kopf_peer.py")
    command = [sys.executable, "-m", "kopf", "run", "--all-namespaces", "--standalone", str(script)]
    user = f"system:serviceaccount:{HOME}:default"
    yield Operator(command, environment, folder / "peer.log", user, _handled)


def _handled(body: dict[str, Any]) -> dict[str, str]:
    """What kopf writes on an object that its handlers have seen, so that they are not called."""
    storage, patch = kopf.AnnotationsDiffBaseStorage(), kopf.Patch()
    essence = storage.build(body=kopf.Body(body))
    storage.store(body=kopf.Body(body), patch=patch, essence=essence)
    return dict(patch["metadata"]["annotations"])


Make = Callable[[ControlPlane, Path, str], AbstractContextManager[Operator]]
OPERATORS: dict[str, Make] = {"osft": ours, "kopf": peer}
