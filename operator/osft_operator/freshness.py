"""Checks that the watches tell everything, by asking the API server in another way.

Called by informer. From time to time a short watch of our own asks each place for what has changed
since the last time; usually that is nothing, and costs as much. What it finds goes into the cache
like any other news, and the watches must tell the same: how long they have owed something is what
`behind_seconds` says, at any time and for any number of places. Must never be the usual way of
news.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from osft_operator.cache import Cache, selector
from osft_operator.cluster import Change, Cluster, ClusterError
from osft_operator.isolation import set_aside
from osft_operator.kinds import Object
from osft_operator.places import Place
from osft_operator.queue import Key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Debt:
    """What a watch has not told yet."""

    since: float
    """When that was found out."""
    body: Object | None
    """The object; None when the place answers lists and no watch."""


class Freshness:
    """How far the watches have come, and how far they should be."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        news: Callable[[Key], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._news = news
        self._clock = clock
        self._asked: dict[Place, str] = {}
        self._told: dict[Place, int] = {}
        self._owed: dict[Place, Debt] = {}

    def behind_seconds(self) -> float:
        """For how long a watch has not told what was found without it; 0 when none is behind."""
        owed = {place: debt for place, debt in self._owed.items() if not self._is_paid(place, debt)}
        self._owed = owed
        oldest = min((debt.since for debt in owed.values()), default=None)
        return 0.0 if oldest is None else self._clock() - oldest

    def listed(self, place: Place, version: str) -> None:
        """A whole list was read: everything up to this version is known."""
        self._asked[place] = version

    def begun(self, place: Place, version: str) -> None:
        """A watch goes on from here: of what was before, a list has told."""
        self._told[place] = max(self._told.get(place, 0), int(version or 0))

    def told(self, place: Place, body: Object) -> None:
        """A watch told of an object."""
        self._told[place] = max(self._told.get(place, 0), _version(body))

    def mute(self, place: Place) -> None:
        """A place answers lists and no watch: nothing tells of it until a check is answered."""
        self._owed.setdefault(place, Debt(self._clock(), None))

    def forgive(self, place: Place) -> None:
        """A place is left out: it owes nothing."""
        self._owed.pop(place, None)

    async def check(self, places: Iterable[Place]) -> dict[Place, ClusterError]:
        """Ask what has changed, and note what the watches should have told.

        Returns:
            The places that could not be asked, and why: Gone when the server has forgotten.
        """
        known = [place for place in places if place in self._asked]
        # What is not watched any more owes nothing: its kind is gone.
        self._owed = {place: debt for place, debt in self._owed.items() if place in known}
        # So many at one time as the cluster has threads for that.
        errors = await asyncio.gather(*map(self._check, known))
        return {place: error for place, error in zip(known, errors, strict=True) if error}

    async def _check(self, place: Place) -> ClusterError | None:
        kind, namespace = place
        try:
            changes = await self._cluster.changes(
                kind, namespace, self._asked[place], labels=selector(kind)
            )
        except ClusterError as error:
            return error
        if (debt := self._owed.get(place)) is not None and debt.body is None:
            del self._owed[place]
        for change in changes:
            with set_aside("watch", f"{kind.kind} {change.object['metadata'].get('name')}"):
                self._take(place, change)
        return None

    def _take(self, place: Place, change: Change) -> None:
        kind, body = place[0], change.object
        put = self._cache.remove if change.type == "DELETED" else self._cache.put
        key = put(kind, body)
        if key is not None:
            logger.debug("A watch had not told of this yet", extra={"osftjob": str(key)})
            self._news(key)
        self._asked[place] = str(max(_version(body), int(self._asked[place] or 0)))
        debt = self._owed.get(place)
        if change.type != "DELETED" and (debt is None or self._is_paid(place, debt)):
            self._owed[place] = Debt(self._clock(), body)

    def _is_paid(self, place: Place, debt: Debt) -> bool:
        """Whether the watch has told of it or of later, or need not: it is gone."""
        if debt.body is None:
            return False
        metadata = debt.body["metadata"]
        if self._told.get(place, 0) >= _version(debt.body):
            return True
        # A watch that starts anew says nothing of what is gone, however that was found out.
        known = self._cache.get(place[0], metadata["namespace"], metadata["name"])
        return known is None or known["metadata"]["uid"] != metadata["uid"]


def _version(body: Object) -> int:
    text = str(body["metadata"].get("resourceVersion") or "")
    return int(text) if text.isdecimal() else 0
