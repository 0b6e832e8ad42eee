"""Progress while it happens: the reporter, its file, and the two pages."""

from __future__ import annotations

import http.client
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from osft_trainer import server as server_module
from osft_trainer.progress import Reporter
from osft_trainer.report import Metric, Progress, RunFolder, read_document
from osft_trainer.server import Server, metrics_text


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def reporter_of(folder: RunFolder, clock: Clock, rank: int = 0) -> Reporter:
    return Reporter(folder, "uid", 2, rank, clock=clock, monotonic=clock)


def written(folder: RunFolder) -> Progress:
    found = read_document(folder.progress, Progress)
    assert found is not None
    return found


def test_progress_is_written_at_most_once_a_second(folder: RunFolder, clock: Clock) -> None:
    reporter = reporter_of(folder, clock)
    reporter.update(phase="Training", total_steps=10)
    for step in range(1, 4):
        clock.now += 0.4
        reporter.update(step=step)
    assert written(folder).step == 3
    clock.now += 0.4
    reporter.update(step=4)
    assert (written(folder).step, reporter.current().step) == (3, 4)
    reporter.close()
    assert written(folder).step == 4


def test_what_is_of_note_is_written_at_once(folder: RunFolder, clock: Clock) -> None:
    reporter = reporter_of(folder, clock)
    for field, value in (("phase", "Saving"), ("latest_checkpoint", "/c"), ("final", "/f")):
        reporter.update(**{field: value})
        assert getattr(written(folder), field) == value
    assert written(folder).last_updated_time == "1970-01-12T13:46:40Z"


def test_other_ranks_write_no_file(folder: RunFolder, clock: Clock) -> None:
    reporter = reporter_of(folder, clock, rank=3)
    reporter.update(phase="Training")
    reporter.close()
    assert not folder.progress.exists()
    assert reporter.current().global_rank == 3


def test_the_time_left_follows_the_steps(folder: RunFolder, clock: Clock) -> None:
    reporter = reporter_of(folder, clock)
    # A resumed run jumps to its step; that takes no time and tells none.
    reporter.update(phase="Preparing", total_steps=1000, step=500)
    reporter.update(phase="Training")
    assert reporter.current().estimated_remaining_seconds is None
    clock.now += 100
    reporter.update(step=501)
    for step in range(502, 521):
        clock.now += 2
        reporter.update(step=step, loss=1.0)
    assert reporter.current().estimated_remaining_seconds is not None
    # The first step took long; its weight fades with each further one.
    assert 480 * 2 <= reporter.current().estimated_remaining_seconds < 480 * 20
    reporter.update(estimated_remaining_seconds=7)
    assert reporter.current().estimated_remaining_seconds == 7
    reporter.update(total_steps=None)
    assert reporter.current().estimated_remaining_seconds is None


def test_a_number_that_is_none_stops_nothing(folder: RunFolder, clock: Clock) -> None:
    reporter = reporter_of(folder, clock)
    reporter.update(loss=math.nan, grad_norm=math.inf, phase="Training")
    assert written(folder).loss is None
    assert written(folder).grad_norm is None


def test_a_disk_that_fails_stops_nothing(
    folder: RunFolder, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = reporter_of(RunFolder(folder.root / "gone"), clock)
    reporter.update(phase="Training")
    assert "progress.json is not written" in caplog.text


def test_a_field_that_does_not_exist_is_a_bug(folder: RunFolder, clock: Clock) -> None:
    with pytest.raises(AssertionError, match="lossy"):
        reporter_of(folder, clock).update(lossy=1)


FULL = Progress(
    run_id='u"id\\', attempt=2, phase="Training", step=7, total_steps=9, epoch=0.5, loss=1.5,
    learning_rate=5e-6, grad_norm=0.25, last_updated_time="1970-01-12T13:46:40Z",
    metrics=[Metric(name="leak", value="1e-8"), Metric(name="note", value="text")],
)  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(lambda: FULL, "127.0.0.1", 0)
    yield running
    running.close()


def get(port: int, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def test_progress_is_served_as_it_is(server: Server) -> None:
    status, kind, body = get(server.port, "/progress")
    assert (status, kind) == (200, "application/json")
    assert Progress.parse(body) == FULL
    assert json.loads(body)["totalSteps"] == 9


def test_metrics_are_named_with_their_units(server: Server) -> None:
    status, kind, body = get(server.port, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=0.0.4")
    lines = body.decode().splitlines()
    assert (
        r'osft_training_info{run_id="u\"id\\",attempt="2",rank="0",phase="Training"} 1.0' in lines
    )
    for line in (
        "osft_training_step 7.0",
        "osft_training_total_steps 9.0",
        "osft_training_loss 1.5",
        "osft_training_learning_rate 5e-06",
        "osft_training_gradient_norm 0.25",
        "osft_training_last_updated_timestamp_seconds 1000000.0",
        'osft_training_metric{name="leak"} 1e-08',
    ):
        assert line in lines
    assert not any("tokens_per_second" in line or "note" in line for line in lines)


def test_prometheus_reads_the_metrics() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(metrics_text(FULL)))
    assert all(family.type == "gauge" and family.documentation for family in families)
    samples = {sample.name for family in families for sample in family.samples}
    assert {"osft_training_info", "osft_training_step", "osft_training_metric"} <= samples


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/progress/", 404),
        ("POST", "/progress", 501),
        ("HEAD", "/metrics", 501),
    ],
)
def test_nothing_else_is_answered(server: Server, method: str, path: str, status: int) -> None:
    assert get(server.port, path, method)[0] == status


def test_silent_clients_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 3)
    running = Server(lambda: FULL, "127.0.0.1", 0)
    silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(2)]
    try:
        assert get(running.port, "/progress")[0] == 200
        silent.append(socket.create_connection(("127.0.0.1", running.port)))
        # Full: the next one is hung up on at once, and not kept waiting.
        fifth = socket.create_connection(("127.0.0.1", running.port), timeout=10)
        silent.append(fifth)
        assert fifth.recv(1) == b""
    finally:
        for connection in silent:
            connection.close()
        running.close()


def test_a_taken_port_is_an_os_error(server: Server) -> None:
    with pytest.raises(OSError, match="in use"):
        Server(lambda: FULL, "127.0.0.1", server.port)


def test_a_closed_server_frees_its_port() -> None:
    first = Server(lambda: FULL, "127.0.0.1", 0)
    port = first.port
    assert get(port, "/progress")[0] == 200
    first.close()
    second = Server(lambda: FULL, "127.0.0.1", port)
    assert get(port, "/progress")[0] == 200
    second.close()
