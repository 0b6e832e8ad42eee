"""The chart's rights are those that the operator uses: none is missing, and none is left over.

One scripted life of several OSFTJobs makes the operator, a process under the chart's account, do
everything it can do; the server's audit log says what that was.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import job_samples
import operator_process
import rights
from chart_rendering import render
from cluster.api import wait_for
from cluster.control_plane import ControlPlane
from operator_process import OperatorProcess
from rights import Right

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

ASKED_BY_THE_SERVER = {Right("osft.dev", "osftjobs/finalizers", "update")}
"""Not a call: an admission plugin asks for it when a child blocks its owner's deletion."""
READS_NOTHING_MORE = {Right("osft.dev", "osftjobs", "get"), Right("", "pods", "get")}
"""Not called today: `list` and `watch` read the same, so nothing is gained without them."""


@pytest.fixture
def operator(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, session_mark: str
) -> Iterator[OperatorProcess]:
    """An operator under the chart's account, in the test's namespace."""
    with operator_process.running(
        control_plane, namespace, tmp_path, session_mark, operator_process.QUICK
    ) as process:
        yield process


class Life:
    """What people, the training-operator and Kubernetes do to OSFTJobs of one namespace."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._api = plane.api
        self._core = f"/api/v1/namespaces/{namespace}"
        self._jobs = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
        self._pytorch_jobs = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"

    def apply(self, name: str, changes: dict[str, Any] | None = None) -> None:
        self._api.post(self._jobs, job_samples.job(changes, name=name))

    def edit(self, name: str, **spec: Any) -> None:
        self._api.patch(f"{self._jobs}/{name}", {"spec": spec})

    def end(self, name: str, how: str) -> None:
        """The training-operator says how a PyTorchJob ended."""
        condition = {"type": how, "status": "True", "reason": "Said", "message": "by the test"}
        self._api.patch(
            f"{self._pytorch_jobs}/{name}/status", {"status": {"conditions": [condition]}}
        )

    def pytorch_job(self, name: str, **metadata: Any) -> None:
        """Somebody's own PyTorchJob."""
        template = {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}
        spec = {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}}
        body = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "spec": spec}
        self._api.post(self._pytorch_jobs, {**body, "metadata": {"name": name, **metadata}})

    def claim(self, name: str) -> None:
        """Somebody's own claim."""
        spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}}
        self._api.post(f"{self._core}/persistentvolumeclaims", {**body, "spec": spec})

    def wait_for_pytorch_job(self, name: str) -> None:
        wait_for(f"PyTorchJob {name}", lambda: name in self._names(self._pytorch_jobs))

    def wait_until_gone(self, name: str) -> None:
        wait_for(f"the end of {name}", lambda: name not in self._names(self._jobs))

    def wait_for_reason(self, name: str, reason: str) -> None:
        def said() -> bool:
            status = self._api.get(f"{self._jobs}/{name}").get("status") or {}
            conditions = status.get("conditions") or []
            return any(each["reason"] == reason for each in conditions)

        wait_for(f"{reason} of {name}", said)

    def wait_for_count(self, reason: str, count: int) -> None:
        def counted() -> bool:
            items = self._api.get(f"{self._core}/events")["items"]
            return any(each["reason"] == reason and each["count"] >= count for each in items)

        wait_for(f"event {reason} for the {count}. time", counted)

    def _names(self, path: str) -> set[str]:
        return {item["metadata"]["name"] for item in self._api.get(path)["items"]}


def _live(life: Life, operator: OperatorProcess) -> None:
    """Everything that makes the operator call the API server in some way."""
    life.apply("run", {"spec.ttlSecondsAfterFinished": 0})
    life.wait_for_pytorch_job("run")
    life.claim("mine")
    own = {"spec.storage.checkpoints": {"claimName": "mine"}}
    life.apply("own-claim", own)
    life.wait_for_pytorch_job("own-claim")
    # a name that is taken by what no watch of ours tells of
    life.pytorch_job("taken")
    life.apply("taken", own)
    life.wait_for_reason("taken", "NameTaken")
    life.edit("run", suspend=True)
    life.wait_for_count("SuspendRequested", 1)
    life.edit("run", suspend=False)
    life.wait_for_count("Resumed", 1)
    # a new process does not know the count of what it says again
    operator.kill()
    operator.start()
    life.edit("run", suspend=True)
    life.wait_for_count("SuspendRequested", 2)
    life.edit("run", suspend=False)
    life.wait_for_count("Resumed", 2)
    life.end("run", "Failed")
    life.wait_for_pytorch_job("run-a2")
    life.end("run-a2", "Succeeded")
    life.wait_until_gone("run")


def test_no_right_is_missing_and_none_is_left_over(
    operator: OperatorProcess, control_plane: ControlPlane, namespace: str
) -> None:
    _live(Life(control_plane, namespace), operator)
    assert operator.stop() == 0
    assert rights.refused(control_plane, namespace) == []
    asked = rights.asked(control_plane, namespace)
    roles = [item for item in render({}) if item["kind"] in ("ClusterRole", "Role")]
    granted = rights.granted([item for item in roles if "-job-" not in item["metadata"]["name"]])
    assert asked - granted == set(), "used, but not in the chart"
    unused = granted - asked - ASKED_BY_THE_SERVER - READS_NOTHING_MORE
    assert unused == set(), "in the chart, but never used"
    assert granted >= ASKED_BY_THE_SERVER | READS_NOTHING_MORE
    assert asked.isdisjoint(READS_NOTHING_MORE), "used now: no exception any more"
