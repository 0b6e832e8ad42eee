"""Reads what the OSFTJob's definition on the API server says of fields that this version lacks.

Called by observer. An operator that is older than the definition finds the defaults of new fields
in every job. Which of them are defaults only the definition tells; it is read where everybody who
may log in may read it (OpenAPI), since the operator has no right to definitions, and only when a
job has such a field. managedFields would not do: a client that creates owns the defaults, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from osft_operator.cluster import Cluster, NotFound, Refused
from osft_operator.kinds import OSFTJOBS, Object
from osft_operator.unknown_fields import unknown_fields, without_defaults

FRESH_SECONDS = 30.0
"""What was read so lately is not read again, whatever it does not explain."""

logger = logging.getLogger(__name__)


class Definition:
    """The definition, as far as it is needed."""

    def __init__(self, cluster: Cluster, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._schema: Object = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()
        self._named: set[str] = set()

    async def understood(self, job: Object) -> Object:
        """An OSFTJob without the fields that this version does not know and nobody has set.

        Raises:
            Unavailable: the API server does not answer.
        """
        if not unknown_fields(job):
            return job
        for not_before in (float("-inf"), self._clock() - FRESH_SECONDS):
            schema = await self._read(not_before)
            rest, left_out = without_defaults(job, unknown_fields(job), schema)
            if not unknown_fields(rest):
                break
        for path, value in left_out.items():
            if path not in self._named:
                self._named.add(path)
                text = "Passed over, at the default of a newer definition: %s (%r)"
                logger.warning(text, path, value)
        return dict(rest)

    async def _read(self, not_before: float) -> Object:
        """The schema as it was after that time; from before all times, whatever was read last."""
        async with self._reading:
            if self._read_at <= not_before:
                try:
                    self._schema = await self._cluster.schema(OSFTJOBS)
                except (NotFound, Refused) as error:
                    # a hardened server may hide it; then every field counts as set by its author
                    logger.warning("The definition's defaults cannot be read: %s", error)
                    self._schema = {}
                self._read_at = self._clock()
            return self._schema
