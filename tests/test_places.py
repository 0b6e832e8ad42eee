"""One namespace of many cannot be read: it is left out and said, and the others know nothing of it.

The informer with an API server made of dictionaries, in a loop whose clock runs when nothing else
does, so that minutes take none. The watches are the test's; a real server, and kopf, are asked in
test_lost_namespace.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from osft_operator import cluster_errors, metrics
from osft_operator.cache import WATCHED, Cache
from osft_operator.cluster import (
    Change,
    ClusterError,
    Forbidden,
    KindMissing,
    Listing,
    Unavailable,
    looks_for,
)
from osft_operator.informer import Informer
from osft_operator.kinds import OSFTJOBS, PODS, PYTORCHJOBS, Kind
from osft_operator.places import Place, Places
from osft_operator.probes import Health
from osft_operator.queue import Key
from osft_operator.settings import Settings

MANY = tuple(f"team-{number}" for number in range(110))
ANSWERS = [
    each
    for each in vars(cluster_errors).values()
    if isinstance(each, type) and issubclass(each, ClusterError) and each is not KindMissing
]


LONG = 1300.0
"""Seconds after which liveness fails when no resync ends."""


class Patient(selectors.DefaultSelector):
    """Waits for nothing: the clock goes on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(0)


class Scene:
    """An informer, and a server that has one job in each namespace."""

    def __init__(self, clock: Callable[[], float], *namespaces: str) -> None:
        self.now = clock
        self.settings = Settings(namespaces=namespaces)
        self.errors: dict[Place, ClusterError] = {}
        self.unwatchable: dict[Place, ClusterError] = {}
        self.changed: dict[Place, list[Change]] = {}
        self.lists = 0
        self.list_seconds = 0.01
        looks = looks_for(len(namespaces), self.settings.watch_check_seconds)
        self.threads = asyncio.Semaphore(looks)
        self.news: list[Key] = []
        self.health = Health(self.settings, clock=clock)
        self.informer = Informer(
            self.settings,
            self,  # type: ignore[arg-type]
            Cache(),
            news=self.news.append,
            resynced=self.health.resynced,
            listed=self.health.listed,
            clock=clock,
        )

    async def pages(self, kind: Kind, namespace: str | None, **_: object) -> AsyncIterator[Listing]:
        self.lists += 1
        await asyncio.sleep(self.list_seconds)
        if error := self.errors.get((kind, namespace)):
            raise error
        yield Listing([job(namespace or "n")] if kind is OSFTJOBS else [], "10")

    async def changes(
        self, kind: Kind, namespace: str | None, version: str, **_: object
    ) -> list[Change]:
        async with self.threads:
            await asyncio.sleep(1.0)
        place = (kind, namespace)
        if error := self.errors.get(place) or self.unwatchable.get(place):
            raise error
        return self.changed.pop(place, [])

    async def serves(self, kind: Kind) -> bool:
        return True

    async def work(self, seconds: float) -> list[str]:
        """Look after the watches for so long; what liveness finds at any second of it."""
        parts = [
            self.informer._check_on(WATCHED),
            self.informer._until_other_kinds(self.informer._resync.present),
            self.health.keep_beating(lambda: 0.0, self.informer.behind_seconds),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        found: list[str] = []
        end = self.now() + seconds
        while self.now() < end:
            await asyncio.sleep(1.0)
            found += self.health.problems()
        for task in tasks:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found


def job(namespace: str, version: int = 5) -> dict[str, Any]:
    metadata = {"name": "job", "namespace": namespace, "uid": namespace}
    return {"metadata": {**metadata, "resourceVersion": str(version)}}


def play(story: Callable[[Scene], Coroutine[Any, Any, None]], *namespaces: str) -> None:
    patient = Patient()
    loop = asyncio.SelectorEventLoop(patient)
    loop.time = lambda: patient.now  # type: ignore[method-assign]

    async def whole() -> None:
        await story(Scene(loop.time, *namespaces))

    try:
        loop.run_until_complete(whole())
    finally:
        loop.close()


def told(scene: Scene) -> set[str]:
    found = {key.namespace for key in scene.news}
    scene.news.clear()
    return found


def served(namespace: str) -> float | None:
    labels = {"watched_namespace": namespace}
    return metrics.registry.get_sample_value("osft_operator_namespace_served", labels)


@pytest.mark.parametrize(
    ("error", "kind"),
    [*((each, PODS) for each in ANSWERS), *((Forbidden, each) for each in WATCHED)],
    ids=lambda each: getattr(each, "plural", None) or each.__name__,
)
def test_an_operator_starts_without_the_namespace_that_it_cannot_list(
    error: type[ClusterError], kind: Kind
) -> None:
    async def story(scene: Scene) -> None:
        scene.errors[kind, "b"] = error("this is why")
        await asyncio.wait_for(scene.informer.sync(), 60)
        places = scene.informer.places
        assert [places.serves(each) for each in "abc"] == [True, False, True]
        assert (served("a"), served("b")) == (1, 0)
        (remark,) = [each for each in places.remarks if kind.plural in each]
        assert remark == f"namespace b is not served: {kind.plural}: this is why"
        assert told(scene) >= {"a", "c"}
        assert await scene.work(60) == []
        assert not places.serves("b")
        told(scene)
        scene.errors.clear()
        await scene.work(30)
        assert places.serves("b")
        assert served("b") == 1
        assert "b" in told(scene), "its jobs are looked at"
        assert places.remarks == ()

    play(story, "a", "b", "c")


def test_a_namespace_that_is_refused_while_it_runs_is_left_out_until_it_is_back() -> None:
    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        places = scene.informer.places
        scene.errors = {(kind, "b"): Forbidden("no", code=403) for kind in WATCHED}
        assert await scene.work(30) == []
        assert [places.serves(each) for each in "abc"] == [True, False, True]
        lists = scene.lists
        assert await scene.work(LONG) == [], "liveness fails for one namespace"
        assert scene.lists - lists < 12 * (LONG / 300) + 9 * (LONG / 20), "it is asked too often"
        told(scene)
        scene.errors.clear()
        await scene.work(30)
        assert places.serves("b")
        assert "b" in told(scene)

    play(story, "a", "b", "c")


def test_a_namespace_that_can_be_listed_and_not_watched_is_left_out_for_good() -> None:
    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        scene.unwatchable[PODS, "b"] = Forbidden("no watch", code=403)
        seen = []
        for _ in range(20):
            assert await scene.work(30) == []
            seen.append(scene.informer.places.serves("b"))
        assert seen == [False] * 20

    play(story, "a", "b")


def test_an_outage_of_one_place_is_said_and_its_watches_still_count() -> None:
    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        scene.errors[PODS, "b"] = Unavailable("500: cannot decode", code=500)
        assert await scene.work(LONG) == []
        places = scene.informer.places
        assert places.serves("b"), "the watches tell of it"
        assert places.remarks == (
            "namespace b is served from its watches alone: pods: 500: cannot decode",
        )
        assert not places.are_fresh, "an alert says that lists fail"

    play(story, "a", "b")


def test_when_all_is_refused_nothing_is_served_and_nothing_dies() -> None:
    async def story(scene: Scene) -> None:
        scene.errors = {(kind, None): Forbidden("no", code=403) for kind in WATCHED}
        syncing = asyncio.create_task(scene.informer.sync())
        await asyncio.sleep(300)
        assert not syncing.done(), "ready without anything to work on"
        scene.errors.clear()
        await asyncio.wait_for(syncing, 11)
        scene.health.beat(0.0, 0.0)
        scene.errors = {(kind, None): Forbidden("no", code=403) for kind in WATCHED}
        assert await scene.work(LONG) == []
        assert not scene.informer.places.serves("anywhere")
        assert served("*") == 0

    play(story)


def test_a_namespace_without_an_answer_is_waited_for_a_moment() -> None:
    async def story(scene: Scene) -> None:
        scene.errors = {(kind, "a"): Unavailable("starting") for kind in WATCHED}
        asyncio.get_running_loop().call_later(1.5, scene.errors.clear)
        await scene.informer.sync()
        assert scene.informer.places.are_served

    play(story, "a", "b")


def test_namespaces_that_give_no_answer_do_not_hide_those_after_them() -> None:
    async def story(scene: Scene) -> None:
        silent = MANY[:10]
        scene.errors = {(kind, each): Unavailable("?") for kind in WATCHED for each in silent}
        await asyncio.wait_for(scene.informer.sync(), 60)
        places = scene.informer.places
        assert [each for each in MANY if not places.serves(each)] == list(silent)

    play(story, *MANY)


def test_a_kind_that_comes_back_is_read_before_it_counts() -> None:
    places = Places(["a"])
    for kind in WATCHED:
        places.listed((kind, "a"))
    places.absent(PYTORCHJOBS)
    assert places.serves("a")
    places.failed((PYTORCHJOBS, "a"), Unavailable("not yet"))
    assert not places.serves("a")
    places.listed((PYTORCHJOBS, "a"))
    places.failed((PYTORCHJOBS, "a"), Unavailable("later"))
    assert places.serves("a")


@pytest.mark.parametrize("late_seconds", [3.0, 25.0])
def test_liveness_does_not_depend_on_the_number_of_namespaces(late_seconds: float) -> None:
    """A watch is late with one event, once in the first namespace and once in the last."""

    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        loop = asyncio.get_running_loop()
        for start, namespace in ((30, MANY[0]), (100, MANY[-1])):
            body, place = job(namespace, 20), (OSFTJOBS, namespace)
            found = [Change("MODIFIED", body)]
            loop.call_later(start, scene.changed.__setitem__, place, found)
            # the watch tells it so long after a look can find it
            seen = (OSFTJOBS, "MODIFIED", body)
            loop.call_later(start + 40 + late_seconds, scene.informer._seen, *seen)
        assert await scene.work(600) == []
        assert scene.changed == {}, "it was looked for"

    play(story, *MANY)


def test_lists_that_take_long_together_are_no_standstill() -> None:
    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        scene.list_seconds = 15.0
        assert await scene.work(2500) == []

    play(story, *MANY)


def test_a_watch_that_never_tells_is_noticed_in_time_whatever_the_number() -> None:
    async def story(scene: Scene) -> None:
        await scene.informer.sync()
        silent = asyncio.create_task(scene.informer._until_silent())
        scene.changed[OSFTJOBS, MANY[-1]] = [Change("MODIFIED", job(MANY[-1], 20))]
        began = scene.now()
        found = await scene.work(100)
        assert silent.done()
        assert found == [], "the watches should start anew before liveness fails"
        assert scene.now() - began < 101
        found = await scene.work(40)
        assert "the watches have been behind the API server" in found[0]

    play(story, *MANY)
