"""metrics.jsonl reads like the file of one undisturbed run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from osft_trainer.config import TrainingParameters
from osft_trainer.tracking import Tracker, start_wandb


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


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_wandb_a_project_is_refused(tmp_path: Path) -> None:
    told = TrainingParameters(
        model_path="m",
        data_path="d",
        ckpt_output_dir="o",
        unfreeze_rank_ratio=0.5,
        effective_batch_size=1,
        max_tokens_per_gpu=8,
        max_seq_len=8,
        learning_rate=0.1,
        wandb_project="p",
    )
    with pytest.raises(ValueError, match=r"wandb_project 'p'.*osft\[wandb\]"):
        start_wandb(told, "id", tmp_path)
    assert start_wandb(told.model_copy(update={"wandb_project": None}), "id", tmp_path) is None
