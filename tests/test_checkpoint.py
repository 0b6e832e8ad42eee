"""States on disk: whole or not at all, the newest intact one is taken, old ones go."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from osft_trainer import checkpoint
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.outcome import Superseded
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.saving import Saver

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def new_state(seed: int = 0, decomposition: str = "d") -> State:
    """Two parameters with AdamW's state after one step, and one that never had a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"wide": (3, 5), "tall": (7, 2), "unused": (2,)}
    trainables = {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }
    optimizer = torch.optim.AdamW(trainables.values(), lr=0.1)
    for name in ("wide", "tall"):
        trainables[name].grad = torch.randn(shapes[name], generator=generator)
    optimizer.step()
    return State(trainables, optimizer, decomposition)


def states_of(root: Path, keep: int = 2, attempt: int = 1) -> Checkpoints:
    return Checkpoints(RunFolder(root), ALONE, attempt, keep, lambda: None, token="t")


def save(states: Checkpoints, state: State, position: Position) -> Path:
    """As the loop does at the end of a run."""
    Saver(states, tiny.training(Path("m"), Path("d"), Path("o")), 0).finish_with(state, position)
    return states.folder.checkpoint(position.step)


def assert_equal(one: State, other: State) -> None:
    for name in one.trainables:
        first, second = one.trainables[name], other.trainables[name]
        assert torch.equal(first, second)
        here, there = one.optimizer.state.get(first, {}), other.optimizer.state.get(second, {})
        assert set(here) == set(there)
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved, loaded = new_state(1), new_state(2)
    position = Position(step=12, epoch=3, batch=2, loss_tokens=99, loss=0.1 + 0.2)
    path = save(states_of(tmp_path), saved, position)
    assert path == RunFolder(tmp_path).checkpoint(12)
    assert states_of(tmp_path).load(loaded) == position
    assert_equal(saved, loaded)
    assert "step" not in loaded.optimizer.state.get(loaded.trainables["unused"], {})


def test_nothing_saved_gives_nothing(tmp_path: Path) -> None:
    assert states_of(tmp_path).load(new_state()) is None


def test_old_states_go_and_the_newest_stays(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        save(states_of(tmp_path, keep=2), new_state(step), Position(step=step))
    assert sorted(path.name for path in RunFolder(tmp_path).checkpoints.iterdir()) == [
        "step-00000009",
        "step-00000012",
    ]


DAMAGES = {
    "truncated": lambda path: cut(path / "rank-00000.safetensors"),
    "changed": lambda path: flip(path / "rank-00000.safetensors"),
    "missing": lambda path: (path / "rank-00000.safetensors").unlink(),
    "description truncated": lambda path: cut(path / "rank-00000.json"),
    "state truncated": lambda path: cut(path / "state.json"),
    "state empty": lambda path: (path / "state.json").write_text("{}"),
}


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    """Change one bit of the last tensor: size and header stay as they were."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    states = states_of(tmp_path, keep=1)
    save(states_of(tmp_path, keep=2), new_state(1), Position(step=1))
    save(states_of(tmp_path, keep=2), new_state(2), Position(step=2))
    DAMAGES[damage](RunFolder(tmp_path).checkpoint(2))
    loaded = new_state(3)
    assert states.load(loaded) == Position(step=1)
    assert_equal(loaded, new_state(1))
    assert "step-00000002 is damaged" in caplog.text
    # It does not count as the newest when old ones are removed.
    save(states, loaded, Position(step=2))
    assert RunFolder(tmp_path).complete_checkpoints() == [RunFolder(tmp_path).checkpoint(2)]
    assert states.load(new_state(4)) == Position(step=2)


@pytest.mark.parametrize("name", ["state.json", "rank-00000.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_state_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    states = states_of(tmp_path)
    for step in (1, 2):
        save(states, new_state(step), Position(step=step))
    opened = io.open

    def fail(path: Path, *args: Any, **told: Any) -> Any:
        if path.name == name and path.parent.name == "step-00000002":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **told)

    with monkeypatch.context() as patch:
        # What a server that is away does to Path.open and Path.read_text.
        patch.setattr(io, "open", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            states.load(new_state(3))
    assert states.load(new_state(3)) == Position(step=2)


def test_a_state_of_another_format_is_refused_and_stays(tmp_path: Path) -> None:
    states = states_of(tmp_path)
    save(states, new_state(1), Position(step=1))
    path = save(states, new_state(2), Position(step=2))
    meta = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**meta, "format": checkpoint.FORMAT + 1}))
    with pytest.raises(
        ValueError, match=r"step-00000002 is of format 3, and this .* reads formats 1 and 2"
    ):
        states.load(new_state(3))
    assert path.is_dir()


def test_without_marker_it_does_not_count_and_gives_way(tmp_path: Path) -> None:
    states = states_of(tmp_path)
    (save(states, new_state(1), Position(step=1)) / "COMPLETE").unlink()
    assert states.load(new_state(2)) is None
    save(states, new_state(3), Position(step=1))
    loaded = new_state(4)
    assert states.load(loaded) == Position(step=1)
    assert_equal(loaded, new_state(3))


def test_a_newer_attempt_is_not_overwritten(tmp_path: Path) -> None:
    def refuse() -> None:
        raise Superseded("attempt 2 owns the folder")

    states = Checkpoints(RunFolder(tmp_path), ALONE, 1, 2, refuse, token="t")
    with pytest.raises(Superseded):
        save(states, new_state(), Position(step=1))
    assert RunFolder(tmp_path).complete_checkpoints() == []


def test_half_removed_states_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while an old state is removed leaves nothing that looks complete."""
    states = states_of(tmp_path, keep=1)
    save(states, new_state(1), Position(step=1))

    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            save(states, new_state(2), Position(step=2))
    assert RunFolder(tmp_path).complete_checkpoints() == [RunFolder(tmp_path).checkpoint(2)]
    assert states.load(new_state(3)) == Position(step=2)
    assert len(list(RunFolder(tmp_path).checkpoints.iterdir())) == 1


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            new_state(decomposition="e"),
            r"another decomposition .*retention_data_path.*compute_dtype",
        ),
        (State({"wide": nn.Parameter(torch.ones(3, 4))}, new_state().optimizer, "d"), "tall"),
    ],
)
def test_a_foreign_state_is_refused(tmp_path: Path, other: State, words: str) -> None:
    save(states_of(tmp_path), new_state(), Position(step=1))
    with pytest.raises(ValueError, match=words) as error:
        states_of(tmp_path).load(other)
    assert "another ckpt_output_dir or run_id" in str(error.value)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save(states_of(tmp_path), new_state(), Position(step=1))
    assert sorted(file.name for file in path.iterdir()) == [
        "COMPLETE",
        "rank-00000.json",
        "rank-00000.safetensors",
        "state.json",
    ]
