"""The operator's only client of the API server: typed calls, typed errors, plain dicts.

Called by resync, freshness, reconcile, observer, events, leader and service; nothing else of the
operator imports the kubernetes package (remote is the command line's). Its client is synchronous,
so every call runs in a bounded pool of threads and the event loop never waits; the Lease has a
thread of its own. What a caller may do with an error is in its class: Unavailable means wait,
Refused means give up until something changes, NotFound and Conflict say what is there; all else is
a bug and keeps its stack trace. Must never decide anything about a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode, urlsplit

import urllib3
from kubernetes import client, config

from osft_operator import metrics
from osft_operator.cluster_errors import (
    AlreadyExists,
    ClusterError,
    Conflict,
    Forbidden,
    Gone,
    KindMissing,
    NotFound,
    Refused,
    TooLarge,
    Unavailable,
    document,
    of_answer,
)
from osft_operator.kinds import LEASES, Kind, Object

__all__ = [
    "AlreadyExists",
    "Change",
    "Cluster",
    "ClusterError",
    "Conflict",
    "Forbidden",
    "Gone",
    "KindMissing",
    "Listing",
    "NotFound",
    "Refused",
    "Unavailable",
]

PAGE_SIZE = 250
"""Objects in one page of a list: larger ones are not faster, and cost tens of MiB here."""
PAGE_BYTES = 8 * 2**20
"""Longest page: of objects that are so large, fewer are asked for at a time."""
FIELD_MANAGER = "osft-operator"
"""Name of this writer in managedFields."""
OBJECT_SECONDS = 10.0
"""Longest wait for an answer about one object: a connection that died silently costs no more."""
LEASE_SECONDS = 4.0
"""The same for a Lease, which is lost when it is not renewed in time."""
CHANGES_SECONDS = 1
"""How long the server waits for further changes when it is asked for them."""
LOOKS = 4
"""Such questions at one time, on threads of their own: one for each kind."""
MOST_LOOKS = 32


def looks_for(namespaces: int, check_seconds: float) -> int:
    """How many looks at one time see every namespace about once in so many seconds."""
    return min(
        MOST_LOOKS, max(LOOKS, math.ceil(LOOKS * namespaces * CHANGES_SECONDS / check_seconds))
    )


@dataclass(frozen=True)
class Change:
    """One event of a watch."""

    type: str
    """ADDED, MODIFIED or DELETED."""
    object: Object


@dataclass(frozen=True)
class Listing:
    """A list, or a page of it."""

    items: list[Object]
    version: str
    """resourceVersion of the list: what was made later has a higher one."""


class Cluster:
    """Calls to one API server. Every method raises ClusterError's subclasses and no other error."""

    def __init__(
        self,
        configuration: client.Configuration,
        *,
        timeout_seconds: float = 30,
        threads: int = 8,
        looks: int = LOOKS,
    ) -> None:
        # Retries and redirects are ours to decide: the queue waits longer and counts.
        configuration.retries = False
        configuration.connection_pool_maxsize = threads + looks + 1
        self._client = client.ApiClient(configuration)
        self._host = urlsplit(configuration.host).netloc
        self._timeout = timeout_seconds
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cluster")
        # Slow calls, however many, must neither lose the Lease nor be slowed by looks at watches.
        self._lease_thread = ThreadPoolExecutor(1, thread_name_prefix="lease")
        self._look_threads = ThreadPoolExecutor(looks, thread_name_prefix="look")
        self.before_write: Callable[[], None] = lambda: None
        """Called before each write but a Lease's, in its thread; raises when it may not happen."""

    @classmethod
    def connect(
        cls, *, timeout_seconds: float = 30, threads: int = 8, looks: int = LOOKS
    ) -> Cluster:
        """The cluster of the pod's service account, else of KUBECONFIG.

        Args:
            timeout_seconds: longest wait for an answer.
            threads: requests at one time, beside the Lease's and the looks.
            looks: questions for changes at one time.

        Raises:
            ValueError: when there is neither.
        """
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            try:
                # Named here, since the library looks at the variable once, when it is imported.
                config.load_kube_config(
                    os.environ.get("KUBECONFIG"), client_configuration=configuration
                )
            except config.ConfigException as error:
                raise ValueError(
                    f"no way to a cluster: this is no pod with a service account, and {error}; "
                    "set KUBECONFIG"
                ) from None
        return cls(configuration, timeout_seconds=timeout_seconds, threads=threads, looks=looks)

    def close(self) -> None:
        """Wait for calls under way and end the threads."""
        for threads in (self._threads, self._lease_thread, self._look_threads):
            threads.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """One object."""
        return await self._call("GET", kind, kind.path(namespace, name))

    async def pages(
        self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[Listing]:
        """A list page by page, so that nobody need hold it whole; everywhere without `namespace`.

        Raises:
            Gone: when the server has forgotten the list between two pages.
        """
        limit, query = PAGE_SIZE, {"labelSelector": labels} if labels else {}
        query |= {"fieldSelector": fields} if fields else {}
        while True:
            query["limit"] = str(limit)
            try:
                page = await self._call(
                    "GET", kind, kind.path(namespace), query=query, whole=limit == 1
                )
            except TooLarge:
                limit = max(1, limit // 4)
                continue
            limit = min(PAGE_SIZE, 2 * limit)
            metadata = page.get("metadata", {})
            yield Listing(page.get("items") or [], metadata.get("resourceVersion", ""))
            if not metadata.get("continue"):
                return
            query["continue"] = metadata["continue"]

    async def list_all(
        self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        """All objects of a kind; in every namespace when `namespace` is None."""
        items: list[Object] = []
        version = ""
        async for page in self.pages(kind, namespace, labels=labels, fields=fields):
            items += page.items
            version = page.version
        return Listing(items, version)

    async def changes(
        self, kind: Kind, namespace: str | None, version: str, *, labels: str = ""
    ) -> list[Change]:
        """What has changed since a version, by a watch of a second.

        Raises:
            Gone: when the server does not remember that version.
        """
        query = {"watch": "true", "resourceVersion": version}
        query |= {"timeoutSeconds": str(CHANGES_SECONDS)}
        query |= {"labelSelector": labels} if labels else {}
        url = kind.path(namespace) + "?" + urlencode(query)
        loop = asyncio.get_running_loop()
        raw = await loop.run_in_executor(self._look_threads, self._raw, "GET", kind, url, None)
        # the last line may be cut; what it says comes again with the next question
        events = [document(line) for line in raw.split(b"\n")]
        for event in events:
            if event.get("type") == "ERROR":
                status = event.get("object") or {}
                error = Gone if status.get("code") == 410 else Unavailable
                raise error(f"watch {kind.plural}: {status.get('message')}")
        return [
            Change(event["type"], event["object"])
            for event in events
            if event.get("type") in ("ADDED", "MODIFIED", "DELETED")
        ]

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Make an object; unknown fields are an error."""
        query = {"fieldValidation": "Strict", "fieldManager": FIELD_MANAGER}
        return await self._call("POST", kind, kind.path(namespace), query=query, body=body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """Put a whole object; its resourceVersion guards against others' changes."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self._call("PUT", kind, kind.path(namespace, name), query=query, body=body)

    async def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: Object,
        *,
        sub: str | None = None,
        strict: bool = True,
    ) -> Object:
        """Merge into an object or its subresource; unknown fields are an error, or left out."""
        validation = "Strict" if strict else "Ignore"
        query = {"fieldValidation": validation, "fieldManager": FIELD_MANAGER}
        path = kind.path(namespace, name, sub)
        return await self._call("PATCH", kind, path, query=query, body=body)

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str,
        propagation: Literal["Background", "Foreground"] = "Background",
    ) -> None:
        """Delete exactly this object; one that is gone already is no error.

        Raises:
            Conflict: when the name now belongs to another object.
        """
        body = {"propagationPolicy": propagation, "preconditions": {"uid": uid}}
        with contextlib.suppress(NotFound):
            await self._call("DELETE", kind, kind.path(namespace, name), body=body)

    async def serves(self, kind: Kind) -> bool:
        """Whether the API server has this kind now."""
        try:
            found = await self._call("GET", kind, kind.root)
        except NotFound:
            return False
        return any(item.get("name") == kind.plural for item in found.get("resources", []))

    async def schema(self, kind: Kind) -> Object:
        """The schema of a kind as the API server publishes it, with defaults; empty without one."""
        found = await self._call("GET", kind, f"/openapi/v3{kind.root}")
        wanted = {"group": kind.group, "version": kind.version, "kind": kind.kind}
        schemas: dict[str, Object] = (found.get("components") or {}).get("schemas") or {}
        for schema in schemas.values():
            if wanted in (schema.get("x-kubernetes-group-version-kind") or []):
                return schema
        return {}

    async def _call(
        self,
        method: str,
        kind: Kind,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Object | None = None,
        whole: bool = True,
    ) -> Object:
        loop = asyncio.get_running_loop()
        url = path + ("?" + urlencode(query) if query else "")
        threads = self._lease_thread if kind is LEASES else self._threads
        return await loop.run_in_executor(threads, self._request, method, kind, url, body, whole)

    def _request(
        self, method: str, kind: Kind, url: str, body: Object | None, whole: bool
    ) -> Object:
        """One request, in a thread of the pool."""
        if found := document(self._raw(method, kind, url, body, whole)):
            return found
        raise Unavailable(f"{method} {kind.plural}: the answer is no JSON object")

    def _raw(
        self, method: str, kind: Kind, url: str, body: Object | None, whole: bool = True
    ) -> bytes:
        if method != "GET" and kind is not LEASES:
            self.before_write()
        headers = {"Accept": "application/json", "User-Agent": FIELD_MANAGER}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        elif body is not None:
            headers["Content-Type"] = "application/json"
        self._client.update_params_for_auth(headers, [], ["BearerToken"], url, method, body)
        host = self._client.configuration.host
        timeout = min(self._timeout, _patience(method, kind, url))
        try:
            response = self._client.rest_client.request(
                method, host + url, headers=headers, body=body, _request_timeout=timeout
            )
            raw: bytes = response.read() if whole else _bounded(response.response)
        except (client.ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            metrics.api_requests.labels("<error>", method, self._host).inc()
            # what happened to this connection has happened to those that wait beside it
            self._client.rest_client.pool_manager.clear()
            raise Unavailable(f"{method} {kind.plural}: no answer: {error}") from None
        metrics.api_requests.labels(str(response.status), method, self._host).inc()
        if 200 <= response.status < 300:
            return raw
        raise of_answer(method, kind, response.status, raw, response.headers.get("Retry-After"))


def _bounded(response: urllib3.BaseHTTPResponse) -> bytes:
    """The answer, as long as it is not longer than a page.

    Raises:
        TooLarge: it is; the connection is closed.
    """
    raw = response.read(PAGE_BYTES + 1)
    if len(raw) > PAGE_BYTES:
        response.close()
        raise TooLarge("a page is too large")
    response.release_conn()
    return raw


def _patience(method: str, kind: Kind, url: str) -> float:
    """Longest wait for an answer in seconds; a page of a list may take as long as is set."""
    if kind is LEASES:
        return LEASE_SECONDS
    return float("inf") if method == "GET" and "limit=" in url else OBJECT_SECONDS
