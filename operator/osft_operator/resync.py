"""Lists everything and compares: the caches' first filling, and the remedy for what watches miss.

Called by informer at the start, periodically, and before a watch begins anew. News of a list that
fails are kept for the next. A watch that was interrupted does not say what was deleted meanwhile; a
list does. A kind that does not exist is a result, not an error. Must never decide anything about a
job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED, Cache, selector
from osft_operator.cluster import Cluster, KindMissing
from osft_operator.kinds import Kind
from osft_operator.queue import Key

logger = logging.getLogger(__name__)

LATE_SECONDS = 10.0
"""A watch that has not told after so long of what a list found is none to rely on."""

for _kind in WATCHED:
    # A series that is born with its first miss has no increase that an alert could see.
    metrics.resync_drift.labels(_kind.plural)

Place = tuple[Kind, str | None]
"""What one list or watch covers: a kind, in a namespace or everywhere."""


class Resync:
    """The kinds that exist, and lists of them."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        namespaces: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._cluster = cluster
        self._cache = cache
        self._namespaces: Sequence[str | None] = namespaces or [None]
        self._synced: frozenset[Kind] = frozenset()
        self._untold: dict[tuple[Kind, Key], float] = {}
        # The cache tells of a change once. What it told while a list, or one beside it, failed is
        # news of the next one that is read to its end.
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

    async def run(self) -> set[Key]:
        """List every kind once.

        Returns:
            The OSFTJobs for which this is news.

        Raises:
            ClusterError: when a list could not be read; nothing is forgotten then.
        """
        present = set()
        # The kinds beside each other: the API server is busy with each for a while.
        lists = await asyncio.gather(*map(self._list, WATCHED), return_exceptions=True)
        for kind, found in zip(WATCHED, lists, strict=True):
            if isinstance(found, BaseException):
                raise found
            if found is None:
                # Nothing is forgotten: a server that starts says 404 for what it has not loaded
                # yet, and a job whose PyTorchJob seems to be gone would be started a second time.
                continue
            present.add(kind)
            if kind in self._synced:
                now = self._clock()
                self._untold |= {(kind, key): now for key in found}
        self._synced = frozenset(present)
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

    async def _list(self, kind: Kind) -> set[Key] | None:
        """The news of a kind; None when there is no such kind."""
        changed: set[Key] = set()
        for namespace in self._namespaces:
            try:
                news = await self.take(kind, namespace)
            except KindMissing:
                return None
            changed |= news
            self._unsaid |= news
        return changed

    async def take(self, kind: Kind, namespace: str | None) -> set[Key]:
        """One list; returns the OSFTJobs that it is news for.

        Raises:
            ClusterError: when it could not be read; nothing is forgotten then.
        """
        # Page by page: ten thousand whole objects are more than all that is kept.
        changed = self._half_read.setdefault((kind, namespace), set())
        present: set[str] = set()
        version = ""
        async for page in self._cluster.pages(kind, namespace, labels=selector(kind)):
            changed |= _known(self._cache.put(kind, body) for body in page.items)
            present |= {body["metadata"]["uid"] for body in page.items}
            version = page.version
        changed |= self._cache.sweep(kind, namespace, present, version)
        self._half_read.pop((kind, namespace), None)
        self.versions[kind, namespace] = version
        return changed


def _known(keys: Iterable[Key | None]) -> set[Key]:
    return {key for key in keys if key is not None}
