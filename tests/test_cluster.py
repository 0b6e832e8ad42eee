"""The client against a real API server: results, pages, errors sorted by what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from kubernetes import client

from cluster.control_plane import ControlPlane
from osft_operator import cluster as cluster_module
from osft_operator.cluster import (
    AlreadyExists,
    Cluster,
    Conflict,
    Forbidden,
    KindMissing,
    NotFound,
    Refused,
    Unavailable,
)
from osft_operator.kinds import CLAIMS, EVENTS, PYTORCHJOBS, Kind, Object

pytestmark = pytest.mark.cluster

Story = Callable[[Cluster], Coroutine[Any, Any, None]]


@pytest.fixture
def tell(control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    """Runs a story with a connected client."""

    def run(story: Story) -> None:
        monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
        cluster = Cluster.connect()
        try:
            asyncio.run(story(cluster))
        finally:
            cluster.close()

    return run


def claim(name: str, **labels: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


def test_create_get_patch_delete(tell: Callable[[Story], None], namespace: str) -> None:
    async def story(cluster: Cluster) -> None:
        made = await cluster.create(CLAIMS, namespace, claim("c"))
        assert (await cluster.get(CLAIMS, namespace, "c"))["metadata"]["uid"] == (
            made["metadata"]["uid"]
        )
        change = {"metadata": {"labels": {"a": "b"}}}
        patched = await cluster.patch(CLAIMS, namespace, "c", change)
        assert patched["metadata"]["labels"] == {"a": "b"}
        with pytest.raises(Conflict):
            await cluster.delete(CLAIMS, namespace, "c", uid="another")
        await cluster.delete(CLAIMS, namespace, "c", uid=made["metadata"]["uid"])

    tell(story)


def test_a_deleted_object_may_be_deleted_again(
    tell: Callable[[Story], None], namespace: str
) -> None:
    async def story(cluster: Cluster) -> None:
        await cluster.delete(CLAIMS, namespace, "never-there", uid="x")

    tell(story)


def test_lists_come_whole_though_in_pages(
    tell: Callable[[Story], None], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        for number in range(5):
            await cluster.create(CLAIMS, namespace, claim(f"c{number}", ours="yes"))
        await cluster.create(CLAIMS, namespace, claim("other"))
        monkeypatch.setattr(cluster_module, "PAGE_SIZE", 2)
        found = await cluster.list_all(CLAIMS, namespace, labels="ours")
        assert [item["metadata"]["name"] for item in found.items] == [f"c{n}" for n in range(5)]
        assert int(found.version) >= max(
            int(item["metadata"]["resourceVersion"]) for item in found.items
        )
        everywhere = await cluster.list_all(CLAIMS, None, fields="metadata.name=c3")
        assert namespace in [item["metadata"]["namespace"] for item in everywhere.items]

    tell(story)


def test_a_list_of_large_objects_comes_in_smaller_pages(
    tell: Callable[[Story], None], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too long to be held is not read to its end, and the connection is of use again."""

    async def story(cluster: Cluster) -> None:
        for number in range(6):
            large = claim(f"c{number}", kept="yes")
            large["metadata"]["annotations"] = {"a": "x" * 40_000}
            await cluster.create(CLAIMS, namespace, large)
        monkeypatch.setattr(cluster_module, "PAGE_BYTES", 100_000)
        listing = await cluster.list_all(CLAIMS, namespace)
        assert [each["metadata"]["name"] for each in listing.items] == [f"c{n}" for n in range(6)]
        monkeypatch.setattr(cluster_module, "PAGE_BYTES", 1_000)
        assert len((await cluster.list_all(CLAIMS, namespace)).items) == 6, "one by one"

    tell(story)


def test_errors_say_what_to_do(tell: Callable[[Story], None], namespace: str) -> None:
    async def story(cluster: Cluster) -> None:
        with pytest.raises(NotFound) as missing:
            await cluster.get(CLAIMS, namespace, "nothing")
        assert not isinstance(missing.value, KindMissing)
        with pytest.raises(KindMissing):
            await cluster.list_all(Kind("nobody.example", "v1", "things", "Thing"), namespace)
        made = await cluster.create(CLAIMS, namespace, claim("c"))
        with pytest.raises(AlreadyExists):
            await cluster.create(CLAIMS, namespace, claim("c"))
        await cluster.patch(CLAIMS, namespace, "c", {"metadata": {"labels": {"a": "b"}}})
        with pytest.raises(Conflict) as conflict:
            await cluster.replace(CLAIMS, namespace, "c", made)
        assert not isinstance(conflict.value, AlreadyExists)
        bad = claim("bad")
        bad["spec"]["accessModes"] = []
        with pytest.raises(Refused, match="accessModes"):
            await cluster.create(CLAIMS, namespace, bad)
        with pytest.raises(NotFound):
            await cluster.create(CLAIMS, "no-such-namespace", claim("c"))

    tell(story)


def test_unknown_fields_of_a_pytorchjob_are_refused_by_name(
    tell: Callable[[Story], None], namespace: str
) -> None:
    async def story(cluster: Cluster) -> None:
        body = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "p"},
            "spec": {"pytorchReplicaSpecs": {}, "nprocPerNodes": "2"},
        }
        with pytest.raises(Refused, match="nprocPerNodes"):
            await cluster.create(PYTORCHJOBS, namespace, body)

    tell(story)


def test_a_kind_is_known_to_be_there_or_not(tell: Callable[[Story], None]) -> None:
    async def story(cluster: Cluster) -> None:
        assert await cluster.serves(PYTORCHJOBS)
        assert await cluster.serves(EVENTS)
        assert not await cluster.serves(Kind("nobody.example", "v1", "things", "Thing"))
        assert not await cluster.serves(Kind("kubeflow.org", "v1", "tfjobs", "TFJob"))

    tell(story)


def test_a_missing_right_is_told_from_a_bad_request(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(cluster: Cluster) -> None:
        with pytest.raises(Forbidden, match="persistentvolumeclaims"):
            await cluster.create(CLAIMS, namespace, claim("c"))

    config = control_plane.service_account_kubeconfig(namespace, "default")
    monkeypatch.setenv("KUBECONFIG", str(config))
    cluster = Cluster.connect()
    try:
        asyncio.run(story(cluster))
    finally:
        cluster.close()


def test_nobody_answers() -> None:
    async def story() -> None:
        with pytest.raises(Unavailable, match="no answer"):
            await cluster.get(CLAIMS, "n", "c")

    cluster = Cluster(client.Configuration(host="http://127.0.0.1:9"), timeout_seconds=2)
    try:
        asyncio.run(story())
    finally:
        cluster.close()


def test_a_write_that_may_not_happen_does_not(
    tell: Callable[[Story], None], namespace: str
) -> None:
    class Fenced(Exception):
        pass

    def fence() -> None:
        raise Fenced

    async def story(cluster: Cluster) -> None:
        cluster.before_write = fence
        with pytest.raises(Fenced):
            await cluster.create(CLAIMS, namespace, claim("c"))
        with pytest.raises(NotFound):
            await cluster.get(CLAIMS, namespace, "c")

    tell(story)


def test_changes_since_a_version(tell: Callable[[Story], None], namespace: str) -> None:
    async def story(cluster: Cluster) -> None:
        before = (await cluster.list_all(CLAIMS, namespace)).version
        made = await cluster.create(CLAIMS, namespace, claim("c", a="b"))
        await cluster.create(CLAIMS, namespace, claim("other"))
        found = await cluster.changes(CLAIMS, namespace, before, labels="a=b")
        assert [(each.type, each.object["metadata"]["name"]) for each in found] == [("ADDED", "c")]
        version = made["metadata"]["resourceVersion"]
        assert await cluster.changes(CLAIMS, namespace, version, labels="a=b") == []

    tell(story)
