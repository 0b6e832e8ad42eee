"""What a run tells the world: documents, last words, the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_trainer.report import (
    MAX_DOCUMENT_BYTES,
    MAX_TERMINATION_BYTES,
    TERMINATION_LOG_ENV,
    Document,
    ExitCode,
    Owner,
    Progress,
    RunFolder,
    Termination,
    Verdict,
    duration,
    metric_lines,
    percentage,
    read_document,
    summary,
    write_atomically,
    write_termination,
)

FULL = Progress(
    run_id="uid", attempt=2, phase="Training", step=840, total_steps=2000, epoch=0.42, loss=1.5,
    learning_rate=5e-6, tokens_per_second=1000.5, latest_checkpoint="/out/step-800",
)  # fmt: skip


@pytest.mark.parametrize(
    "document",
    [
        FULL,
        Termination(reason="Diverged", exit_code=3, message="loss is NaN", rank=1, progress=FULL),
        Verdict(run_id="uid", exit_code=2, reason="BadInput"),
        Owner(run_id="uid", attempt=3, fingerprint="abc"),
    ],
    ids=lambda document: type(document).__name__,
)
def test_a_document_reads_back_equal(document: Document) -> None:
    text = document.to_json()
    assert "\n" not in text
    assert type(document).parse(text) == document
    assert all("_" not in name for name in json.loads(text))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_what_a_pod_says_is_never_trusted(raw: bytes) -> None:
    found = Progress.parse(raw)
    assert found is None or isinstance(found, Progress)


@pytest.mark.parametrize(
    "changes",
    [
        '"step": -1', '"step": 1e400', '"loss": NaN', '"loss": Infinity', '"step": "many"',
        '"epoch": -0.5', '"metrics": [{"name": 1}]', '"phase": "' + "x" * 40 + '"',
        '"latestCheckpoint": "' + "x" * 2000 + '"',
    ],
)  # fmt: skip
def test_a_progress_that_cannot_be_is_refused(changes: str) -> None:
    assert Progress.parse('{"runId": "uid", "step": 1}') is not None
    assert Progress.parse('{"runId": "uid", ' + changes + "}") is None


def test_a_document_that_is_too_long_is_not_read() -> None:
    padding = " " * MAX_DOCUMENT_BYTES
    assert Progress.parse('{"runId": "uid"}' + padding) is None
    assert Progress.parse('{"runId": "uid", "fromTheFuture": 1}') is not None


@given(st.text(max_size=2048))
def test_last_words_fit_what_the_kubelet_keeps(message: str) -> None:
    words = Termination(reason="BadInput", exit_code=2, message=message, progress=FULL)
    raw = words.to_bytes()
    assert len(raw) <= MAX_TERMINATION_BYTES
    found = Termination.parse(raw)
    assert found is not None
    assert message.startswith(found.message)


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    environ = {TERMINATION_LOG_ENV: str(tmp_path / "log")}
    first, second = (
        Termination(reason="Crashed", exit_code=75, message=text) for text in ("cause", "effect")
    )
    write_termination(first, environ)
    write_termination(second, environ)
    assert read_document(tmp_path / "log", Termination) == first
    write_termination(Termination(reason="Done", exit_code=0), environ)
    assert read_document(tmp_path / "log", Termination) == Termination(reason="Done", exit_code=0)
    write_termination(first, {})


def test_only_bad_input_and_divergence_are_final() -> None:
    assert [code for code in ExitCode if code.is_final] == [2, 3]
    assert [int(code) for code in ExitCode] == [0, 2, 3, 75, 143]


def test_checkpoints_count_when_complete_and_in_order_of_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.complete_checkpoints() == []
    for step in (100_000_000, 9, 120):
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / "COMPLETE").touch()
    folder.checkpoint(200).mkdir()
    (folder.checkpoints / "step-00000300.partial").mkdir()
    (folder.checkpoints / "step-00000300.partial" / "COMPLETE").touch()
    found = [RunFolder.step_of(path) for path in folder.complete_checkpoints()]
    assert found == [9, 120, 100_000_000]


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "OWNER"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_or_absent_file_reads_as_none(tmp_path: Path) -> None:
    assert read_document(tmp_path / "none", Owner) is None
    (tmp_path / "cut").write_text('{"runId": "u')
    assert read_document(tmp_path / "cut", Owner) is None


def test_a_metrics_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert metric_lines(path) == [{"step": 1}, {"step": 2}]


def test_progress_in_words() -> None:
    assert summary(FULL) == "42% 840/2000"
    assert summary(FULL.model_copy(update={"total_steps": None})) == "step 840"
    done = FULL.model_copy(update={"step": 2000})
    assert percentage(done) == 99
    assert percentage(done.model_copy(update={"final": "/out/final"})) == 100


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (42, "42s"), (430, "7m10s"), (12300, "3h25m"), (187_200, "2d4h"), (-5, "0s")],
)
def test_durations_in_words(seconds: int, text: str) -> None:
    assert duration(seconds) == text
