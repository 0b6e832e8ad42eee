"""A proxy between the operator and the API server that does to connections what networks do.

Called by the tests of faults. Plain HTTP towards the operator, TLS towards the server, one
connection there for each one here, bytes handed on as they come. Requests are read as far as their
head and body, so that a fault can be chosen by method and path; answers are not read at all. Runs
an event loop on a thread of its own; every method may be called from the test's thread.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml


@dataclass
class Request:
    """What the operator asks."""

    method: str
    path: str
    head: bytes
    body: bytes

    @property
    def is_watch(self) -> bool:
        """Whether it is kopf's; the operator's own short ones ask for no bookmarks."""
        return "watch=true" in self.path and "allowWatchBookmarks=true" in self.path

    @property
    def is_write(self) -> bool:
        return self.method != "GET" and "/leases" not in self.path


@dataclass
class Faults:
    """What is done to requests from now on; the defaults do nothing."""

    delay_seconds: float = 0.0
    """Wait before a request is handed on."""
    answer: Callable[[Request], bytes | None] = lambda _: None
    """An answer instead of the server's; None hands the request on."""
    closed: bool = False
    """New connections end at once."""
    silent_watches: bool = False
    """Watches begin and then say nothing."""


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_watch: bool = False
    is_dead: bool = False
    """Half-open: neither side hears of the other any more, or of an end."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class FaultProxy:
    """The proxy; a context manager."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        """Prepare it.

        Args:
            kubeconfig: the way to the API server, and who asks.
            folder: takes the kubeconfig that leads through the proxy.
        """
        self.faults = Faults()
        self.requests: list[Request] = []
        self._document = yaml.safe_load(kubeconfig.read_text())
        cluster = self._document["clusters"][0]["cluster"]
        self._target = urlsplit(cluster.pop("server"))
        self._tls = ssl.create_default_context(cafile=cluster.pop("certificate-authority"))
        self._tls.check_hostname = False
        self.kubeconfig = folder / "through-the-proxy.kubeconfig"
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        port = self._run(self._listen())
        self._document["clusters"][0]["cluster"]["server"] = f"http://127.0.0.1:{port}"
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(self._document))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def drop(self) -> None:
        """Every connection ends at once, with a reset."""
        self._loop.call_soon_threadsafe(self._drop)

    def freeze(self) -> None:
        """Every present connection stays open and says nothing more; new ones are well."""
        self._loop.call_soon_threadsafe(self._freeze, lambda _: True)

    def freeze_watches(self) -> None:
        """The same for watches only."""
        self._loop.call_soon_threadsafe(self._freeze, lambda connection: connection.is_watch)

    def heal(self) -> None:
        """No faults from now on."""
        self.faults = Faults()

    def _run(self, part: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(part, self._loop).result(30)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _end(self) -> None:
        self._server.close()
        self._drop()
        # not cancelled: before Python 3.12 asyncio's servers report that as an error
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if tasks:
            await asyncio.wait(tasks, timeout=5)

    def _drop(self) -> None:
        for connection in list(self._connections):
            connection.client.transport.abort()
            connection.server.transport.abort()

    def _freeze(self, which: Callable[[_Connection], bool]) -> None:
        for connection in filter(which, self._connections):
            connection.is_dead = True

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self.faults.closed:
            client.transport.abort()
            return
        try:
            answers, server = await asyncio.open_connection(
                self._target.hostname, self._target.port, ssl=self._tls
            )
        except OSError:
            client.transport.abort()
            return
        connection = _Connection(client, server)
        self._connections.add(connection)
        pump = asyncio.create_task(self._pump(answers, connection))
        try:
            while (request := await _read(reader)) is not None:
                await self._hand_on(request, connection)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if not connection.is_dead:
                server.close()
                await asyncio.gather(pump, return_exceptions=True)
                client.close()
            self._connections.discard(connection)

    async def _hand_on(self, request: Request, connection: _Connection) -> None:
        self.requests.append(request)
        faults = self.faults
        if faults.delay_seconds:
            await asyncio.sleep(faults.delay_seconds)
        answer = faults.answer(request)
        if faults.silent_watches and request.is_watch:
            answer = stream()
        connection.is_watch = request.is_watch
        if connection.is_dead:
            return
        if answer is not None:
            connection.client.write(answer)
            await connection.client.drain()
            return
        connection.server.write(request.head + request.body)
        await connection.server.drain()

    async def _pump(self, answers: asyncio.StreamReader, connection: _Connection) -> None:
        try:
            while data := await answers.read(2**16):
                if not connection.is_dead:
                    connection.client.write(data)
                    await connection.client.drain()
        except OSError:
            pass
        if not connection.is_dead:
            connection.client.close()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    fields = {line.split(":", 1)[0].lower(): line.split(":", 1)[1] for line in lines if ":" in line}
    body = await reader.readexactly(int(fields.get("content-length", 0)))
    return Request(method, path, head, body)


def refusal(code: int, reason: str, *, retry_after: int | None = None) -> bytes:
    """An answer with an error, as the API server writes it."""
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}
    body = json.dumps({**status, "reason": reason, "message": f"{reason} by the tests"}).encode()
    wait = f"Retry-After: {retry_after}\r\n" if retry_after is not None else ""
    head = (
        f"HTTP/1.1 {code} {reason}\r\nContent-Type: application/json\r\n{wait}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def stream(*events: dict[str, Any], ends: bool = False) -> bytes:
    """A watch's answer that has begun; without `ends` nothing more comes, and no end."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    lines = [json.dumps(event).encode() + b"\n" for event in events]
    parts = [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]
    return head + b"".join(parts) + (b"0\r\n\r\n" if ends else b"")


def too_old() -> bytes:
    """A watch whose version the server has forgotten."""
    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    return stream({"type": "ERROR", "object": status}, ends=True)
