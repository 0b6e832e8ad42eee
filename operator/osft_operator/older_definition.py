"""Fits a status to a definition that is older than this operator.

Called by reconcile before and after each status write. The API server refuses a status with a field
that its definition does not have, and with it all that the operator has to say. What it does not
take is left out for a while, and tried again: the definition may be upgraded any time. Must never
change what the definition takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from osft_operator.cluster import Cluster, Refused
from osft_operator.kinds import OSFTJOBS, Object
from osft_operator.queue import Key

Status = dict[str, Any]

FORGET_SECONDS = 300.0
"""For so long a field is left out before it is tried again."""

_PHASE = "status.phase: Unsupported value"
"""What the API server says of a phase that the definition does not have."""

logger = logging.getLogger(__name__)


class OlderDefinition:
    """What the definition in force does not take."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lacking: Status = {}
        self._since = 0.0

    def fit(self, status: Status) -> Status:
        """A status without what was not taken lately."""
        if self._lacking and self._clock() - self._since > FORGET_SECONDS:
            self._lacking = {}
        return _without(status, self._lacking) if self._lacking else status

    async def write(self, cluster: Cluster, key: Key, patch: Status, status: Status) -> Object:
        """Write a status, or what of it the definition takes; the object as it is stored.

        Args:
            cluster: the API server.
            key: the OSFTJob.
            patch: what is to be merged into it.
            status: what its status will be then.

        Raises:
            ClusterError: as of any write.
        """
        try:
            return await cluster.patch(OSFTJOBS, *key, patch, sub="status")
        except Refused as error:
            # the words are of no use: the server begins them with the whole object
            if error.code not in (400, 422):
                raise
        try:
            written = await cluster.patch(OSFTJOBS, *key, patch, sub="status", strict=False)
        except Refused as error:
            if error.code != 422 or _PHASE not in str(error):
                raise
            # it says for people what conditions say, and a new one may be no choice yet
            kept = {name: value for name, value in patch["status"].items() if name != "phase"}
            fitted = {**patch, "status": kept}
            written = await cluster.patch(OSFTJOBS, *key, fitted, sub="status", strict=False)
        stored = written.get("status") or {}
        self._learn(status, {"phase": status.get("phase"), **stored})
        return written

    def _learn(self, sent: Status, stored: Status) -> None:
        """Remember what of a status was not stored."""
        found = _lacking(sent, stored)
        if found and found != self._lacking:
            text = "The OSFTJob's definition is older than this operator: upgrade it; it lacks %s"
            logger.warning(text, ", ".join(f"status.{path}" for path in _paths(found)))
        if found:
            self._lacking, self._since = _merged(self._lacking, found), self._clock()


def _lacking(sent: Any, stored: Any) -> Status:
    """The names that are in one and not in the other, as a tree whose leaves are empty."""
    found: Status = {}
    for name, value in sent.items():
        if name not in stored:
            found[name] = {}
            continue
        both = isinstance(value, dict) and isinstance(stored[name], dict)
        if both and (inner := _lacking(value, stored[name])):
            found[name] = inner
    return found


def _without(status: Status, lacking: Status) -> Status:
    kept = {}
    for name, value in status.items():
        inner = lacking.get(name)
        if inner is None:
            kept[name] = value
        elif inner and isinstance(value, dict):
            kept[name] = _without(value, inner)
    return kept


def _merged(one: Status, other: Status) -> Status:
    both = {name: _merged(one[name], other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _paths(lacking: Status) -> list[str]:
    return [
        ".".join(filter(None, (name, below)))
        for name, inner in sorted(lacking.items())
        for below in (_paths(inner) or [""])
    ]
