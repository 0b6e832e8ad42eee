"""Kueue's Workloads, read from a real API server that has the kind, or has not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.control_plane import ControlPlane
from osft_operator.cluster import Cluster, Forbidden
from osft_operator.kinds import WORKLOADS, Object
from osft_operator.names import QUEUE_LABEL, WORKLOAD_JOB_LABEL
from osft_operator.workloads import FORGET_SECONDS, Workloads

pytestmark = pytest.mark.cluster

JOB: Object = {"metadata": {"name": "run", "uid": "job-uid"}}
VERSION = WORKLOADS[-1].version
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "workloads.kueue.x-k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in"},
    },
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"plural": "workloads", "singular": "workload", "kind": "Workload"},
        "versions": [
            {
                "name": VERSION,
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "x-kubernetes-preserve-unknown-fields": True,
                    }
                },
            }
        ],
    },
}


@pytest.fixture
def kueue(control_plane: ControlPlane) -> Iterator[None]:
    control_plane.install_crd(CRD)
    yield
    control_plane.remove_crd("workloads.kueue.x-k8s.io", [VERSION])


def pytorch_job(namespace: str, **changes: Any) -> Object:
    metadata = {
        "name": "run",
        "namespace": namespace,
        "uid": "uid-1",
        "labels": {QUEUE_LABEL: "team"},
        "ownerReferences": [{"controller": True, "uid": "job-uid"}],
    }
    return {"metadata": metadata | changes, "spec": {"runPolicy": {"suspend": True}}}


def test_the_workload_of_a_queued_job_is_read(
    control_plane: ControlPlane, namespace: str, kueue: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, uid in (("mine", "uid-1"), ("other", "uid-2")):
        metadata = {"name": name, "labels": {WORKLOAD_JOB_LABEL: uid}}
        body = {"apiVersion": f"kueue.x-k8s.io/{VERSION}", "kind": "Workload", "metadata": metadata}
        path = f"/apis/kueue.x-k8s.io/{VERSION}/namespaces/{namespace}/workloads"
        control_plane.api.post(path, body)
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    cluster = Cluster.connect(threads=1)
    running = pytorch_job(namespace)
    running["spec"]["runPolicy"]["suspend"] = False

    async def story() -> None:
        wanted = Workloads(cluster, wanted=True)
        found = await wanted.of(JOB, [pytorch_job(namespace)])
        assert found is not None
        assert found["metadata"]["name"] == "mine"
        assert await wanted.of(JOB, [running]) is None, "nothing is asked for a job that runs"
        assert await wanted.of(JOB, [pytorch_job(namespace, labels={})]) is None
        assert await wanted.of(JOB, [pytorch_job(namespace, ownerReferences=[])]) is None
        assert await Workloads(cluster, wanted=False).of(JOB, [pytorch_job(namespace)]) is None

    try:
        asyncio.run(story())
    finally:
        cluster.close()


def test_without_kueue_or_rights_it_is_asked_rarely(namespace: str) -> None:
    asked: list[str] = []
    now = [0.0]

    class Refusing:
        async def list_all(self, kind: Any, *_: Any, **__: Any) -> None:
            asked.append(kind.version)
            raise Forbidden("not yours")

    async def story() -> None:
        workloads = Workloads(Refusing(), wanted=True, clock=lambda: now[0])  # type: ignore[arg-type]
        for _ in range(3):
            assert await workloads.of(JOB, [pytorch_job(namespace)]) is None
        assert len(asked) == 1
        now[0] += FORGET_SECONDS + 1
        await workloads.of(JOB, [pytorch_job(namespace)])
        assert len(asked) == 2

    asyncio.run(story())
