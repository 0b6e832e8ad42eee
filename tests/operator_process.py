"""The operator as its own process, as the chart deploys it: its account, its rights, its settings.

Called by the end-to-end tests. The process gets the environment of the chart's Deployment with the
test's changes, and a kubeconfig of the chart's ServiceAccount: no admin token.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chart_release
from cluster.api import wait_for
from cluster.control_plane import ControlPlane
from osft_operator import process_tree
from osft_operator.local_runner import free_port

QUICK = {
    "progress": {"pollSeconds": 0.5, "writeSeconds": 1},
    "reconcile": {"kindCheckSeconds": 2, "sidecarGraceSeconds": 2},
    "leaderElection": {"durationSeconds": 4, "renewSeconds": 1},
}
"""Values under which a test need not wait long."""


class OperatorProcess:
    """One replica: start, kill, start again."""

    def __init__(self, plane: ControlPlane, namespace: str, folder: Path, mark: str) -> None:
        self._log = folder / "operator.log"
        self._mark = f"{mark}/operator-{namespace}"
        self.probes = f"http://127.0.0.1:{free_port()}"
        kubeconfig = plane.service_account_kubeconfig(namespace, chart_release.ACCOUNT)
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONFAULTHANDLER": "1",
            "KUBECONFIG": str(kubeconfig),
            process_tree.VARIABLE: self._mark,
            **_settings(plane, namespace),
            "OSFT_BIND_ADDRESS": "127.0.0.1",
            "OSFT_PROBE_PORT": self.probes.rsplit(":", 1)[1],
            "OSFT_METRICS_PORT": str(free_port()),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is ready to work."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "osft_operator"],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for("operator ready", self._ready, timeout_seconds=60)

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: it stands still, as on a machine that sleeps, and does not know."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wait(self) -> int:
        """Wait for its end; returns the exit code.

        Raises:
            AssertionError: it does not end; with its log, and where its threads stand.
        """
        assert self._process is not None
        try:
            return self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            self._process.wait()
            raise AssertionError(f"the operator does not end:\n{self.log()}") from None

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=30)

    def log(self) -> str:
        """Everything it has logged."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the operator ended:\n{self.log()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{self.probes}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _settings(plane: ControlPlane, namespace: str) -> dict[str, str]:
    """The environment of the operator's container in the installed Deployment."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    deployments = plane.api.get(path)["items"]
    (container,) = deployments[0]["spec"]["template"]["spec"]["containers"]
    from_pod = {"metadata.namespace": namespace, "metadata.name": "operator-0"}
    found = {}
    for entry in container["env"]:
        reference: Any = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        found[entry["name"]] = from_pod[reference] if reference else entry.get("value", "")
    return found


@contextmanager
def running(
    plane: ControlPlane, namespace: str, folder: Path, mark: str, values: dict[str, Any]
) -> Iterator[OperatorProcess]:
    """The chart installed and its operator running; both gone at the end."""
    with chart_release.installed(plane, namespace, folder, values):
        operator = OperatorProcess(plane, namespace, folder, mark)
        operator.start()
        try:
            yield operator
        finally:
            process_tree.kill(operator._mark)
