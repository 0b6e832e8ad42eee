"""The only client of the API server: typed calls, typed errors, plain dicts in and out.

Called by resync, reconcile, events, leader and service; nothing else imports the kubernetes
package. Its client is synchronous, so every call runs in a bounded pool of threads and the event
loop never waits. What a caller may do with an error is in its class: Unavailable means wait,
Refused means give up until something changes, NotFound and Conflict say what is there; all else is
a bug and keeps its stack trace. Must never decide anything about a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode, urlsplit

import urllib3
from kubernetes import client, config

from osft_operator import metrics
from osft_operator.kinds import LEASES, Kind, Object

PAGE_SIZE = 500
"""Objects in one page of a list; the API server's memory is the limit, not ours."""
FIELD_MANAGER = "osft-operator"
"""Name of this writer in managedFields."""
MAX_MESSAGE = 1024
"""Longest part of the server's words that is kept."""


class ClusterError(Exception):
    """What the API server or the way to it answered instead of a result."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "") -> None:
        super().__init__(message[:MAX_MESSAGE])
        self.code = code
        self.reason = reason


class NotFound(ClusterError):
    """404: the object, or the namespace it should be made in, is not there."""


class KindMissing(NotFound):
    """404 for the whole kind: its CustomResourceDefinition is not installed (yet)."""


class Conflict(ClusterError):
    """409: changed meanwhile; look again."""


class AlreadyExists(Conflict):
    """409 on creating: the name is taken."""


class Refused(ClusterError):
    """4xx: the server does not want this request, and says why. The same one never helps."""


class Forbidden(Refused):
    """403: a right or a quota is missing. It may come, so a later try can help."""


class Unavailable(ClusterError):
    """No answer, 401, 429 or 5xx: try again later."""

    def __init__(self, message: str, *, code: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Listing:
    """A whole list, read in pages."""

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
    ) -> None:
        # Retries and redirects are ours to decide: the queue waits longer and counts.
        configuration.retries = False
        configuration.connection_pool_maxsize = threads
        self._client = client.ApiClient(configuration)
        self._host = urlsplit(configuration.host).netloc
        self._timeout = timeout_seconds
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="cluster")
        self.before_write: Callable[[], None] = lambda: None
        """Called before each write but a Lease's, in its thread; raises when it may not happen."""

    @classmethod
    def connect(cls, *, timeout_seconds: float = 30, threads: int = 8) -> Cluster:
        """The cluster of the pod's service account, else of KUBECONFIG.

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
        return cls(configuration, timeout_seconds=timeout_seconds, threads=threads)

    def close(self) -> None:
        """Wait for calls under way and end the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """One object."""
        return await self._call("GET", kind, kind.path(namespace, name))

    async def list_all(
        self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> Listing:
        """All objects of a kind, in pages; in every namespace when `namespace` is None."""
        items: list[Object] = []
        query = {"limit": str(PAGE_SIZE)}
        query |= {"labelSelector": labels} if labels else {}
        query |= {"fieldSelector": fields} if fields else {}
        while True:
            page = await self._call("GET", kind, kind.path(namespace), query=query)
            items += page.get("items") or []
            metadata = page.get("metadata", {})
            if not metadata.get("continue"):
                return Listing(items, metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Make an object; unknown fields are an error."""
        query = {"fieldValidation": "Strict", "fieldManager": FIELD_MANAGER}
        return await self._call("POST", kind, kind.path(namespace), query=query, body=body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """Put a whole object; its resourceVersion guards against others' changes."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self._call("PUT", kind, kind.path(namespace, name), query=query, body=body)

    async def patch(
        self, kind: Kind, namespace: str, name: str, body: Object, *, sub: str | None = None
    ) -> Object:
        """Merge into an object or its subresource."""
        query = {"fieldValidation": "Strict", "fieldManager": FIELD_MANAGER}
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

    async def _call(
        self,
        method: str,
        kind: Kind,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Object | None = None,
    ) -> Object:
        loop = asyncio.get_running_loop()
        url = path + ("?" + urlencode(query) if query else "")
        return await loop.run_in_executor(self._threads, self._request, method, kind, url, body)

    def _request(self, method: str, kind: Kind, url: str, body: Object | None) -> Object:
        """One request, in a thread of the pool."""
        if method != "GET" and kind is not LEASES:
            self.before_write()
        headers = {"Accept": "application/json", "User-Agent": FIELD_MANAGER}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        elif body is not None:
            headers["Content-Type"] = "application/json"
        self._client.update_params_for_auth(headers, [], ["BearerToken"], url, method, body)
        host = self._client.configuration.host
        try:
            response = self._client.rest_client.request(
                method, host + url, headers=headers, body=body, _request_timeout=self._timeout
            )
            raw = response.read()
        except (client.ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            metrics.api_requests.labels("<error>", method, self._host).inc()
            raise Unavailable(f"{method} {kind.plural}: no answer: {error}") from None
        metrics.api_requests.labels(str(response.status), method, self._host).inc()
        if 200 <= response.status < 300:
            if found := _document(raw):
                return found
            raise Unavailable(f"{method} {kind.plural}: the answer is no JSON object")
        raise _error(method, kind, response.status, raw, response.headers.get("Retry-After"))


def _error(method: str, kind: Kind, code: int, raw: bytes, retry_after: str | None) -> ClusterError:
    """An answer that is no result, sorted by what a caller may do about it."""
    status = _document(raw)
    message = str(status.get("message") or raw[:MAX_MESSAGE].decode(errors="replace")).strip()
    reason = str(status.get("reason", ""))
    text = f"{method} {kind.plural}: {message}"
    if code == 404:
        # A missing object is named in the answer's details; a missing kind has no details.
        named = (status.get("details") or {}).get("name")
        return (NotFound if named else KindMissing)(text, code=code, reason=reason)
    if code == 409:
        taken = reason == "AlreadyExists"
        return (AlreadyExists if taken else Conflict)(message, code=code, reason=reason)
    if code in (401, 408, 429) or code >= 500:
        wait = float(retry_after) if retry_after and retry_after.isdigit() else None
        return Unavailable(text, code=code, retry_after=wait)
    if code == 403:
        return Forbidden(message, code=code, reason=reason)
    return Refused(message, code=code, reason=reason)


def _document(raw: bytes) -> Object:
    """The JSON object of an answer; empty when it is none, as from a proxy in between."""
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
