"""Lists everything and compares: the caches' first filling, and the remedy for what watches miss.

Called by informer at the start, periodically, and before a watch begins anew. A list that fails
holds up no other; its news are kept for the next. A watch that was interrupted does not say what
was deleted meanwhile; a list does. A kind that does not exist is a result, not an error. Must never
decide anything about a job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED, Cache, selector
from osft_operator.cluster import Cluster, ClusterError, KindMissing, Unavailable
from osft_operator.isolation import set_aside
from osft_operator.kinds import Kind
from osft_operator.places import Place, Places
from osft_operator.queue import Key

logger = logging.getLogger(__name__)

LATE_SECONDS = 10.0
"""A watch that has not told after so long of what a list found is none to rely on."""
TRIES_IN_VAIN = 3
"""Lists of a kind that get no answer one after the other: then nobody answers, and the rest of its
places are not asked now."""

for _kind in WATCHED:
    # A series that is born with its first miss has no increase that an alert could see.
    metrics.resync_drift.labels(_kind.plural)


class Resync:
    """The kinds that exist, and lists of them."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        places: Places,
        *,
        listed: Callable[[Place, str], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare it.

        Args:
            cluster: the API server.
            cache: takes what is found.
            places: what is listed; hears how each list ended.
            listed: called with each place whose list was read to its end, and the list's version.
            clock: seconds.
        """
        self._clock = clock
        self._cluster = cluster
        self._cache = cache
        self._places = places
        self._listed = listed
        self._synced: frozenset[Kind] = frozenset()
        self._untold: dict[tuple[Kind, Key], float] = {}
        # The cache tells of a change once. What it told while a list failed is news of the next
        # one that is read to its end, and what a round found is news until it has ended.
        self._half_read: dict[Place, set[Key]] = {}
        self._unsaid: set[Key] = set()
        self.versions: dict[Place, str] = {}
        """resourceVersion of the last list, by kind and namespace."""

    @property
    def present(self) -> frozenset[Kind]:
        """Kinds that the last pass found."""
        return self._synced

    async def is_outdated(self) -> bool:
        """Whether a kind has come or gone since the last pass."""
        custom = [kind for kind in WATCHED if kind.group]
        served = [kind for kind in custom if await self._cluster.serves(kind)]
        return set(served) != self._synced.intersection(custom)

    async def run(self, only: Sequence[Place] | None = None) -> set[Key]:
        """List every kind once, in every namespace, or some places only.

        Returns:
            The OSFTJobs for which this is news.

        Raises:
            ClusterError: when no list could be read and no answer came; nothing is forgotten then.
        """
        asked = self._places.all(WATCHED) if only is None else only
        kinds = list(dict.fromkeys(kind for kind, _ in asked))
        # The kinds beside each other: the API server is busy with each for a while.
        rounds = (
            self._list(kind, [each[1] for each in asked if each[0] is kind]) for kind in kinds
        )
        errors = await asyncio.gather(*rounds)
        unanswered = [error for error in errors if error is not None]
        if unanswered and len(unanswered) == len(kinds):
            raise unanswered[0]
        changed, self._unsaid = self._unsaid, set()
        return changed

    def told(self, kind: Kind, key: Key) -> None:
        """A watch says something of a job: what a list said of it before was only a little faster.

        Args:
            kind: the kind of the object that changed.
            key: the OSFTJob that it belongs to.
        """
        self._untold.pop((kind, key), None)

    def settle(self) -> None:
        """Count what lists found and no watch has told of since, though it had the time."""
        now = self._clock()
        missed = [each for each, found in self._untold.items() if now - found >= LATE_SECONDS]
        for kind, key in missed:
            del self._untold[kind, key]
            metrics.resync_drift.labels(kind.plural).inc()
            logger.warning("Only a list told of %s", kind.plural, extra={"osftjob": str(key)})

    async def _list(self, kind: Kind, namespaces: Sequence[str | None]) -> ClusterError | None:
        """List a kind in some namespaces; an error when nobody answers."""
        # Where it failed before comes last, so that it holds up nothing that is well.
        order = sorted(namespaces, key=lambda each: self._places.has_failed((kind, each)))
        unanswered: list[ClusterError] = []
        for namespace in order:
            was_unread = self._places.is_unread((kind, namespace))
            try:
                news = await self.take(kind, namespace)
            except KindMissing:
                self._missing(kind)
                return None
            except Unavailable as error:
                unanswered.append(error)
                if len(unanswered) == min(TRIES_IN_VAIN, len(order)):
                    return error
            except ClusterError:
                unanswered = []
            else:
                unanswered = []
                self._found(kind, news, is_drift=not was_unread)
        return None

    def _missing(self, kind: Kind) -> None:
        # Nothing is forgotten: a server that starts says 404 for what it has not loaded yet, and a
        # job whose PyTorchJob seems to be gone would be started a second time.
        self._synced -= {kind}
        self._places.absent(kind)

    def _found(self, kind: Kind, news: set[Key], *, is_drift: bool) -> None:
        self._unsaid |= news
        if is_drift and kind in self._synced:
            now = self._clock()
            self._untold |= {(kind, key): now for key in news}
        self._synced |= {kind}

    async def take(self, kind: Kind, namespace: str | None) -> set[Key]:
        """One list; returns the OSFTJobs that it is news for.

        Raises:
            ClusterError: when it could not be read; nothing is forgotten then.
        """
        # Page by page: ten thousand whole objects are more than all that is kept.
        place = (kind, namespace)
        changed = self._half_read.setdefault(place, set())
        present: set[str] = set()
        version = ""
        try:
            async for page in self._cluster.pages(kind, namespace, labels=selector(kind)):
                for body in page.items:
                    present.add(body["metadata"]["uid"])
                    with set_aside("list", f"{kind.kind} {body['metadata'].get('name')}"):
                        changed |= _known([self._cache.put(kind, body)])
                version = page.version
        except KindMissing:
            raise
        except ClusterError as error:
            self._places.failed(place, error)
            raise
        changed |= self._cache.sweep(kind, namespace, present, version)
        self._half_read.pop(place, None)
        self.versions[place] = version
        self._places.listed(place)
        self._listed(place, version)
        return changed


def _known(keys: Iterable[Key | None]) -> set[Key]:
    return {key for key in keys if key is not None}
