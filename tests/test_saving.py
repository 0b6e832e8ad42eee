"""Saving beside the training: what is copied, when it counts, and how a failure is told."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from osft_trainer import loop as loop_module
from osft_trainer import saving
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.outcome import Superseded
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.saving import Saver
from osft_trainer.shards import HostCopy, write_tensors
from test_checkpoint import assert_equal, new_state

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def saver_of(root: Path, rank: int = 0, **changes: Any) -> Saver:
    """A saver and, in `saver.told`, the steps that it has reported."""
    world = World(rank=rank, local_rank=rank, size=1, device=torch.device("cpu"))
    states = Checkpoints(RunFolder(root), world, 1, 2, lambda: None, token="t")
    clock = changes.pop("clock", time.monotonic)
    training = tiny.training(Path("m"), Path("d"), root, **changes)
    told: list[int] = []
    saver = Saver(
        states, training, 0, on_saved=lambda position, path: told.append(position.step), clock=clock
    )
    saver.told = told  # type: ignore[attr-defined]
    return saver


def until_written(saver: Saver) -> None:
    end = time.monotonic() + 30
    while saver.is_writing:
        assert time.monotonic() < end
        time.sleep(0.001)


def load(root: Path) -> tuple[State, Position | None]:
    state = new_state(99)
    states = Checkpoints(RunFolder(root), ALONE, 1, 2, lambda: None, token="t")
    return state, states.load(state)


def test_it_saves_what_was_there_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is as slow as the test wants; the steps go on."""
    go = threading.Event()
    real = saving.write_rows
    monkeypatch.setattr(saving, "write_rows", lambda *told: go.wait(30) and real(*told))
    saver, state = saver_of(tmp_path), new_state(1)
    saver.begin(state, Position(step=4))
    for parameter in state.trainables.values():
        parameter.data.zero_()
    for moments in state.optimizer.state.values():
        moments["exp_avg"].zero_()
    assert saver.is_writing
    saver.advance(writing=True, failed=False)
    assert RunFolder(tmp_path).complete_checkpoints() == []
    go.set()
    until_written(saver)
    saver.advance(writing=False, failed=False)
    until_written(saver)
    assert saver.told == []
    saver.advance(writing=False, failed=False)
    assert saver.told == [4]
    loaded, position = load(tmp_path)
    assert position == Position(step=4)
    assert_equal(loaded, new_state(1))


def test_one_is_in_flight_at_most(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    for step in (1, 2, 3):
        saver.begin(new_state(step), Position(step=step))
        assert saver.told == list(range(1, step))
    saver.finish()
    saver.finish()
    assert saver.told == [1, 2, 3]
    loaded, position = load(tmp_path)
    assert position == Position(step=3)
    assert_equal(loaded, new_state(3))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left.*add space.*lower keep_checkpoints",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only.*must be writable"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
)
@pytest.mark.parametrize("half", ["write_rows", "publish"])
def test_a_failure_surfaces_at_the_next_step_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str, half: str
) -> None:
    def fail(*told: Any) -> None:
        raise failure

    saver = saver_of(tmp_path)
    saver.begin(new_state(1), Position(step=1))
    saver.finish()
    owner, name = (saving, half) if half == "write_rows" else (Checkpoints, half)
    monkeypatch.setattr(owner, name, fail)
    saver.begin(new_state(2), Position(step=2))
    until_written(saver)
    if half == "publish":
        saver.advance(writing=False, failed=saver.has_failed)
        until_written(saver)
    assert saver.has_failed
    with pytest.raises(OSError, match=f"step-00000002.*{words}"):
        saver.advance(writing=False, failed=True)
    assert not saver.has_failed
    assert [path.name for path in RunFolder(tmp_path).checkpoints.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "a later step"])
def test_the_last_state_is_tried_whatever_became_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    saver = saver_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_rows", no_space)
        saver.begin(new_state(2), Position(step=2))
        until_written(saver)
    assert saver.has_failed
    saver.finish_with(new_state(step), Position(step=step))
    assert saver.told == [step]
    assert "step-00000002.t.partial: No space left on device" in caplog.text
    loaded, position = load(tmp_path)
    assert position == Position(step=step)
    assert_equal(loaded, new_state(step))


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_next_owner_is_told_apart_from_a_failure(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)

    def refuse() -> None:
        raise Superseded("attempt 2 owns the folder")

    object.__setattr__(saver._checkpoints, "check_owner", refuse)
    with pytest.raises(Superseded):
        saver.finish_with(new_state(1), Position(step=1))
    assert list(RunFolder(tmp_path).checkpoints.iterdir()) == []


def test_what_a_state_stands_on_is_durable_before_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    seen: list[list[Path]] = []
    saver = saver_of(tmp_path)
    saver._before_publish = lambda: seen.append(folder.complete_checkpoints())
    saver.finish_with(new_state(1), Position(step=1))
    assert seen == [[]]


def test_time_is_measured_by_the_first_rank_from_the_last_save(tmp_path: Path) -> None:
    now = 0.0
    told: dict[str, Any] = {"checkpoint_every_minutes": 2.0, "clock": lambda: now}
    saver, other = saver_of(tmp_path, **told), saver_of(tmp_path / "other", rank=1, **told)
    now = 119.0
    assert not saver.is_due_now(5)
    now = 120.0
    assert saver.is_due_now(5)
    assert not other.is_due_now(5)
    saver.finish_with(new_state(1), Position(step=5))
    assert not saver.is_due_now(6)
    now = 240.0
    assert saver.is_due_now(6)
    assert not saver.is_due_now(5), "it is saved"
    assert not saver_of(tmp_path / "none", clock=lambda: now).is_due_now(6)


def test_a_disk_slower_than_the_clock_does_not_hold_up_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, go, real = 0.0, threading.Event(), saving.write_rows
    saver = saver_of(tmp_path, checkpoint_every_minutes=2.0, clock=lambda: now)
    monkeypatch.setattr(saving, "write_rows", lambda *told: go.wait(30) and real(*told))
    saver.begin(new_state(1), Position(step=1))
    now = 500.0
    assert not saver.is_due_now(2)
    go.set()
    saver.finish()
    assert saver.is_due_now(2)


def test_the_copy_is_taken_into_the_same_memory_again() -> None:
    copies, state = HostCopy(), new_state(1)
    first = copies.take(state.trainables, state.optimizer)
    places = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    state = new_state(2)
    second = copies.take(state.trainables, state.optimizer)
    assert {name: tensor.data_ptr() for name, tensor in second.tensors.items()} == places
    for name, parameter in state.trainables.items():
        assert torch.equal(second.tensors[f"value/{name}"], parameter)


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "no rows": torch.empty(0, 7),
        "ä": torch.randn(2, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
    }
    sha256 = write_tensors(tmp_path / "f", tensors)
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(sha256) == 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def test_steps_go_on_while_the_disk_is_busy(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of step 2 is written only when step 4 has begun."""
    fourth = threading.Event()
    count = 0
    backward, write_rows = loop_module.backward, saving.write_rows

    def counted(*told: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            fourth.set()
        return backward(*told)

    def write(folder: Path, *told: Any) -> None:
        assert "00000002" not in folder.name or fourth.wait(30)
        write_rows(folder, *told)

    monkeypatch.setattr(loop_module, "backward", counted)
    monkeypatch.setattr(saving, "write_rows", write)
    told = tiny.training(base, base.parent / "data.jsonl", tmp_path, checkpoint_every_steps=2)
    tiny.run(told)
    folder = RunFolder(tmp_path)
    assert folder.complete_checkpoints() == [folder.checkpoint(4), folder.checkpoint(6)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_saves_also_after_a_save_that_failed(base: Path, tmp_path: Path, ranks: int) -> None:
    told = tiny.training(base, base.parent / "data.jsonl", tmp_path, checkpoint_every_steps=2)
    processes = tiny.start_ranks(stopped_after_a_failure, ranks, [(told,)] * ranks)
    assert tiny.finish(processes) == [143] * ranks
    assert RunFolder(tmp_path).complete_checkpoints() == [RunFolder(tmp_path).checkpoint(3)]


def stopped_after_a_failure(told: TrainingParameters) -> None:
    """While step 3 runs, it shows that the state of step 2 cannot be written, and a stop comes."""
    stop, third, failed = (threading.Event() for _ in range(3))
    backward, write_rows = loop_module.backward, saving.write_rows
    count = 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            third.set()
            assert failed.wait(30)
            stop.set()
        return backward(*given)

    def write(folder: Path, *given: Any) -> None:
        if "00000002" in folder.name:
            assert third.wait(30)
            failed.set()
            no_space()
        write_rows(folder, *given)

    patch = pytest.MonkeyPatch()
    patch.setattr(loop_module, "backward", counted)
    patch.setattr(saving, "write_rows", write)
    tiny.run(told, stop)


def test_ranks_save_together_by_the_clock(base: Path, tmp_path: Path) -> None:
    told = tiny.training(
        base, base.parent / "data.jsonl", tmp_path, checkpoint_every_minutes=1e-9,
        keep_checkpoints=99,
    )  # fmt: skip
    tiny.complete(told, ranks=2)
    folder = RunFolder(tmp_path)
    saved = folder.complete_checkpoints()
    # at once, at the end, and between them whenever the one before was on disk
    assert saved[0] == folder.checkpoint(1)
    assert saved[-1] == folder.checkpoint(6)
    assert saved == sorted(folder.checkpoints.iterdir()), "some rank did not save with the others"
