"""The cache: newest wins, the gone stay gone, children are found, a list removes ghosts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from osft_operator.cache import Cache
from osft_operator.cluster import KindMissing, Listing, Unavailable
from osft_operator.kinds import CLAIMS, OSFTJOBS, PODS, PYTORCHJOBS, Kind
from osft_operator.metrics import registry
from osft_operator.names import JOB_LABEL
from osft_operator.places import Places
from osft_operator.queue import Key
from osft_operator.resync import Resync

KEY = Key("n", "job")


def body(
    name: str = "job", version: int = 1, uid: str = "u1", job: str | None = None, **more: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": "n",
        "uid": uid,
        "resourceVersion": str(version),
        "managedFields": [{"manager": "somebody"}],
    }
    if job is not None:
        metadata["labels"] = {JOB_LABEL: job}
    return {"metadata": metadata, **more}


def test_only_what_is_newer_is_news() -> None:
    cache = Cache()
    assert cache.put(OSFTJOBS, body(version=5)) == KEY
    assert cache.put(OSFTJOBS, body(version=5)) is None
    assert cache.put(OSFTJOBS, body(version=4)) is None
    assert cache.put(OSFTJOBS, body(version=10)) == KEY, "versions are numbers, not words"
    assert cache.jobs() == [KEY]


def test_what_is_gone_stays_gone_but_its_name_can_come_again() -> None:
    cache = Cache()
    cache.put(OSFTJOBS, body(version=5))
    assert cache.remove(OSFTJOBS, body(version=6)) == KEY
    assert cache.put(OSFTJOBS, body(version=7)) is None, "a late answer brought it back"
    assert cache.put(OSFTJOBS, body(version=8, uid="u2")) == KEY
    assert cache.remove(OSFTJOBS, body(version=9)) is None, "the old one's end removed the new one"
    assert cache.get(OSFTJOBS, "n", "job") is not None


def test_children_are_found_by_label() -> None:
    cache = Cache()
    assert cache.put(PYTORCHJOBS, body("a", uid="a", job="job")) == KEY
    cache.put(PYTORCHJOBS, body("b", uid="b", job="job"))
    cache.put(PYTORCHJOBS, body("c", uid="c", job="other"))
    cache.put(CLAIMS, body("d", uid="d"))
    assert [child["metadata"]["name"] for child in cache.children(PYTORCHJOBS, KEY)] == ["a", "b"]
    assert cache.children(CLAIMS, KEY) == []
    cache.put(PYTORCHJOBS, body("a", 2, uid="a", job="other"))
    assert [child["metadata"]["name"] for child in cache.children(PYTORCHJOBS, KEY)] == ["b"]
    cache.remove(PYTORCHJOBS, body("b", 3, uid="b"))
    assert cache.children(PYTORCHJOBS, KEY) == []


def test_a_list_removes_ghosts_and_keeps_what_came_after_it() -> None:
    cache = Cache()
    cache.put(PODS, body("ghost", 3, uid="g", job="job"))
    cache.put(PODS, body("kept", 4, uid="k", job="kept"))
    cache.put(PODS, body("young", 20, uid="y", job="young"))
    assert cache.sweep(PODS, "n", {"k"}, "10") == {KEY}
    assert sorted(pod["metadata"]["name"] for pod in cache.all(PODS)) == ["kept", "young"]
    assert cache.sweep(PODS, "elsewhere", set(), "99") == set()
    assert len(list(cache.all(PODS))) == 2, "a list of one namespace emptied another"


def test_only_what_is_read_is_kept() -> None:
    cache = Cache()
    cache.put(PODS, body("p", job="job", spec={"nodeName": "n1", "containers": [{"env": []}]}))
    (pod,) = cache.children(PODS, KEY)
    assert pod["spec"] == {"nodeName": "n1"}
    assert "managedFields" not in pod["metadata"]
    spec = {
        "runPolicy": {"suspend": True},
        "pytorchReplicaSpecs": {"Worker": {"replicas": 3, "template": {}}},
    }
    cache.put(PYTORCHJOBS, body("p", job="job", spec=spec))
    (pytorch_job,) = cache.children(PYTORCHJOBS, KEY)
    assert pytorch_job["spec"] == {
        "runPolicy": {"suspend": True},
        "pytorchReplicaSpecs": {"Worker": {"replicas": 3}},
    }


def test_equal_texts_are_kept_once() -> None:
    cache = Cache()
    for name in ("a", "b"):
        told = '{"phase": "Running", "steps": [1, {"reason": "PodsRunning"}]}'
        cache.put(PYTORCHJOBS, body(name, uid=name, job="job", status=json.loads(told)))
    first, second = (each["status"] for each in cache.children(PYTORCHJOBS, KEY))
    assert first == second == {"phase": "Running", "steps": [1, {"reason": "PodsRunning"}]}
    assert first["phase"] is second["phase"]
    assert first["steps"][1]["reason"] is second["steps"][1]["reason"]


class NoSuchKind:
    """A server that does not know a kind, or has not loaded it yet."""

    async def pages(self, kind: Kind, *_: object, **__: object) -> AsyncIterator[Listing]:
        raise KindMissing("404 page not found")
        yield


def test_a_kind_that_seems_missing_takes_no_object_along() -> None:
    cache = Cache()
    cache.put(PYTORCHJOBS, body("a", uid="a", job="job"))
    resync = Resync(NoSuchKind(), cache, Places([]))  # type: ignore[arg-type]
    assert asyncio.run(resync.run()) == set()
    assert PYTORCHJOBS not in resync.present
    assert len(cache.children(PYTORCHJOBS, KEY)) == 1


class Lists:
    """A server whose list of pods is a little ahead of its watches."""

    def __init__(self) -> None:
        self.version = 1

    async def pages(self, kind: Kind, *_: object, **__: object) -> AsyncIterator[Listing]:
        pods = [body("p", self.version, uid="p", job="job")] if kind is PODS else []
        yield Listing(pods, str(self.version))


def drift() -> float:
    return registry.get_sample_value("osft_operator_resync_drift_total", {"kind": "pods"}) or 0.0


@pytest.mark.parametrize("told", [True, False])
def test_a_list_that_is_only_faster_than_the_watch_is_no_drift(told: bool) -> None:
    server, now = Lists(), 0.0
    resync = Resync(server, Cache(), Places([]), clock=lambda: now)  # type: ignore[arg-type]
    asyncio.run(resync.run())
    before, server.version = drift(), 2
    assert asyncio.run(resync.run()) == {KEY}
    now = 1.0
    resync.settle()
    assert drift() == before, "the watch has had no time yet"
    if told:
        resync.told(PODS, KEY)
    else:
        resync.told(CLAIMS, KEY)
    now = 60.0
    resync.settle()
    resync.settle()
    assert drift() == before + (0 if told else 1)


class BrokenLists(Lists):
    """A server that fails after the first page of pods."""

    is_broken = True

    async def pages(self, kind: Kind, *_: object, **__: object) -> AsyncIterator[Listing]:
        if kind is OSFTJOBS:
            yield Listing([body("other", self.version, uid="other")], str(self.version))
        if kind is PODS:
            yield Listing([body("p", self.version, uid="p", job="job")], str(self.version))
            if self.is_broken:
                raise Unavailable("the second page")
            yield Listing([], str(self.version))


def test_news_of_a_list_that_fails_are_told_by_the_next() -> None:
    server = BrokenLists()
    resync = Resync(server, Cache(), Places([]))  # type: ignore[arg-type]
    assert asyncio.run(resync.run()) == {Key("n", "other")}
    server.is_broken = False
    assert asyncio.run(resync.run()) == {KEY}
    assert asyncio.run(resync.run()) == set()
