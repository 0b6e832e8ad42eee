"""The only user of kopf: watches, and nothing but watches.

Called by informer. kopf logs in, watches the kinds it is given, and calls a handler per event; the
handler hands the raw object on and returns. It lists nothing: it asks `begin` from which version to
watch, for the informer has listed already. kopf runs on a thread with a loop of its own, since at
its end it cancels every task of its loop. Three parts of it that are not public are replaced: its
list, its notes about objects, and that an error of one watch ends all of them. Its other powers
stay unused on purpose: no finalizers, annotations, events, status, indexes or timers. Must never
decide anything, and never touch the cache: `seen` is called on the main loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf
from kopf._cogs.clients import api, errors, fetching, watching
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory

from osft_operator import names
from osft_operator.bounds import read_json
from osft_operator.cache import WATCHED, selector, trimmed
from osft_operator.kinds import Kind, Object
from osft_operator.settings import Settings

PREFIX = names.GROUP
"""Prefix of whatever kopf would write, so that nothing foreign could ever appear."""
STOP_SECONDS = 3.0
"""Longest wait for the end; kopf tries again for some seconds when it is stopped in its start."""
WATCH_SECONDS = 20
"""The server ends each watch after so long and it goes on from where it was: so a connection that
died without a word is noticed soon, for four requests in that time."""
LONGEST_ERROR_WAIT = 8
"""Seconds between tries of a watch that fails again and again; at first they are fewer."""

IDLE_SECONDS = 0.2
"""kopf keeps a task and a queue for each object that told something, for so long after."""
TOLD_AT_ONCE = 100
"""So many events are handed on, then the main loop does other things."""

GONE = 410
"""The server does not remember the version that a watch asks to go on from."""
_LOGGER = logging.getLogger("kopf")
logger = logging.getLogger(__name__)

Seen = Callable[[Kind, str | None, Object], None]
"""Takes the kind, the event's type and the object."""
Begin = Callable[[Kind, str | None], Coroutine[Any, Any, str]]
"""Takes a kind and a namespace (None for all), and says from which resourceVersion to watch; called
for each watch that begins, or that the server can not go on with. Its error ends the watches."""


_watches: contextvars.ContextVar[Watches] = contextvars.ContextVar("watches")
_kopf_lists = fetching.fetch_objs
_kopf_watches = watching.watch_objs


class _ErrorWaits:
    """Waits between tries of a failing watch, without an end.

    A place that is refused, or a server that is away, must not end the watches of all others;
    whether a place is served at all is for informer to find out and to say.
    """

    def __iter__(self) -> Iterator[float]:
        return chain((1, 2, 3, 5), repeat(LONGEST_ERROR_WAIT))


async def _watch_on(*, resource: Any, namespace: Any, **more: Any) -> AsyncIterator[Any]:
    """In the place of kopf's watch: an error of one place ends that watch only, and it goes on.

    Raises:
        APINotFoundError: when there is no such kind (any more).
    """
    try:
        async for event in _kopf_watches(resource=resource, namespace=namespace, **more):
            code = (event["object"] or {}).get("code") if event["type"] == "ERROR" else None
            if event["type"] == "ERROR" and code != GONE:
                # Of kopf it would be the end; a new list may do without what could not be told.
                _watch_failed(resource, namespace, event["object"])
                await asyncio.sleep(LONGEST_ERROR_WAIT)
                yield {"type": "ERROR", "object": {**event["object"], "code": GONE}}
            else:
                yield event
    except (errors.APINotFoundError, errors.APIUnauthorizedError):
        raise
    except errors.APIError as error:
        _watch_failed(resource, namespace, error)
        await asyncio.sleep(LONGEST_ERROR_WAIT)


def _watch_failed(resource: Any, namespace: str | None, error: object) -> None:
    where = f"namespace {namespace}" if namespace else "the cluster"
    logger.warning("The watch of %s in %s failed: %s", resource.plural, where, error)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Of a request that is tried again and again, the first failure; it is no error of ours."""
    text = record.getMessage()
    if "will retry" in text:
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        return "attempt #1 " in text or "attempt #1/" in text
    return True


async def _list_nothing(*, resource: Any, namespace: Any, **more: Any) -> AsyncIterator[Any]:
    """In the place of kopf's list: only the version that the watch goes on from."""
    # kopf's own list would cost as much again as ours, and a task, a queue and a pass through its
    # machinery for each object; and what it does not find it does not tell.
    watches = _watches.get(None)
    if watches is None or (kind := watches.kind_of(resource)) is None:
        async for page in _kopf_lists(resource=resource, namespace=namespace, **more):
            yield page
    else:
        yield [], await watches.begin(kind, namespace)


def _read_event(line: str) -> Any:
    """In the place of json.loads in kopf's stream: an event, its object made small at once."""
    # kopf copies objects and compares them with code that calls itself: one that is deep would end
    # the watch of all, or never be told. And what it has to copy is small so.
    try:
        event = read_json(line)
    except ValueError as error:
        # cut off in between: the watch is asked for it again
        raise aiohttp.ClientPayloadError(f"an event is no JSON: {error}") from error
    found = event.get("object") if isinstance(event, dict) else None
    if isinstance(found, dict) and (kind := _kind_of(found)) is not None:
        event["object"] = trimmed(kind, found)
    return event


def _kind_of(body: Object) -> Kind | None:
    told = (body.get("apiVersion"), body.get("kind"))
    return next((kind for kind in WATCHED if (kind.api_version, kind.kind) == told), None)


class _Forgetful(ResourceMemories):
    """kopf's notes about each object, kept for nobody: at ten thousand jobs they are 100 MiB."""

    async def recall(
        self,
        raw_body: Any,
        *,
        memobase: Any = None,
        noticed_by_listing: bool = False,
        ephemeral: bool = False,
    ) -> ResourceMemory:
        return await super().recall(
            raw_body, memobase=memobase, noticed_by_listing=noticed_by_listing, ephemeral=True
        )


class Watches:
    """One run of kopf over a fixed set of kinds that exist."""

    def __init__(self, settings: Settings, kinds: Sequence[Kind], seen: Seen, begin: Begin) -> None:
        self._settings = settings
        self._kinds = kinds
        self._seen = seen
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._told: deque[tuple[Kind, str | None, Object]] = deque()
        self._stop = threading.Event()
        self._ended: Future[None] = Future()
        # From now on nobody who waits for it can cancel it.
        self._ended.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="watches", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        # kopf speaks of each event and task at INFO; what ends a watch is an error and stays.
        _LOGGER.setLevel(logging.WARNING)
        watching.logger.addFilter(_is_worth_a_line)
        fetching.fetch_objs = _list_nothing
        watching.watch_objs = _watch_on
        vars(api)["json"] = SimpleNamespace(loads=_read_event)
        self._thread.start()

    async def ended(self) -> None:
        """Wait for the end.

        Raises:
            Exception: whatever ended a watch; without `stop`, an end is always an error.
        """
        await asyncio.wrap_future(self._ended)

    async def stop(self) -> None:
        """End the watches, and wait a little for that; what they died of is not told here."""
        # What requests cut off in the middle say of it is no news.
        _LOGGER.setLevel(logging.CRITICAL)
        self._stop.set()
        await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=STOP_SECONDS)

    def kind_of(self, resource: Any) -> Kind | None:
        """The kind that is a resource of kopf's; None for one that is none of ours."""
        named = (resource.group, resource.version, resource.plural)
        return next((k for k in self._kinds if (k.group, k.version, k.plural) == named), None)

    async def begin(self, kind: Kind, namespace: str | None) -> str:
        """From which version to watch; asked on kopf's loop, answered on the main one."""
        asked = asyncio.run_coroutine_threadsafe(self._begin(kind, namespace), self._loop)
        return await asyncio.wrap_future(asked)

    def _run(self) -> None:
        _watches.set(self)
        namespaces = self._settings.namespaces
        # It warns that no signals reach it on a thread, which is what we want.
        logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry(),
                    settings=kopf_settings(self._kinds),
                    memories=_Forgetful(),
                    clusterwide=not namespaces,
                    namespaces=namespaces,
                    stop_flag=self._stop,
                    standalone=True,
                )
            )
            if not self._stop.is_set():
                raise RuntimeError("the watches ended without being asked to")
            self._ended.set_result(None)
        except BaseException as error:
            # Whatever it was, the main thread must hear of it, or the operator works blindly.
            self._ended.set_exception(error)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry, retries=5)(_login)
        for kind in self._kinds:
            kopf.on.event(
                kind.group, kind.version, kind.plural, registry=registry, id=f"seen-{kind.plural}"
            )(self._handler(kind))
        return registry

    def _handler(self, kind: Kind) -> Callable[..., Any]:
        async def handler(event: Any, **_: Any) -> None:
            # What waits is small (_read_event): whole objects that the main loop is behind with are
            # 100 MiB.
            self._told.append((kind, event["type"], event["object"]))
            # Waking the main loop is a system call; whatever waits already has done it.
            if len(self._told) == 1 and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._hand_on)

        return handler

    def _hand_on(self) -> None:
        """What was told since, on the main loop."""
        try:
            for _ in range(min(TOLD_AT_ONCE, len(self._told))):
                self._seen(*self._told.popleft())
        finally:
            # also after an error, or nothing would ever be handed on again
            if self._told:
                self._loop.call_soon(self._hand_on)


def _login(**arguments: Any) -> Any:
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)


def kopf_settings(kinds: Sequence[Kind]) -> kopf.OperatorSettings:
    """Settings that make kopf a watcher: selectors on the server, everything else inert."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.persistence.finalizer = f"{PREFIX}/unused"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=PREFIX, v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=PREFIX, v1=False)
    settings.queueing.idle_timeout = IDLE_SECONDS
    # A watch that says nothing for so long is opened anew: load balancers drop silent ones.
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 5
    settings.watching.connect_timeout = 5
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = _ErrorWaits()
    settings.networking.enforce_retry_after = True
    # The process itself ends hard if need be; kopf must not.
    settings.process.ultimate_exiting_timeout = None
    for kind in kinds:
        if chosen := selector(kind):
            # Only the form of three parts filters: "group/version/plural" as one string is read
            # as a group of that name and matches nothing.
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = chosen
    return settings
