"""Watches of the benchmark: when an object was first seen, and how it looks now.

Called by load_story and load_node. Times are this program's; the API server's clock is not asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import urllib3

from cluster.api import Api, ApiError

logger = logging.getLogger("bench")

Name = tuple[str, str]
"""Namespace and name."""


class Seen(threading.Thread):
    """All objects of a path, until `stopped` is set."""

    def __init__(self, api: Api, path: str) -> None:
        super().__init__(daemon=True, name=path)
        self._api, self._path = api, path
        self.first: dict[Name, float] = {}
        self.bodies: dict[Name, dict[str, Any]] = {}
        self.stopped = False
        self._version = self._list()
        self.start()

    def run(self) -> None:
        """Watch; list anew when the server has forgotten where this watch was."""
        while not self.stopped:
            try:
                for event in self._api.watch(self._path, self._version):
                    if event["type"] == "ERROR":
                        self._version = self._list()
                        break
                    self._take(event["object"])
            except (ApiError, urllib3.exceptions.HTTPError) as error:
                if not self.stopped:
                    logger.warning("a watch of the benchmark broke: %s", error)
                    time.sleep(0.2)

    def _list(self) -> str:
        listed = self._api.get(self._path)
        for body in listed["items"]:
            self._take(body)
        version: str = listed["metadata"]["resourceVersion"]
        return version

    def _take(self, body: dict[str, Any]) -> None:
        name = (body["metadata"]["namespace"], body["metadata"]["name"])
        self._version = body["metadata"]["resourceVersion"]
        self.first.setdefault(name, time.monotonic())
        self.bodies[name] = body

    def wait_for(self, names: Iterable[Name], seconds: float) -> set[Name]:
        """Wait until all are there; returns those that never came."""
        return _wait(set(names), lambda name: name in self.first, seconds)

    def wait_for_phase(self, names: Iterable[Name], phase: str, seconds: float) -> set[Name]:
        """Wait until the status of all says so; returns those that never did."""

        def reached(name: Name) -> bool:
            status = self.bodies.get(name, {}).get("status") or {}
            return bool(status.get("phase") == phase)

        return _wait(set(names), reached, seconds)


def _wait(names: set[Name], reached: Callable[[Name], bool], seconds: float) -> set[Name]:
    end = time.monotonic() + seconds
    left = set(names)
    while left and time.monotonic() < end:
        left = {name for name in left if not reached(name)}
        time.sleep(0.05)
    return left
