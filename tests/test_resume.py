"""A run that is killed and started again ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from osft_trainer.config import TrainingParameters
from osft_trainer.report import RunFolder

KILLED = -9


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model", attention_dropout=0.1)


@pytest.fixture(scope="module")
def undisturbed(base: Path) -> list[dict[str, float]]:
    told = parameters(base, base.parent / "undisturbed")
    tiny.complete(told)
    found = tiny.rows(told)
    assert len(found) == 12
    return found


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    """Twelve steps in four epochs, a state every two, with dropout."""
    return tiny.training(
        base,
        base.parent / "data.jsonl",
        out,
        **{"num_epochs": 4, "checkpoint_every_steps": 2, **changes},
    )


def kill_at(told: TrainingParameters, lines: int, ranks: int = 1) -> None:
    """Kill all ranks as soon as so many steps are done, if they have not ended by then."""
    processes = tiny.start(told, ranks)
    metrics = RunFolder(Path(told.ckpt_output_dir)).metrics
    deadline = time.monotonic() + 60
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)
    for process in processes:
        process.kill()
    tiny.finish(processes)


def test_killed_at_random_steps_it_goes_on_bit_for_bit(
    base: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    told = parameters(base, tmp_path)
    seed = random.SystemRandom().randrange(2**32)
    first, second = sorted(random.Random(seed).sample(range(1, 11), 2))
    kill_at(told, first)
    kill_at(told, second)
    tiny.complete(told)
    assert tiny.rows(told) == undisturbed, f"killed after {first} and {second} steps"


def test_killed_at_the_end_of_an_epoch(
    base: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    told = parameters(base, tmp_path, checkpoint_every_steps=3, checkpoint_at_epoch=True)
    # The third forced write, the first of a state, falls on the end of epoch 1, behind its export.
    assert tiny.finish(tiny.start(told, die_at_sync=3)) == [KILLED]
    folder = RunFolder(tmp_path)
    assert folder.is_complete(folder.export_of_epoch(1))
    assert folder.complete_checkpoints() == []
    # COMPLETE of the state of epoch 1 is on disk, nothing of epoch 2 is.
    assert tiny.finish(tiny.start(told, die_at_sync=9)) == [KILLED]
    assert folder.complete_checkpoints()[-1] == folder.checkpoint(3)
    tiny.complete(told)
    assert tiny.rows(told) == undisturbed
    assert all(folder.is_complete(folder.export_of_epoch(epoch)) for epoch in (1, 2, 3, 4))


@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_inside_a_save(
    base: Path, tmp_path: Path, undisturbed: list[dict[str, float]], moment: int
) -> None:
    """A save forces seven things to disk: rows, their description, state.json, and so on."""
    told = parameters(base, tmp_path)
    saves = 2
    number = (saves - 1) * SYNCS + moment
    assert tiny.finish(tiny.start(told, die_at_sync=number)) == [KILLED]
    tiny.complete(told)
    assert tiny.rows(told) == undisturbed
    leftovers = [path.name for path in RunFolder(tmp_path).checkpoints.glob(".*")]
    assert leftovers == []


SYNCS = 7
"""Files and folders that one save of one rank forces to disk."""


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 3), (3, 2)])
def test_another_number_of_ranks_goes_on(
    base: Path,
    tmp_path: Path,
    before: int,
    after: int,
) -> None:
    """Without dropout: its random numbers belong to a rank."""
    model = tiny.model_folder(tmp_path / "model")
    whole = tiny.training(model, base.parent / "data.jsonl", tmp_path / "whole", num_epochs=3)
    tiny.complete(whole, before)
    told = tiny.training(
        model, base.parent / "data.jsonl", tmp_path / "out", num_epochs=3, checkpoint_every_steps=4
    )
    kill_at(told, 5, ranks=before)
    tiny.complete(told, after)
    expected = tiny.rows(whole)
    assert len(expected) == 9
    if before == after:
        assert tiny.rows(told) == expected
    for one, other in zip(tiny.rows(told), expected, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
