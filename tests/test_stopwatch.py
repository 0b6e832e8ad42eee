"""The time that a step is said to take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import agreement, loop
from osft_trainer.leaks import LeakWatch
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder, metric_lines
from osft_trainer.saving import Saver
from osft_trainer.stopwatch import Stopwatch


def test_laps_follow_one_another_without_what_is_done_while_it_stands() -> None:
    now = 0.0
    watch = Stopwatch(lambda: now)
    now = 3.0
    with watch.standing():
        now = 10.0
    now = 12.0
    assert watch.lap() == 5.0
    with contextlib.suppress(OSError), watch.standing():
        now = 20.0
        raise OSError("the disk is full")
    now = 21.0
    assert watch.lap() == 1.0


WAITED, OTHERWISE = 0.2, 1.5


def test_a_step_has_the_time_in_which_its_device_is_waited_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange between steps waits for what is queued; saving and measuring are no step."""

    def exchange(flags: Sequence[bool], world: World) -> list[bool]:
        time.sleep(WAITED)
        return agreement.any_rank_of_each(flags, world)

    def slowly(real: Any) -> Any:
        def slow(*args: Any) -> Any:
            time.sleep(OTHERWISE)
            return real(*args)

        return slow

    monkeypatch.setattr(loop, "any_rank_of_each", exchange)
    monkeypatch.setattr(LeakWatch, "measure", slowly(LeakWatch.measure))
    monkeypatch.setattr(Saver, "begin", slowly(Saver.begin))
    told = tiny.training(
        tiny.model_folder(tmp_path / "model"), tiny.data_file(tmp_path / "data.jsonl"),
        tmp_path / "run", checkpoint_every_steps=1, training_mode="step", max_steps=3,
        lr_scheduler="constant",
    )  # fmt: skip
    tiny.run(told)
    rows = metric_lines(RunFolder(Path(told.ckpt_output_dir)).metrics)
    assert len(rows) == 3
    for row in rows:
        assert WAITED <= row["seconds"] < OTHERWISE
        assert row["tokensPerSecond"] == pytest.approx(row["tokens"] / row["seconds"])
