"""Liveness and readiness: whether work goes on, not only whether the process does.

`Health` gathers what the parts say of themselves; `serve` answers the kubelet from a thread of its
own, so that a busy event loop is reported as late, not mistaken for dead. Called by service. Must
never call the cluster: an API server that is away is no reason to restart the operator.
"""

from __future__ import annotations

import asyncio
import http.server
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence

from osft_operator import metrics
from osft_operator.settings import Settings

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""How often the event loop shows that it runs."""
RESYNCS_MISSED = 4
"""So many resync intervals in which no list ends mean that work has stopped."""


class Health:
    """What is known about this process. Written on the event loop, read on the probes' thread."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._beat = clock()
        self._stalled = 0.0
        self._behind = 0.0
        self._listed: float | None = None
        self.ready = False
        """Whether this replica can do its part: a standby at once, a worker once it has synced."""
        self.remarks: Callable[[], Sequence[str]] = tuple
        """What readiness says besides: one line for all that is left out."""

    def beat(self, stalled_seconds: float, behind_seconds: float) -> None:
        """The event loop runs.

        Args:
            stalled_seconds: for so long OSFTJobs are due and none is taken up.
            behind_seconds: for so long the watches have owed what the API server told otherwise.
        """
        self._beat = self._clock()
        self._stalled = stalled_seconds
        self._behind = behind_seconds

    def resynced(self, is_whole: bool) -> None:
        """A resync ended; from the first one on, they must go on.

        Args:
            is_whole: whether all that is served was read.
        """
        self.listed()
        if is_whole:
            metrics.resync_timestamp.set_to_current_time()

    def listed(self) -> None:
        """A list was read: however many there are, they go on."""
        self._listed = self._clock()

    def problems(self) -> list[str]:
        """Why this process should be restarted; empty when it should not."""
        now, found = self._clock(), []
        silent = now - self._beat
        if silent > self._settings.loop_stall_seconds:
            found.append(f"the event loop stands still for {silent:.0f} s")
        if self._stalled > self._settings.queue_stall_seconds:
            found.append(f"OSFTJobs are due, and none was taken up for {self._stalled:.0f} s")
        if self._behind > self._settings.watch_stall_seconds:
            found.append(f"the watches have been behind the API server for {self._behind:.0f} s")
        longest = RESYNCS_MISSED * self._settings.resync_seconds
        if self._listed is not None and now - self._listed > longest:
            found.append(f"the last list ended {now - self._listed:.0f} s ago")
        return found

    async def keep_beating(
        self, stalled_seconds: Callable[[], float], behind_seconds: Callable[[], float]
    ) -> None:
        """Beat until cancelled."""
        while True:
            before = self._clock()
            await asyncio.sleep(BEAT_SECONDS)
            metrics.loop_lag.set(max(0.0, self._clock() - before - BEAT_SECONDS))
            self.beat(stalled_seconds(), behind_seconds())


EVERYWHERE, EVERYWHERE_IPV4 = "::", "0.0.0.0"


class _Server6(http.server.ThreadingHTTPServer):
    """The standard library's binds IPv4 alone."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        # whatever the node's default is: the kubelet may come by IPv4
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def usable(address: str) -> str:
    """An address to serve on: the one that is given, or all of IPv4 where `::` cannot be had.

    Pods of a cluster with IPv6 alone are asked by IPv6; a kernel may have none at all.
    """
    if address != EVERYWHERE:
        return address
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind((EVERYWHERE, 0))
    except OSError as error:
        logger.info("No IPv6 here, so IPv4 alone is served: %s", error)
        return EVERYWHERE_IPV4
    return address


def serve(health: Health, address: str, port: int) -> tuple[int, Callable[[], None]]:
    """Answer /healthz and /readyz on a thread of its own.

    Returns:
        The port and a function that ends it.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            remarks: Sequence[str] = ()
            if self.path == "/healthz":
                problems = health.problems()
            elif self.path == "/readyz":
                problems = [] if health.ready else ["the first sync is not done yet"]
                remarks = health.remarks()
            else:
                self.send_error(404)
                return
            body = "\n".join([*(problems or ["ok"]), *remarks]).encode()
            self.send_response(503 if problems else 200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes come every few seconds; the log is for changes."""

    kind = _Server6 if ":" in address else http.server.ThreadingHTTPServer
    server = kind((address, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="probes", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close
