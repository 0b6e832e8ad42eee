"""What a person sees of a run: a bar on a terminal, few lines in a log."""

from __future__ import annotations

import io
import logging
import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest

from osft_trainer.progress import Reporter
from osft_trainer.report import Progress, RunFolder
from osft_trainer.terminal import Bar, Lines, bar_line, display

HALF = Progress(
    run_id="r",
    phase="Training",
    step=840,
    total_steps=2000,
    loss=0.12345,
    tokens_per_second=9812.4,
    estimated_remaining_seconds=12300,
    learning_rate=1e-5,
    grad_norm=0.5,
)


class Terminal(io.StringIO):
    """Text as a terminal shows it, line by line."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        lines = self.getvalue().split("\n")
        return [line.rpartition("\x1b[K")[2] for line in lines]


def test_a_bar_holds_what_matters_and_fits() -> None:
    assert bar_line(HALF, 120) == (
        "[==========              ] 42% 840/2000  loss 0.1235  9.81k tokens/s  3h25m left"
    )
    assert len(bar_line(HALF, 40)) == 39
    saving = HALF.model_copy(update={"phase": "Saving"})
    assert "] Saving  42% 840/2000" in bar_line(saving, 120)
    endless = HALF.model_copy(update={"total_steps": None, "estimated_remaining_seconds": None})
    assert bar_line(endless, 120) == "step 840  loss 0.1235  9.81k tokens/s"
    fresh = Progress(run_id="r", total_steps=5)
    assert bar_line(fresh, 120) == f"[{' ' * 24}] Starting  0% 0/5"


def test_the_bar_is_drawn_over_itself_and_stays_at_the_end() -> None:
    now = 0.0
    terminal = Terminal()
    bar = Bar(terminal, clock=lambda: now)
    bar.show(HALF)
    bar.show(HALF.model_copy(update={"step": 841}))  # too soon
    assert "840/2000" in terminal.screen[-1]
    now = 1.0
    bar.show(HALF.model_copy(update={"step": 842}))
    assert "842/2000" in terminal.screen[-1]
    bar.show(HALF.model_copy(update={"step": 842, "phase": "Saving"}))  # of note
    assert "Saving" in terminal.screen[-1]
    bar.show(HALF.model_copy(update={"step": 2000, "phase": "Done", "final": "f"}))
    bar.close()
    assert len(terminal.screen) == 2
    assert "100% 2000/2000" in terminal.screen[0]


def test_log_lines_stand_above_the_bar() -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        bar = Bar(terminal)
        bar.show(HALF)
        logging.getLogger("osft_trainer.test").warning("news")
        bar.show(HALF.model_copy(update={"phase": "Saving"}))
        assert terminal.screen[0] == "news"
        assert "Saving" in terminal.screen[1]
        bar.close()
        assert handler.filters == []
    finally:
        root.removeHandler(handler)


def test_a_terminal_that_goes_away_ends_nothing() -> None:
    leader, follower = pty.openpty()
    stream = os.fdopen(follower, "w")
    bar = display(stream)
    assert isinstance(bar, Bar)
    bar.show(HALF)
    assert b"840/2000" in os.read(leader, 4096)
    os.close(leader)
    bar.show(HALF.model_copy(update={"phase": "Saving"}))
    bar.close()
    with pytest.raises(OSError):
        stream.close()


def test_a_log_has_a_line_for_each_step(caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines()
    caplog.set_level(logging.INFO)
    for step in range(1, 41):
        for phase in ("Saving", "Training", "Training"):
            lines.show(HALF.model_copy(update={"step": step, "phase": phase}))
    said = [int(message.split("/")[0].split()[-1]) for message in caplog.messages]
    assert said == list(range(1, 41))
    assert caplog.messages[0].endswith(
        "loss 0.1235  9.81k tokens/s  3h25m left  learning rate 1e-05  gradient norm 0.5"
    )


def test_a_file_or_pipe_gets_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        assert isinstance(display(stream), Lines)


def test_the_reporter_shows_every_change_and_keeps_measured_numbers(tmp_path: Path) -> None:
    seen: list[Progress] = []
    show: Callable[[Progress], None] = seen.append
    reporter = Reporter(RunFolder(tmp_path), "r", 1, 0, show=show)
    reporter.measured(a=0.1234567890, b=2.0)
    reporter.measured(b=None, c=float("nan"), d=1e-9)
    reporter.update(step=3)
    assert [progress.step for progress in seen] == [0, 0, 3]
    assert {m.name: m.value for m in seen[-1].metrics} == {"a": "0.123457", "d": "1e-09"}
