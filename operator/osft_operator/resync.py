"""Lists everything and compares: the caches' first filling, and the remedy for what watches miss.

Called by service at the start and then periodically. A watch that was interrupted does not say what
was deleted meanwhile; a list does. A kind that does not exist is a result, not an error. Must never
decide anything about a job.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED, Cache, selector
from osft_operator.cluster import Cluster, KindMissing
from osft_operator.kinds import Kind
from osft_operator.queue import Key

logger = logging.getLogger(__name__)

Place = tuple[Kind, str | None]
"""What one list or watch covers: a kind, in a namespace or everywhere."""


class Resync:
    """The kinds that exist, and lists of them."""

    def __init__(self, cluster: Cluster, cache: Cache, namespaces: Sequence[str]) -> None:
        self._cluster = cluster
        self._cache = cache
        self._namespaces: Sequence[str | None] = namespaces or [None]
        self._synced: frozenset[Kind] = frozenset()
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
        changed: set[Key] = set()
        present = set()
        for kind in WATCHED:
            found = await self._list(kind)
            if found is None:
                # Nothing is forgotten: a server that starts says 404 for what it has not loaded
                # yet, and a job whose PyTorchJob seems to be gone would be started a second time.
                continue
            present.add(kind)
            changed |= found
            if kind in self._synced and found:
                metrics.resync_drift.labels(kind.plural).inc(len(found))
                logger.info("The list of %s held news of %d jobs", kind.plural, len(found))
        self._synced = frozenset(present)
        return changed

    async def _list(self, kind: Kind) -> set[Key] | None:
        """The news of a kind; None when there is no such kind."""
        changed: set[Key] = set()
        for namespace in self._namespaces:
            try:
                listing = await self._cluster.list_all(kind, namespace, labels=selector(kind))
            except KindMissing:
                return None
            self.versions[kind, namespace] = listing.version
            changed |= self._cache.replace(kind, namespace, listing.items, listing.version)
        return changed
