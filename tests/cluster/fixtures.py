"""The fixtures that give a test a real API server; conftest.py hands them to every test.

Without binaries the tests that ask for one are skipped, and the session fails at its end with what
is missing: `make test` runs the rest and does not end green.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster import binaries
from cluster.control_plane import ControlPlane
from cluster.kubelet import Kubelet
from cluster.training_operator import TrainingOperator
from cluster.webhook import Webhook
from osft_operator import process_tree
from osft_operator.local_pods import Object

CRDS = Path(__file__).parents[2] / "crds"
NO_BINARIES = "there are no control plane binaries"
_missing: list[str] = []
_failed: list[str] = []


@dataclass(frozen=True)
class Cluster:
    """An API server, a training-operator and a node that runs pods for real."""

    plane: ControlPlane
    training_operator: TrainingOperator
    kubelet: Kubelet
    mark: str
    """Put `process_tree.VARIABLE: f"{mark}/..."` into the environment of whatever a test starts:
    it then ends with the session, whatever happens."""


def pytorchjob_crd() -> Object:
    """The PyTorchJob CRD that the tests serve."""
    text = Path(__file__).with_name("pytorchjob_crd.yaml").read_text()
    crd: Object = yaml.safe_load(text)
    return crd


def own_crds() -> list[Object]:
    """Every CRD in the repository's folder crds/."""
    return [yaml.safe_load(path.read_text()) for path in sorted(CRDS.glob("*.yaml"))]


@pytest.fixture(scope="session")
def session_mark() -> Iterator[str]:
    """The session in the process tree, under a watchdog."""
    mark = f"osft-tests-{uuid.uuid4().hex}"
    with process_tree.Watchdog(mark):
        yield mark


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[Path]:
    """Logs, volumes and etcd's data; kept when a test failed, or OSFT_KEEP_LOGS is set."""
    # not pytest's own: its paths are too long for the sockets of a data loader's workers
    folder = Path(tempfile.mkdtemp(prefix="osft-"))
    yield folder
    if _failed or os.environ.get("OSFT_KEEP_LOGS"):
        print(f"\nthe cluster's logs are kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def control_plane_binaries() -> binaries.Binaries:
    """The control plane's programs, built when they are not there."""
    try:
        return binaries.ensure()
    except binaries.Missing as error:
        pytest.skip(f"{NO_BINARIES}: {error}")


@pytest.fixture(scope="session")
def webhook(
    control_plane_binaries: binaries.Binaries, cluster_folder: Path, session_mark: str
) -> Iterator[tuple[ControlPlane, Webhook]]:
    """The control plane with the webhook of PyTorchJobs; a test may send the webhook away."""
    plane = ControlPlane(control_plane_binaries, cluster_folder / "plane", session_mark)
    try:
        plane.start([pytorchjob_crd(), *own_crds()])
        hook = Webhook(plane.api, cluster_folder)
        hook.start()
        yield plane, hook
        hook.stop()
    finally:
        plane.stop()


@pytest.fixture(scope="session")
def control_plane(webhook: tuple[ControlPlane, Webhook]) -> ControlPlane:
    """The API server with the PyTorchJob CRD and the repository's own; one per session.

    A CRD that the server refuses fails test_control_plane, and the tests that use it.
    """
    return webhook[0]


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of the test's own; deleted after it, in the background."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    control_plane.create_namespace(name)
    yield name
    control_plane.delete_namespace(name)


@pytest.fixture(scope="session")
def cluster(
    control_plane: ControlPlane, cluster_folder: Path, session_mark: str
) -> Iterator[Cluster]:
    """The whole cluster: PyTorchJobs become pods, pods become processes."""
    operator = TrainingOperator(control_plane.api)
    kubelet = Kubelet(
        control_plane.api,
        cluster_folder,
        session_mark,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    operator.start()
    kubelet.start()
    yield Cluster(control_plane, operator, kubelet, session_mark)
    operator.stop()
    kubelet.stop()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember failures, which keep the cluster's logs, and what is missing.

    With several workers the first process hears of all reports, and it gives the exit code.
    """
    if report.failed:
        _failed.append(report.nodeid)
    if report.skipped and NO_BINARIES in str(report.longrepr):
        _missing.append(str(report.longrepr))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that could not run for want of an API server must not look green."""
    if _missing and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once what is missing and how to get it."""
    for message in dict.fromkeys(_missing):
        terminalreporter.section("control plane missing", red=True)
        terminalreporter.write_line(message)
