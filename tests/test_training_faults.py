"""Kills, full and read-only disks, damage and rivals: no state is lost or half loaded.

With OSFT_SOAK set there are fifty kills.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rank_ends
import tiny
from drawn import SOAK
from osft_trainer import loop as loop_module
from osft_trainer.config import TrainingParameters
from osft_trainer.report import RunFolder

KILLS = 50 if SOAK else 5
SUPERSEDED = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model", attention_dropout=0.1)


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    """Twelve steps in four epochs, a state after each, validation and the best model."""
    return tiny.training(
        base,
        base.parent / "data.jsonl",
        out,
        **{
            "num_epochs": 4,
            "checkpoint_every_steps": 1,
            "validation_split": 0.2,
            "validation_frequency": 3,
            "save_best_val_loss": True,
            **changes,
        },
    )


def results(told: TrainingParameters) -> dict[str, Any]:
    """All that a run has worked out: its rows, and the bytes of its models."""
    folder = RunFolder(Path(told.ckpt_output_dir))
    models = {
        path.name: hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        for path in (folder.final, folder.best_export)
        if folder.is_complete(path)
    }
    return {"rows": tiny.rows(told), **models}


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> dict[int, dict[str, Any]]:
    """By the number of ranks."""
    found = {}
    for ranks in (1, 2):
        told = parameters(base, base.parent / f"undisturbed-{ranks}")
        tiny.complete(told, ranks)
        found[ranks] = results(told)
        assert found[ranks].keys() == {"rows", "final", "best"}
    return found


def end_as_launched(processes: list[Any]) -> list[int | None]:
    """One was killed: the launcher gives the others little time."""
    for process in processes:
        process.join(2)
    return tiny.finish(processes, seconds=0)


def wait_for_moment(processes: list[Any], metrics: Path, draw: random.Random) -> None:
    """Until a moment that is drawn: in the start, or so many steps into this attempt.

    Counted in steps, not in seconds, so that a busy machine does not see every run end early.
    """
    if draw.random() < 0.25:
        processes[0].join(draw.uniform(0.1, 2.0))
        return
    before = metrics.stat().st_ino if metrics.is_file() else None
    steps = draw.randint(1, 12)

    def is_there() -> bool:
        # A new attempt makes the file anew, with the lines of the steps that are saved.
        if not metrics.is_file() or metrics.stat().st_ino == before:
            return False
        return metrics.read_bytes().count(b"\n") >= steps

    while processes[0].exitcode is None and not is_there():
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))


@pytest.mark.timeout(120 + 60 * KILLS)
def test_random_ranks_are_killed_at_random_moments(
    base: Path,
    tmp_path: Path,
    undisturbed: dict[int, dict[str, Any]],
    record_property: Callable[[str, object], None],
) -> None:
    """Until so many kills have hit, over as many runs as that takes."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    kills, runs = 0, 0
    while kills < KILLS:
        runs += 1
        told = parameters(base, tmp_path / str(runs))
        folder = RunFolder(Path(told.ckpt_output_dir))
        while not RunFolder.is_complete(folder.final):
            processes = tiny.start(told, ranks=2)
            if kills == KILLS:
                assert tiny.finish(processes) == [0, 0]
                continue
            wait_for_moment(processes, folder.metrics, draw)
            if all(process.exitcode is None for process in processes):
                draw.choice(processes).kill()
                kills += 1
            codes = end_as_launched(processes)
            assert codes == [0, 0] or -signal.SIGKILL in codes, (seed, kills, codes)
        assert results(told) == undisturbed[2], (seed, kills)
        assert not list(folder.checkpoints.glob(".*")), (seed, kills)
    record_property("kills", kills)
    record_property("runs", runs)
    print(f"{kills} kills in {runs} runs")


def mount(*options: str) -> None:
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, whose size and mode the test can change."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64m", "osft-test", str(place))
    except FileNotFoundError:
        pytest.skip("a small disk needs the program mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def change(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def used_kib(folder: Path) -> int:
    done = subprocess.run(["du", "-sk", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def test_a_full_disk_loses_no_state_and_room_is_enough_to_go_on(
    base: Path, disk: Path, undisturbed: dict[int, dict[str, Any]]
) -> None:
    whole = RunFolder(base.parent / "undisturbed-2")
    state = used_kib(whole.complete_checkpoints()[-1])
    # The caches, the best model, and some five of the states that this run wants to keep.
    size = used_kib(whole.cache) + used_kib(whole.best_export) + 5 * state + 200
    change(disk, f"size={size}k")
    told = parameters(base, disk / "run", keep_checkpoints=99)
    assert tiny.finish(tiny.start(told, ranks=2)) == [75, 75]
    folder = RunFolder(disk / "run")
    kept = folder.complete_checkpoints()
    assert len(kept) >= 2
    assert not folder.is_complete(folder.final)
    assert not list(folder.checkpoints.glob(".*")), "the room is free for a restart"
    change(disk, "size=64m")
    tiny.complete(told, ranks=2)
    assert set(kept) < set(folder.complete_checkpoints())
    assert results(told) == undisturbed[2]


def at_step(step: int, action: Any, patch: pytest.MonkeyPatch) -> None:
    """Do something while the so-manieth step runs."""
    real, count = loop_module.backward, 0

    def counted(*told: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            action()
        return real(*told)

    patch.setattr(loop_module, "backward", counted)


def test_a_disk_that_becomes_read_only(
    base: Path,
    disk: Path,
    undisturbed: dict[int, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = parameters(base, disk / "run")
    # The metrics are open for writing, which keeps a file system from becoming read-only.
    frozen = disk / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        at_step(5, lambda: mount("--bind", "-o", "ro", str(frozen), str(frozen)), patch)
        with pytest.raises(OSError, match="Read-only file system"):
            tiny.run(told)
    subprocess.run(["umount", "--lazy", str(frozen)], check=True)
    kept = RunFolder(disk / "run").complete_checkpoints()
    assert len(kept) == 2
    assert tiny.run(told).steps == len(undisturbed[1]["rows"])
    assert results(told) == undisturbed[1]


def test_a_truncated_newest_state_gives_way_to_the_one_before(
    base: Path,
    tmp_path: Path,
    undisturbed: dict[int, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = parameters(base, tmp_path)
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        at_step(6, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            tiny.run(told)
    before, newest = folder.complete_checkpoints()
    rows = newest / "rank-00000.safetensors"
    os.truncate(rows, rows.stat().st_size // 2)
    caplog.set_level(logging.INFO)
    tiny.run(told)
    assert f"{newest.name} is damaged" in caplog.text
    assert f"resumed after step {folder.step_of(before)} from {before}" in caplog.text
    assert results(told) == undisturbed[1]


def interrupt() -> None:
    raise KeyboardInterrupt


def run_slowly(told: TrainingParameters, seconds: float) -> None:
    """Train as a rank whose steps take time."""
    real = loop_module.backward

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return real(*given)

    pytest.MonkeyPatch().setattr(loop_module, "backward", slow)
    tiny.run(told, threading.Event())


def test_of_two_runs_in_one_folder_the_later_one_has_it(
    base: Path, tmp_path: Path, undisturbed: dict[int, dict[str, Any]]
) -> None:
    told = parameters(base, tmp_path)
    folder = RunFolder(tmp_path)
    earlier = tiny.start_ranks(run_slowly, 2, [(told, 0.4)] * 2)
    deadline = time.monotonic() + 60
    while not folder.complete_checkpoints():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    later = tiny.start(told, ranks=2)
    assert tiny.finish(earlier) == [SUPERSEDED, SUPERSEDED]
    assert tiny.finish(later) == [0, 0]
    assert results(told) == undisturbed[2]


@pytest.mark.parametrize(
    ("fault", "code", "reason", "words"),
    [
        (rank_ends.not_a_number, 3, "Diverged", "the loss is nan at step 3"),
        (rank_ends.a_limit_of_memory, 75, "OutOfMemory", "the host has no memory left .*step 2"),
        (rank_ends.a_newer_attempt, 75, "TryAgain", "belongs to run tiny-run, attempt 2 now"),
    ],
)
def test_a_rank_says_in_one_object_what_it_ended_of(
    base: Path, tmp_path: Path, fault: Any, code: int, reason: str, words: str
) -> None:
    told = parameters(base, tmp_path / "run")
    end = rank_ends.end_of(told, tmp_path / "log", functools.partial(fault, tmp_path / "run"))
    assert end.code == code == end.words["exitCode"], end
    assert end.words["reason"] == reason
    assert re.search(words, end.words["message"]), end
    assert end.words["progress"]["step"] == 2
    assert RunFolder(tmp_path / "run").complete_checkpoints()


def test_a_rank_says_that_the_disk_is_full(
    base: Path, disk: Path, undisturbed: dict[int, dict[str, Any]]
) -> None:
    # No best model: its export would meet the full disk before the state does.
    told = parameters(base, disk / "run", save_best_val_loss=False)
    fault = functools.partial(rank_ends.a_full_disk, disk)
    end = rank_ends.end_of(told, disk.parent / "log", fault)
    assert (end.code, end.words["exitCode"]) == (75, 75), end
    assert "No space left on device; free or add space" in end.words["message"]
    (disk / "filler").unlink()
    tiny.run(told)
    assert results(told) == {k: v for k, v in undisturbed[1].items() if k != "best"}


def test_a_rank_says_that_the_folder_is_read_only(base: Path, disk: Path) -> None:
    change(disk, "ro")
    end = rank_ends.end_of(parameters(base, disk / "run"), disk.parent / "log")
    assert (end.code, end.words["reason"]) == (2, "BadInput"), end
    assert re.search(r"^ckpt_output_dir: user \d+.*Read-only file system", end.words["message"])
