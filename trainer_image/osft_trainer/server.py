"""The training's two pages: /progress for the operator, /metrics for Prometheus.

Started by `worker` in each pod's first local rank. Must never block or slow the training: it has
its own threads, answers GET on two fixed paths from memory, reads nothing of what a client sends
beyond a short request line and headers, and serves a bounded number of clients at a time.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from osft_trainer.report import Progress

MAX_CLIENTS = 16
"""Answered at the same time; a further one is hung up on."""
CLIENT_TIMEOUT_SECONDS = 5.0
"""A client that says nothing for so long is hung up on."""

_JSON = "application/json"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"

_GAUGES = (
    ("step", "step", "Optimizer steps done."),
    ("total_steps", "total_steps", "Optimizer steps of the whole run."),
    ("epoch", "epoch", "Passes over the data done."),
    ("total_epochs", "total_epochs", "Passes over the data of the whole run."),
    ("loss", "loss", "Mean loss per counted token in the last step."),
    ("learning_rate", "learning_rate", "Learning rate of the last step."),
    ("grad_norm", "gradient_norm", "Global gradient norm before clipping in the last step."),
    ("tokens_per_second", "tokens_per_second", "Tokens of all ranks per second."),
    ("estimated_remaining_seconds", "estimated_remaining_seconds", "Time left in seconds."),
    ("latest_checkpoint_step", "latest_checkpoint_step", "Step of the newest complete state."),
)
"""Field of Progress, name after osft_training_, help."""


class Server:
    """Serves until closed; the port is bound when this returns."""

    def __init__(self, current: Callable[[], Progress], address: str, port: int) -> None:
        """Bind and start.

        Args:
            current: gives the progress to show; called from other threads.
            address: IP address to bind; the pod's own.
            port: 0 takes a free one, see `port`.

        Raises:
            OSError: the port is taken or the address is not ours.
        """
        handler = type("_BoundPages", (_Pages,), {"current": staticmethod(current)})
        self._server = _make_server(address, port, handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="osft-pages", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is served."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metrics_text(progress: Progress) -> str:
    """The progress in Prometheus' text format."""
    return "".join(line + "\n" for line in _metric_lines(progress))


def _metric_lines(progress: Progress) -> Iterator[str]:
    labels = {
        "run_id": progress.run_id,
        "attempt": str(progress.attempt),
        "rank": str(progress.global_rank),
        "phase": progress.phase,
    }
    yield from _gauge("info", "Which run this is, and its phase.", [(labels, 1.0)])
    for field, name, text in _GAUGES:
        value = getattr(progress, field)
        if value is not None:
            yield from _gauge(name, text, [({}, float(value))])
    if progress.last_updated_time is not None:
        updated = datetime.fromisoformat(progress.last_updated_time).timestamp()
        text = "When these numbers last changed, Unix time in seconds."
        yield from _gauge("last_updated_timestamp_seconds", text, [({}, updated)])
    if progress.retention is not None:
        kept = progress.retention
        losses = [({"model": "base"}, kept.loss_before)]
        if kept.loss_after is not None:
            losses.append(({"model": "trained"}, kept.loss_after))
        yield from _gauge("retention_loss", "Mean token loss on text of the old skills.", losses)
    further = [
        ({"name": metric.name}, number)
        for metric in progress.metrics
        if (number := _number(metric.value)) is not None
    ]
    if further:
        yield from _gauge("metric", "Further numbers of the run by name.", further)


def _gauge(name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Iterator[str]:
    yield f"# HELP osft_training_{name} {text}"
    yield f"# TYPE osft_training_{name} gauge"
    for labels, value in samples:
        inner = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        yield f"osft_training_{name}{'{' + inner + '}' if inner else ''} {value!r}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class _Pages(BaseHTTPRequestHandler):
    """One request, then the connection is closed."""

    current: Callable[[], Progress]
    timeout = CLIENT_TIMEOUT_SECONDS
    server_version = "osft"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path == "/progress":
            self._answer(_JSON, self.current().to_json())
        elif self.path == "/metrics":
            self._answer(_TEXT, metrics_text(self.current()))
        else:
            self.send_error(404, "only /progress and /metrics are here")

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: a scrape every few seconds is no news."""


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    # A half-answered client must not hold up the end of the training.
    block_on_close = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        # The standard library's version asks DNS for the host's name, which can take long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is no matter of the training."""


class _HTTPServer6(_HTTPServer):
    address_family = socket.AF_INET6


def _make_server(address: str, port: int, handler: type[_Pages]) -> _HTTPServer:
    kind = _HTTPServer6 if ":" in address else _HTTPServer
    return kind((address, port), handler)
