"""What the watches owe: found by a short watch, settled by their own word, or by an end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from osft_operator.cache import Cache
from osft_operator.cluster import Change, ClusterError, Forbidden, Gone, Unavailable
from osft_operator.freshness import Freshness
from osft_operator.kinds import CLAIMS, OSFTJOBS, Kind
from osft_operator.names import JOB_LABEL
from osft_operator.places import Place
from osft_operator.queue import Key

PLACE = (CLAIMS, None)


class Server:
    """Answers short watches; the real one is asked in test_cluster."""

    def __init__(self) -> None:
        self.changed: list[Change] = []
        self.asked: list[str] = []

    async def changes(
        self, kind: Kind, namespace: str | None, version: str, *, labels: str
    ) -> list[Change]:
        self.asked.append(version)
        found, self.changed = self.changed, []
        return found


def claim(version: int, uid: str = "u1") -> dict[str, Any]:
    metadata = {"name": "c", "namespace": "n", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": {**metadata, "labels": {JOB_LABEL: "job"}}}


class Scene:
    def __init__(self) -> None:
        self.server, self.cache, self.news = Server(), Cache(), list[Key]()
        self.now = 0.0
        self.freshness = Freshness(
            self.server,  # type: ignore[arg-type]
            self.cache,
            self.news.append,
            clock=lambda: self.now,
        )
        self.freshness.listed(PLACE, "10")

    def check(self, *changes: Change) -> dict[Place, ClusterError]:
        self.server.changed = list(changes)
        return asyncio.run(self.freshness.check([PLACE, (OSFTJOBS, None)]))

    @property
    def is_behind(self) -> bool:
        """A second later."""
        self.now += 1
        return self.freshness.behind_seconds() > 0


def test_nothing_new_is_nothing_owed() -> None:
    scene = Scene()
    scene.check()
    assert scene.server.asked == ["10"], "a place that was never listed is not asked about"
    assert not scene.is_behind


def test_what_a_watch_did_not_tell_is_news_and_owed_until_it_does() -> None:
    scene = Scene()
    scene.check(Change("MODIFIED", claim(12)))
    assert scene.news == [Key("n", "job")]
    assert scene.is_behind
    scene.check()
    assert scene.server.asked == ["10", "12"]
    assert scene.is_behind
    scene.freshness.told(PLACE, claim(12))
    assert not scene.is_behind
    scene.check(Change("MODIFIED", claim(15)))
    assert scene.is_behind, "each time anew"


def test_what_the_watch_told_first_is_not_owed() -> None:
    scene = Scene()
    scene.freshness.told(PLACE, claim(12))
    scene.check(Change("ADDED", claim(12)))
    assert not scene.is_behind


def test_an_object_that_is_gone_is_owed_no_more() -> None:
    scene = Scene()
    scene.check(Change("ADDED", claim(12)))
    scene.check(Change("DELETED", claim(14)))
    assert not scene.is_behind
    assert list(scene.cache.all(CLAIMS)) == []
    scene.check(Change("ADDED", claim(16, "u2")), Change("DELETED", claim(17, "u3")))
    assert scene.is_behind, "another object is none of its business"


def test_an_object_that_a_list_finds_gone_is_owed_no_more() -> None:
    scene = Scene()
    scene.check(Change("ADDED", claim(12)))
    # its end fell between two looks, so that no watch will ever speak of it
    scene.cache.sweep(CLAIMS, None, set(), "20")
    scene.freshness.listed(PLACE, "20")
    assert not scene.is_behind


def test_a_kind_that_is_looked_at_no_more_owes_nothing() -> None:
    scene = Scene()
    scene.check(Change("ADDED", claim(12)))
    asyncio.run(scene.freshness.check([(OSFTJOBS, None)]))
    assert not scene.is_behind


def test_how_long_it_is_owed_is_known_at_any_time() -> None:
    scene = Scene()
    scene.check(Change("ADDED", claim(12)))
    scene.now += 30
    assert scene.freshness.behind_seconds() == 30
    scene.check(Change("MODIFIED", claim(15)))
    scene.now += 5
    assert scene.freshness.behind_seconds() == 35, "the oldest counts"
    scene.freshness.told(PLACE, claim(13))
    assert scene.freshness.behind_seconds() == 0, "no check is waited for"


@pytest.mark.parametrize("error", [Gone("too old"), Forbidden("no"), Unavailable("away")])
def test_what_cannot_be_asked_is_for_the_caller_and_the_others_are_asked(
    error: ClusterError,
) -> None:
    scene = Scene()
    other = (CLAIMS, "other")
    scene.freshness.listed(other, "10")
    whole = scene.server.changes

    async def changes(kind: Kind, namespace: str | None, *more: Any, **other: Any) -> list[Change]:
        if namespace is None:
            raise error
        return await whole(kind, namespace, *more, **other)

    scene.server.changes = changes  # type: ignore[method-assign]
    scene.server.changed = [Change("ADDED", claim(12))]
    assert asyncio.run(scene.freshness.check([PLACE, other])) == {PLACE: error}
    assert scene.news == [Key("n", "job")]


def test_a_place_that_answers_lists_alone_is_behind_until_it_answers() -> None:
    scene = Scene()
    scene.freshness.mute(PLACE)
    scene.now += 20
    scene.freshness.mute(PLACE)
    assert scene.freshness.behind_seconds() == 20
    scene.check()
    assert not scene.is_behind
    scene.freshness.mute(PLACE)
    scene.freshness.forgive(PLACE)
    assert not scene.is_behind
