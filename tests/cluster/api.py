"""A small REST client of the API server, for the stand-ins and the tests.

Objects are plain dicts and paths are written out, so that a test shows what it asks of the server.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3

from osft_operator.bounds import read_json
from osft_operator.local_pods import Object

MERGE_PATCH = "application/merge-patch+json"
TRIES = 10
"""So often a request is sent that the server asks to send again later, as client-go does it."""


class ApiError(Exception):
    """The server's refusal, in its own words."""

    def __init__(self, code: int, message: str, body: Object) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.body = body


class Api:
    """Talks to one API server with one token."""

    def __init__(self, url: str, token: str, ca: Path) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        self._pool = urllib3.PoolManager(ca_certs=str(ca), maxsize=16, assert_hostname=False)

    def call(
        self,
        method: str,
        path: str,
        body: Object | str | None = None,
        kind: str = "application/json",
    ) -> Object:
        """One request, its body as text where it is too deep for Python; the answer as a dict.

        Raises:
            ApiError: the server answered 400 or more.
        """
        answer = self._request(method, path, body, kind)
        text = answer.data.decode(errors="replace")
        try:
            parsed: Any = read_json(text)
        except ValueError:
            parsed = {"message": text}
        told: Object = parsed if isinstance(parsed, dict) else {"message": text}
        if answer.status >= 400:
            raise ApiError(answer.status, str(told.get("message", text)), told)
        return told

    def _request(
        self, method: str, path: str, body: Object | str | None, kind: str
    ) -> urllib3.BaseHTTPResponse:
        """The answer, after every `Retry-After`: a kind that was just made is not there at once."""
        for number in range(1, TRIES + 1):
            answer = self._pool.request(
                method,
                self.url + path,
                body=body if body is None or isinstance(body, str) else json.dumps(body).encode(),
                headers={**self._headers, "Content-Type": kind},
                timeout=30,
                retries=False,
            )
            wait = answer.headers.get("Retry-After", "")
            not_yet = answer.status == 429 or answer.status >= 500
            if not not_yet or not wait.isdecimal() or number == TRIES:
                break
            time.sleep(float(wait))
        return answer

    def attempt(
        self, method: str, path: str, body: Object | None = None, kind: str = "application/json"
    ) -> None:
        """A call about an object that may be gone, changed or there already: 404 and 409 pass."""
        try:
            self.call(method, path, body, kind)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    def get(self, path: str) -> Object:
        return self.call("GET", path)

    def post(self, path: str, body: Object) -> Object:
        return self.call("POST", path, body)

    def put(self, path: str, body: Object) -> Object:
        return self.call("PUT", path, body)

    def patch(self, path: str, body: Object) -> Object:
        return self.call("PATCH", path, body, MERGE_PATCH)

    def delete(self, path: str, body: Object | None = None) -> Object:
        return self.call("DELETE", path, body)

    def watch(self, path: str, resource_version: str) -> Iterator[Object]:
        """The events after a resource version, until the server ends the watch."""
        joint = "&" if "?" in path else "?"
        url = f"{self.url}{path}{joint}watch=true&resourceVersion={resource_version}"
        answer = self._pool.request(
            "GET",
            url + "&timeoutSeconds=60",
            headers=self._headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=5, read=90),
            retries=False,
        )
        if answer.status >= 400:
            raise ApiError(answer.status, answer.data.decode(), {})
        rest = b""
        with answer:
            for part in answer.stream(2**16):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    yield json.loads(line)


class Informer(threading.Thread):
    """Keeps a copy of all objects below a path and sets `changed` when it has changed."""

    def __init__(self, api: Api, path: str, changed: threading.Event) -> None:
        super().__init__(daemon=True, name=f"watch {path}")
        self.synced = threading.Event()
        self._api, self._path, self._changed = api, path, changed
        self._objects: dict[str, Object] = {}
        self._guard = threading.Lock()
        self._stopped = threading.Event()

    def items(self) -> list[Object]:
        """The objects as last seen; do not change them."""
        with self._guard:
            return list(self._objects.values())

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._list_and_watch()
            except (ApiError, urllib3.exceptions.HTTPError):
                # the kind is not served yet, the watch is too old, the server is gone
                self._stopped.wait(0.3)

    def _list_and_watch(self) -> None:
        listed = self._api.get(self._path)
        with self._guard:
            self._objects = {each["metadata"]["uid"]: each for each in listed["items"]}
        self.synced.set()
        self._changed.set()
        for event in self._api.watch(self._path, listed["metadata"]["resourceVersion"]):
            if self._stopped.is_set() or event["type"] == "ERROR":
                return
            seen = event["object"]
            with self._guard:
                if event["type"] == "DELETED":
                    self._objects.pop(seen["metadata"]["uid"], None)
                else:
                    self._objects[seen["metadata"]["uid"]] = seen
            self._changed.set()


def wait_for(
    what: str, test: Any, *, timeout_seconds: float = 60, every_seconds: float = 0.1
) -> Any:
    """Ask until the answer is true, and return it.

    Raises:
        TimeoutError: it never was; `what` says what was waited for.
    """
    end = time.monotonic() + timeout_seconds
    while True:
        if answer := test():
            return answer
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout_seconds:g} s still no {what}")
        time.sleep(every_seconds)
