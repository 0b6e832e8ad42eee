"""Watches and lists against a real API server, with a kind that goes and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import bare_plane
from cluster.binaries import Binaries
from cluster.control_plane import ControlPlane
from cluster.fixtures import pytorchjob_crd
from osft_operator.cache import WATCHED, Cache
from osft_operator.cluster import Cluster
from osft_operator.freshness import Freshness
from osft_operator.handlers import kopf_settings
from osft_operator.informer import Informer
from osft_operator.kinds import CLAIMS, OSFTJOBS, PODS, PYTORCHJOBS
from osft_operator.names import JOB_LABEL
from osft_operator.queue import Key
from osft_operator.settings import Settings

pytestmark = pytest.mark.cluster


def claim(name: str, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "labels": labels},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }


class Scene:
    """An informer at work, and what it told."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.cache = Cache()
        self.news: list[Key] = []
        self.lists = 0
        settings = Settings(namespaces=(namespace,), kind_check_seconds=0.2, resync_seconds=600)
        self.informer = Informer(
            settings, cluster, self.cache, news=self.news.append, resynced=self._listed
        )

    def _listed(self, _: bool) -> None:
        self.lists += 1

    async def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, f"never: {what}"
            await asyncio.sleep(0.05)


def with_cluster(
    plane: ControlPlane,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[Cluster], Coroutine[Any, Any, None]],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig))
    cluster = Cluster.connect()
    try:
        asyncio.run(whole(cluster))
    finally:
        cluster.close()


def play(
    plane: ControlPlane,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    story: Callable[[Scene], Coroutine[Any, Any, None]],
) -> None:
    async def whole(cluster: Cluster) -> None:
        scene = Scene(cluster, namespace)
        await scene.informer.sync()
        running = asyncio.create_task(scene.informer.run())
        telling = asyncio.create_task(story(scene))
        try:
            await asyncio.wait({running, telling}, return_when=asyncio.FIRST_COMPLETED)
            assert not running.done(), running.exception()
            telling.result()
        finally:
            running.cancel()
            telling.cancel()
            await asyncio.gather(running, telling, return_exceptions=True)

    with_cluster(plane, monkeypatch, whole)


def test_the_selectors_reach_the_server() -> None:
    selectors = kopf_settings(WATCHED).watching.label_selectors
    found = {(key.group or "", key.version, key.any_name): selectors[key] for key in selectors}
    assert found == {
        (kind.group, kind.version, kind.plural): JOB_LABEL for kind in (PYTORCHJOBS, PODS, CLAIMS)
    }


def test_what_happens_is_heard_and_what_is_not_ours_is_not(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(scene: Scene) -> None:
        await scene.cluster.create(CLAIMS, namespace, claim("foreign"))
        made = await scene.cluster.create(CLAIMS, namespace, claim("c", **{JOB_LABEL: "job"}))
        await scene.until(lambda: scene.news, "news of a claim")
        assert set(scene.news) == {Key(namespace, "job")}
        assert [c["metadata"]["name"] for c in scene.cache.all(CLAIMS)] == ["c"]
        await scene.cluster.patch(CLAIMS, namespace, "c", {"metadata": {"finalizers": None}})
        await scene.cluster.delete(CLAIMS, namespace, "c", uid=made["metadata"]["uid"])
        await scene.until(lambda: not list(scene.cache.all(CLAIMS)), "the end of the claim")
        fields = (await scene.cluster.get(CLAIMS, namespace, "foreign"))["metadata"]
        assert "annotations" not in fields, "kopf wrote something"

    play(control_plane, namespace, monkeypatch, story)


def test_what_is_gone_before_the_watches_begin_is_noticed(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache()
    # nothing else may find it
    seldom = {"watch_check_seconds": 1000, "watch_stall_seconds": 3000, "resync_seconds": 1000}
    settings = Settings(namespaces=(namespace,), **seldom)

    async def whole(cluster: Cluster) -> None:
        made = await cluster.create(CLAIMS, namespace, claim("c", **{JOB_LABEL: "job"}))
        await cluster.patch(CLAIMS, namespace, "c", {"metadata": {"finalizers": None}})
        informer = Informer(settings, cluster, cache, news=lambda _: None, resynced=lambda _: None)
        await informer.sync()
        assert len(list(cache.all(CLAIMS))) == 1
        await cluster.delete(CLAIMS, namespace, "c", uid=made["metadata"]["uid"])
        running = asyncio.create_task(informer.run())
        end = time.monotonic() + 20
        while list(cache.all(CLAIMS)) and time.monotonic() < end and not running.done():
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with_cluster(control_plane, monkeypatch, whole)
    assert list(cache.all(CLAIMS)) == []


def test_a_bug_in_looking_after_the_watches_is_not_hidden(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(_: object, places: object) -> dict[object, object]:
        raise LookupError("a bug")

    async def whole(cluster: Cluster) -> None:
        settings = Settings(namespaces=(namespace,), watch_check_seconds=0.1)
        informer = Informer(
            settings, cluster, Cache(), news=lambda _: None, resynced=lambda _: None
        )
        await informer.sync()
        with pytest.raises(LookupError, match="a bug"):
            await asyncio.wait_for(informer.run(), 20)

    monkeypatch.setattr(Freshness, "check", check)
    with_cluster(control_plane, monkeypatch, whole)


def test_a_kind_that_comes_and_goes_ends_nothing(
    control_plane_binaries: Binaries,
    session_mark: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespace = bare_plane.NAMESPACE

    async def story(scene: Scene) -> None:
        assert scene.informer.serves(OSFTJOBS)
        assert not scene.informer.serves(PYTORCHJOBS)
        await scene.cluster.create(CLAIMS, namespace, claim("c", **{JOB_LABEL: "job"}))
        await scene.until(lambda: scene.news, "news while a kind is missing")
        await asyncio.to_thread(plane.install_crd, pytorchjob_crd())
        await scene.until(lambda: scene.informer.serves(PYTORCHJOBS), "the kind's coming")
        body = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "p", "labels": {JOB_LABEL: "other"}},
            "spec": {"pytorchReplicaSpecs": {}},
        }
        await scene.cluster.create(PYTORCHJOBS, namespace, body)
        await scene.until(lambda: Key(namespace, "other") in scene.news, "news of the new kind")
        plane.remove_crd("pytorchjobs.kubeflow.org", ["v1"])
        await scene.until(lambda: not scene.informer.serves(PYTORCHJOBS), "the kind's end")
        await scene.cluster.create(CLAIMS, namespace, claim("d", **{JOB_LABEL: "last"}))
        await scene.until(lambda: Key(namespace, "last") in scene.news, "news after the end")

    folder = tmp_path_factory.mktemp("plane")
    with bare_plane.running(control_plane_binaries, folder, session_mark) as plane:
        play(plane, namespace, monkeypatch, story)
