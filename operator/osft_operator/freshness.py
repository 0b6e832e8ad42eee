"""Checks that the watches tell everything, by asking the API server in another way.

Called by informer. From time to time a short watch of our own asks for what has changed since the
last time; usually that is nothing, and costs as much. What it finds goes into the cache like any
other news, and the watches must have told the same until the next check: if not, they are silent,
and whoever looks at `is_behind` does something about it. Must never be the usual way of news.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from osft_operator.cache import Cache, selector
from osft_operator.cluster import Change, Cluster
from osft_operator.kinds import Kind, Object
from osft_operator.queue import Key
from osft_operator.resync import Place

logger = logging.getLogger(__name__)


class Freshness:
    """How far the watches have come, and how far they should be."""

    def __init__(self, cluster: Cluster, cache: Cache, news: Callable[[Key], None]) -> None:
        self._cluster = cluster
        self._cache = cache
        self._news = news
        self._asked: dict[Place, str] = {}
        self._told: dict[Place, int] = {}
        self._owed: dict[Place, Object] = {}

    @property
    def is_behind(self) -> bool:
        """Whether a watch has not told what an earlier check found."""
        return any(not self._is_settled(place, owed) for place, owed in self._owed.items())

    def listed(self, place: Place, version: str) -> None:
        """A whole list was read: everything up to this version is known."""
        self._asked[place] = version

    def begun(self, place: Place, version: str) -> None:
        """A watch goes on from here: of what was before, a list has told."""
        self._told[place] = max(self._told.get(place, 0), int(version or 0))

    def told(self, place: Place, body: Object) -> None:
        """A watch told of an object."""
        self._told[place] = max(self._told.get(place, 0), _version(body))

    async def check(self, places: Iterable[Place]) -> None:
        """Ask what has changed, and note what the watches should have told.

        Raises:
            ClusterError: when the API server does not answer, or does not remember (Gone).
        """
        known = [place for place in places if place in self._asked]
        # What is not watched any more owes nothing: its kind is gone.
        self._owed = {
            place: owed
            for place, owed in self._owed.items()
            if place in known and not self._is_settled(place, owed)
        }
        for namespace in dict.fromkeys(place[1] for place in known):
            # the kinds at one time, each for a second; more would leave no thread for the work
            await asyncio.gather(*(self._check(each) for each in known if each[1] == namespace))

    async def _check(self, place: Place) -> None:
        kind, namespace = place
        changes = await self._cluster.changes(
            kind, namespace, self._asked[place], labels=selector(kind)
        )
        for change in changes:
            self._take(kind, change.type, change.object)
            self._note(place, change)

    def _note(self, place: Place, change: Change) -> None:
        version = _version(change.object)
        self._asked[place] = str(max(version, int(self._asked[place] or 0)))
        if change.type != "DELETED":
            self._owed.setdefault(place, change.object)

    def _is_settled(self, place: Place, owed: Object) -> bool:
        """Whether the watch has told of it or of later, or need not: it is gone."""
        metadata = owed["metadata"]
        if self._told.get(place, 0) >= _version(owed):
            return True
        # A watch that starts anew says nothing of what is gone, however that was found out.
        known = self._cache.get(place[0], metadata["namespace"], metadata["name"])
        return known is None or known["metadata"]["uid"] != metadata["uid"]

    def _take(self, kind: Kind, event: str, body: Object) -> None:
        change = self._cache.remove if event == "DELETED" else self._cache.put
        key = change(kind, body)
        if key is not None:
            logger.debug("A watch had not told of this yet", extra={"osftjob": str(key)})
            self._news(key)


def _version(body: Object) -> int:
    text = str(body["metadata"].get("resourceVersion") or "")
    return int(text) if text.isdigit() else 0
