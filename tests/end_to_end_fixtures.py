"""Fixtures of the end-to-end tests: a model with one skill, the operator, a namespace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import operator_process
import osftjobs
import rights
from cluster.fixtures import Cluster
from osftjobs import Jobs

SYSTEM = "osft-system"


@pytest.fixture(scope="session")
def learned() -> Path:
    """A folder with a model that can do the old skill and not the new one."""
    return osftjobs.learned_model()


@pytest.fixture(scope="session")
def operator(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[operator_process.OperatorProcess]:
    """The operator of the installed chart, as its own process; its log is shown on failure."""
    cluster.plane.create_namespace(SYSTEM)
    folder = tmp_path_factory.mktemp("operator")
    with operator_process.running(
        cluster.plane, SYSTEM, folder, cluster.mark, operator_process.QUICK
    ) as process:
        yield process
        # Whatever the tests made it do, the chart's roles allow it.
        assert rights.refused(cluster.plane, SYSTEM) == []


@pytest.fixture
def jobs(
    cluster: Cluster,
    operator: operator_process.OperatorProcess,
    namespace: str,
    learned: Path,
) -> Jobs:
    """A namespace with the model and data on claims, and the operator at work."""
    jobs = Jobs(cluster, namespace)
    jobs.provide(learned)
    return jobs
