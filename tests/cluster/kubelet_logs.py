"""The kubelet's HTTPS server, so that `kubectl logs` works: plain, -f, --previous, --tail."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cluster import certificates
from osft_operator.local_runner import PodProcess

FOLLOW_SECONDS = 0.1


class LogServer:
    """Serves /containerLogs/<namespace>/<pod>/<container> of one kubelet."""

    def __init__(self, folder: Path, runner: Callable[[str, str], PodProcess]) -> None:
        """Open the port.

        Args:
            folder: gets the self-signed certificate.
            runner: finds a pod's processes by namespace and name, or raises KeyError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        pair = certificates.signed(folder, "kubelet")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)

        class Handler(_Handler):
            find = staticmethod(runner)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    find: Callable[[str, str], PodProcess]

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        parts = address.path.strip("/").split("/")
        if len(parts) != 4 or parts[0] != "containerLogs":
            return self._refuse(404, f"no such path: {address.path}")
        _, namespace, pod, name = parts
        try:
            runner = self.find(namespace, pod)
            path = runner.log_path(name, previous=query.get("previous") == "true")
        except KeyError as error:
            return self._refuse(404, f"not found: {error}")
        if path is None:
            return self._refuse(400, f"container {name} of pod {pod} has no such log")
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self._send(path, runner, name, query)
        return None

    def _send(self, path: Path, runner: PodProcess, name: str, query: dict[str, str]) -> None:
        with path.open("rb") as file:
            if "tailLines" in query:
                lines = file.read().splitlines(keepends=True)
                count = int(query["tailLines"])
                self.wfile.write(b"".join(lines[-count:] if count else []))
            while True:
                # first whether it runs, then what it wrote: else the last words could be missed
                runs = runner.container(name).running and runner.log_path(name) == path
                if part := file.read():
                    self.wfile.write(part)
                    self.wfile.flush()
                elif query.get("follow") != "true" or not runs:
                    return
                else:
                    time.sleep(FOLLOW_SECONDS)

    def _refuse(self, code: int, message: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(message.encode())

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Say nothing: the tests read pod logs, not this server's."""
