"""Which places are served: a kind, in one namespace or everywhere, as far as it can be read.

Called by resync and informer, which say how each list ended; service asks before it works on a job
and tells the readiness probe. A namespace is served while all of its places can be read: nothing is
decided about a job of which a part cannot be seen. One place's failure is never another's. Must
never call the cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from osft_operator import metrics
from osft_operator.cache import WATCHED
from osft_operator.cluster_errors import ClusterError, Unavailable
from osft_operator.kinds import Kind

logger = logging.getLogger(__name__)

Place = tuple[Kind, str | None]
"""What one list or watch covers: a kind, in a namespace or everywhere."""
EVERYWHERE = "*"
"""How the whole cluster is called where a namespace's name is expected."""


class Places:
    """All places of this operator, and what keeps some of them from being read."""

    def __init__(self, namespaces: Sequence[str]) -> None:
        self.namespaces: Sequence[str | None] = namespaces or [None]
        """Those that the operator works in; None for the whole cluster."""
        self._errors: dict[Place, ClusterError] = {}
        # Not listed since the start, or since the API server refused it.
        self._unread = {(kind, each) for kind in WATCHED for each in self.namespaces}
        # Of a kind that did not exist when it was listed: to be read once it does.
        self._absent: set[Place] = set()
        self._served: set[str | None] = set()
        self._back: list[str | None] = []
        self.remarks: tuple[str, ...] = ()
        """What is not served and why, a line each; replaced by `settle`, for another thread."""

    def all(self, kinds: Iterable[Kind]) -> list[Place]:
        """Every place of these kinds, one namespace after the other."""
        kinds = list(kinds)
        return [(kind, namespace) for namespace in self.namespaces for kind in kinds]

    @property
    def failing(self) -> list[Place]:
        """Those whose last list failed, or that no list has been read of."""
        return [place for place in self.all(WATCHED) if self._is_failing(place)]

    @property
    def are_fresh(self) -> bool:
        """Whether the lists of all that is served were read the last time."""
        return self._errors.keys() <= self._unread

    @property
    def are_served(self) -> bool:
        """Whether every namespace is."""
        return len(self._served) == len(self.namespaces)

    @property
    def is_any_served(self) -> bool:
        """Whether there is anything to work on."""
        return bool(self._served)

    def serves(self, namespace: str) -> bool:
        """Whether jobs of a namespace may be decided about."""
        place = None if self.namespaces[0] is None else namespace
        return place in self._served

    def is_unread(self, place: Place) -> bool:
        """Whether nothing that is known of a place can be relied on."""
        return place in self._unread

    def has_failed(self, place: Place) -> bool:
        """Whether its last list failed."""
        return place in self._errors

    def listed(self, place: Place) -> None:
        """A whole list was read."""
        self._absent.discard(place)
        self._errors.pop(place, None)
        self._unread.discard(place)
        self._note(place[1])

    def absent(self, kind: Kind) -> None:
        """The API server has no such kind, so that there is nothing to read."""
        for namespace in self.namespaces:
            self.listed((kind, namespace))
            self._absent.add((kind, namespace))

    def failed(self, place: Place, error: ClusterError) -> None:
        """A place could not be listed, or not be watched."""
        known = self._errors.get(place)
        if known is None or (type(known), known.code) != (type(error), error.code):
            logger.warning("%s cannot be read: %s", name_of(place), error)
        self._errors[place] = error
        if not isinstance(error, Unavailable) or place in self._absent:
            # An answer, not an outage: what the watches told before counts no more.
            self._unread.add(place)
        self._note(place[1])

    def settle(self) -> set[str | None]:
        """Namespaces that are served (again) since the last call. Renews `remarks`."""
        back, self._back = self._back, []
        self.remarks = tuple(map(self._remark, self.failing))
        return {namespace for namespace in back if namespace in self._served}

    def _is_failing(self, place: Place) -> bool:
        return place in self._errors or place in self._unread

    def _note(self, namespace: str | None) -> None:
        is_served = not any((kind, namespace) in self._unread for kind in WATCHED)
        if is_served and namespace not in self._served:
            self._served.add(namespace)
            self._back.append(namespace)
            logger.info("Namespace %s is served", namespace or EVERYWHERE)
        elif not is_served and namespace in self._served:
            self._served.discard(namespace)
            logger.warning("Namespace %s is not served any more", namespace or EVERYWHERE)
        metrics.namespace_served.labels(namespace or EVERYWHERE).set(is_served)

    def _remark(self, place: Place) -> str:
        effect = "is not served" if place in self._unread else "is served from its watches alone"
        cause = self._errors.get(place, "not listed yet")
        return f"namespace {place[1] or EVERYWHERE} {effect}: {place[0].plural}: {cause}"


def name_of(place: Place) -> str:
    """A place for people."""
    kind, namespace = place
    return f"{kind.plural} of namespace {namespace or EVERYWHERE}"
