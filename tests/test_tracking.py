"""metrics.jsonl reads like the file of one undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osft_trainer.tracking import Tracker


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, done: int, *numbers: int) -> None:
    with Tracker(path, done) as tracker:
        for number in numbers:
            tracker.write({"step": number, "loss": 0.1})


def test_lines_behind_the_resumed_step_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2, 3, 4)
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]
    write(path, 0, 1)
    assert steps(path) == [1]


def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    path.write_text(path.read_text()[:-9])
    write(path, 5, 6)
    assert steps(path) == [1, 6]


def test_what_is_no_number_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(path, 0) as tracker, pytest.raises(ValueError):
        tracker.write({"step": 1, "loss": float("nan")})
    assert path.read_text() == ""


def test_a_line_can_be_read_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(path, 0) as tracker:
        tracker.write({"step": 1})
        assert steps(path) == [1]
