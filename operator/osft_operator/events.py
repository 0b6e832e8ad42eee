"""Events on OSFTJobs, as `kubectl describe` shows them.

Called by reconcile after a status was written; service runs the backlog, so that no pass waits for
an event to be written, and one tenant's many events hold up nobody's PyTorchJob. An event that says
the same again is the same object with a higher count: its name is made of what it says, so that
also a restarted operator finds it. An event that cannot be written is logged and dropped. Must
never decide what to say: reasons and messages come from the core.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from weakref import WeakValueDictionary

from osft_operator.actions import Event
from osft_operator.cluster import AlreadyExists, Cluster, ClusterError, NotFound
from osft_operator.isolation import set_aside
from osft_operator.kinds import EVENTS, Object
from osft_operator.leader import LeaseLost
from osft_operator.observed import text_of

logger = logging.getLogger(__name__)

COMPONENT = "osft-operator"
"""Who says it."""
REMEMBERED = 10000
"""Events whose count is known without asking."""
MAX_MESSAGE = 1024
"""Longest message the API server takes in an Event."""
MAX_BACKLOG = 10000
"""Events that wait to be written; of more, the oldest of whoever has the most are dropped."""
WRITERS = 2
"""Events that are written at one time."""

Now = Callable[[], datetime.datetime]
Waits = tuple[Object, Event, datetime.datetime]
"""An event about an OSFTJob, and when it happened."""


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Recorder:
    """Writes events and counts repeated ones."""

    def __init__(self, cluster: Cluster, instance: str, *, now: Now = _now) -> None:
        self._cluster = cluster
        self._instance = instance
        self._now = now
        self._counts: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._writing: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def record(self, job: Object, event: Event) -> None:
        """Say something about an OSFTJob that happens now."""
        await self._say(job, event, self._now())

    async def _say(self, job: Object, event: Event, happened: datetime.datetime) -> None:
        namespace = job["metadata"]["namespace"]
        body = self._body(job, event, happened)
        name = body["metadata"]["name"]
        # One at a time and in order for one object, or two that read 1 would both write 2.
        async with self._writing.setdefault((namespace, name), asyncio.Lock()):
            try:
                count = await self._write(namespace, name, body)
            except ClusterError as error:
                logger.warning("The event %s of %s was lost: %s", event.reason, name, error)
                return
            self._remember(namespace, name, count)

    def _remember(self, namespace: str, name: str, count: int) -> None:
        self._counts[namespace, name] = count
        self._counts.move_to_end((namespace, name))
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)

    async def _write(self, namespace: str, name: str, body: Object) -> int:
        count = self._counts.get((namespace, name))
        if count is None:
            try:
                await self._cluster.create(EVENTS, namespace, body)
            except AlreadyExists:
                count = await self._recorded(namespace, name)
            else:
                return 1
        change = {"count": count + 1, "lastTimestamp": body["lastTimestamp"]}
        try:
            await self._cluster.patch(EVENTS, namespace, name, change)
        except NotFound:
            # Events live an hour; this one ended meanwhile.
            await self._cluster.create(EVENTS, namespace, body)
            return 1
        return count + 1

    async def _recorded(self, namespace: str, name: str) -> int:
        found = await self._cluster.list_all(EVENTS, namespace, fields=f"metadata.name={name}")
        return int(found.items[0].get("count") or 1) if found.items else 1

    def _body(self, job: Object, event: Event, happened: datetime.datetime) -> Object:
        metadata = job["metadata"]
        words = "\0".join([metadata["uid"], event.type, event.reason, event.message])
        digest = hashlib.sha256(words.encode()).hexdigest()[:16]
        time = text_of(happened)
        return {
            "apiVersion": EVENTS.api_version,
            "kind": EVENTS.kind,
            "metadata": {
                "name": f"{metadata['name']}.{digest}",
                "namespace": metadata["namespace"],
            },
            "involvedObject": {
                "apiVersion": job["apiVersion"],
                "kind": job["kind"],
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
                "resourceVersion": metadata["resourceVersion"],
            },
            "type": event.type,
            "reason": event.reason,
            "message": event.message[:MAX_MESSAGE],
            "count": 1,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._instance,
        }


class _Waiting:
    """What waits to be written: each namespace in turn, in it the oldest first."""

    def __init__(self) -> None:
        self._namespaces: OrderedDict[str, deque[Waits]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, item: Waits, *, first: bool = False) -> None:
        """Let it wait; `first` in its namespace for what was taken and not written."""
        items = self._namespaces.setdefault(item[0]["metadata"]["namespace"], deque())
        (items.appendleft if first else items.append)(item)
        self._length += 1

    def take(self) -> Waits:
        """The next one."""
        namespace, items = self._namespaces.popitem(last=False)
        item = items.popleft()
        if items:
            self._namespaces[namespace] = items
        self._length -= 1
        return item

    def drop(self) -> str:
        """Drop the oldest of the namespace that has the most; its name."""
        longest = max(self._namespaces, key=lambda each: len(self._namespaces[each]))
        self._namespaces[longest].popleft()
        self._length -= 1
        return longest

    def clear(self) -> None:
        """Drop all."""
        self._namespaces.clear()
        self._length = 0


class Backlog(Recorder):
    """A recorder that writes after its caller has gone on."""

    def __init__(self, cluster: Cluster, instance: str, *, now: Now = _now) -> None:
        super().__init__(cluster, instance, now=now)
        self._waiting = _Waiting()
        self._added = asyncio.Event()

    async def record(self, job: Object, event: Event) -> None:
        """Say something about an OSFTJob that happens now, soon."""
        self._waiting.add((job, event, self._now()))
        if len(self._waiting) > MAX_BACKLOG:
            namespace = self._waiting.drop()
            words = "%d events wait; the oldest is lost, of namespace %s, which has the most"
            logger.warning(words, MAX_BACKLOG, namespace)
        self._added.set()

    async def run(self) -> None:
        """Write until cancelled."""
        await asyncio.gather(*(self._write_on() for _ in range(WRITERS)))

    async def drain(self) -> None:
        """Write what still waits."""
        while self._waiting:
            await self._write_next()

    async def _write_on(self) -> None:
        while True:
            await self._added.wait()
            if self._waiting:
                await self._write_next()
            else:
                self._added.clear()

    async def _write_next(self) -> None:
        job, event, happened = self._waiting.take()
        try:
            # one that cannot even be made must not end the operator, nor hold up the others
            with set_aside("event", f"{event.reason} of {job['metadata'].get('name')}"):
                await self._say(job, event, happened)
        except asyncio.CancelledError:
            # Said once more by drain, and counted twice if the server had taken it.
            self._waiting.add((job, event, happened), first=True)
            raise
        except LeaseLost:
            # Another operator leads now: what is left to say is its own to say.
            self._waiting.clear()
            raise
