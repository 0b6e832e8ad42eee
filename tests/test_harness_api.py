"""The tests' own client of the API server waits where the server asks for it, as client-go does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import api as harness
from cluster.api import Api, ApiError

NOT_YET = (429, {"Retry-After": "0"}, {"message": "storage is (re)initializing"})
AWAY = (503, {"Retry-After": "0"}, {"message": "the server is shutting down"})
BROKEN = (500, {}, {"message": "failed calling webhook"})
FULL = (429, {}, {"message": "Cannot evict pod"})
DONE = (201, {}, {"kind": "Thing"})
Answer = tuple[int, dict[str, str], dict[str, Any]]


class Server(HTTPServer):
    """Gives one answer after the other, and keeps what it was asked."""

    answers: list[Answer]
    asked: list[tuple[str, bytes]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, body))
        answers = self.server.answers
        code, headers, document = answers.pop(0) if len(answers) > 1 else answers[0]
        raw = json.dumps(document).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def post(server: Server, *answers: Answer) -> dict[str, Any]:
    server.answers = list(answers)
    api = Api(f"http://127.0.0.1:{server.server_port}", "token", Path("/dev/null"))
    return api.post("/apis/things", {"name": "a"})


def test_a_server_that_is_not_ready_is_asked_again(server: Server) -> None:
    assert post(server, NOT_YET, AWAY, NOT_YET, DONE) == {"kind": "Thing"}
    assert server.asked == [("/apis/things", b'{"name": "a"}')] * 4


@pytest.mark.parametrize("answer", [BROKEN, FULL], ids=["broken", "full"])
def test_a_refusal_that_asks_for_no_wait_is_one(server: Server, answer: Answer) -> None:
    with pytest.raises(ApiError) as refused:
        post(server, answer)
    assert (refused.value.code, refused.value.message) == (answer[0], answer[2]["message"])
    assert len(server.asked) == 1


def test_it_is_not_asked_for_ever(server: Server) -> None:
    with pytest.raises(ApiError, match="initializing"):
        post(server, NOT_YET)
    assert len(server.asked) == harness.TRIES
