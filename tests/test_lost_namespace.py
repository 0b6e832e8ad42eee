"""One of the watched namespaces is deleted, its Role with it, and comes back: the rest goes on.

The operator as a process of its own with the chart's rights, against a real API server; what is
decided when is shown in test_places.
"""

from __future__ import annotations

import copy
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import job_samples
import operator_process
from cluster.api import wait_for
from cluster.control_plane import ControlPlane
from operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

RIGHTS = "/apis/rbac.authorization.k8s.io/v1"


class Scene:
    """An operator that watches two namespaces, one of which is lost."""

    def __init__(self, plane: ControlPlane, operator: OperatorProcess, lost: str) -> None:
        self.plane = plane
        self.operator = operator
        self.lost = lost

    def apply(self, namespace: str, name: str) -> None:
        path = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
        self.plane.api.post(path, job_samples.job(name=name))

    def wait_made(self, namespace: str, name: str) -> None:
        path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"

        def made() -> bool:
            assert self.probe("healthz") == "ok"
            items = self.plane.api.get(path)["items"]
            return any(item["metadata"]["name"] == name for item in items)

        wait_for(f"PyTorchJob {namespace}/{name}", made, timeout_seconds=60)

    def probe(self, name: str) -> str:
        """What a probe answers; HTTPError when that is no 200."""
        with urllib.request.urlopen(f"{self.operator.probes}/{name}", timeout=5) as answer:
            return str(answer.read().decode())

    def is_served(self) -> bool:
        """What readiness and metrics say of the namespace, which must be the same."""
        assert self.probe("healthz") == "ok"
        port = self.operator.environment["OSFT_METRICS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        labels = f'{{watched_namespace="{self.lost}"}}'
        served = f"osft_operator_namespace_served{labels} 1.0" in text
        lines = self.probe("readyz").splitlines()
        assert lines[0] == "ok"
        assert served or f"osft_operator_namespace_served{labels} 0.0" in text
        return served and not any(f"namespace {self.lost} is not served" in each for each in lines)

    def rights(self) -> list[tuple[str, dict[str, Any]]]:
        """The chart's Role and RoleBinding in the namespace, to be made again."""
        found = []
        for plural in ("roles", "rolebindings"):
            path = f"{RIGHTS}/namespaces/{self.lost}/{plural}"
            for item in self.plane.api.get(path)["items"]:
                body = copy.deepcopy(item)
                body["metadata"] = {key: item["metadata"][key] for key in ("name", "labels")}
                found.append((path, body))
        return found


@pytest.fixture
def scene(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, session_mark: str
) -> Iterator[Scene]:
    lost = f"{namespace}-lost"
    control_plane.create_namespace(lost)
    values = {
        **operator_process.QUICK,
        "reconcile": {"kindCheckSeconds": 2, "watchCheckSeconds": 1},
        "watch": {"namespaces": [namespace, lost]},
    }
    with operator_process.running(
        control_plane, namespace, tmp_path, session_mark, values
    ) as operator:
        yield Scene(control_plane, operator, lost)
        assert '"severity": "error"' not in operator.log(), operator.log()[-5000:]
    control_plane.delete_namespace(lost)


def test_a_deleted_namespace_is_left_out_and_served_again_when_it_is_back(
    scene: Scene, namespace: str
) -> None:
    scene.apply(scene.lost, "run")
    scene.apply(namespace, "first")
    scene.wait_made(scene.lost, "run")
    scene.wait_made(namespace, "first")
    rights = scene.rights()
    assert len(rights) == 2
    path = f"/api/v1/namespaces/{scene.lost}"
    scene.plane.api.delete(path)

    wait_for("the loss", lambda: not scene.is_served(), timeout_seconds=60)
    scene.apply(namespace, "second")
    scene.wait_made(namespace, "second")
    wait_for(
        "the namespace's end",
        lambda: scene.lost not in {
            each["metadata"]["name"] for each in scene.plane.api.get("/api/v1/namespaces")["items"]
        },
        timeout_seconds=60,
    )  # fmt: skip

    scene.operator.kill()
    scene.operator.start()
    assert not scene.is_served()
    scene.apply(namespace, "third")
    scene.wait_made(namespace, "third")

    scene.plane.create_namespace(scene.lost)
    scene.apply(scene.lost, "again")
    for where, body in rights:
        scene.plane.api.post(where, body)
    scene.wait_made(scene.lost, "again")
    wait_for("the namespace's return", scene.is_served)
