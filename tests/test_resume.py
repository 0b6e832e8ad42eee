"""A run that is killed and started again ends as if nothing had happened.

With OSFT_SOAK set a run with compiled blocks, too.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from drawn import SOAK
from osft_trainer.config import TrainingParameters
from osft_trainer.report import RunFolder

KILLED = -9

SYNCS = 7
"""Files and folders that one save of one rank forces to disk."""


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


@pytest.mark.skipif(not SOAK, reason="every process compiles for a minute")
def test_two_ranks_with_compiled_blocks_go_on_bit_for_bit(base: Path, tmp_path: Path) -> None:
    whole = parameters(base, tmp_path / "whole", num_epochs=2, torch_compile=True)
    tiny.complete(whole, ranks=2)
    told = parameters(base, tmp_path / "killed", num_epochs=2, torch_compile=True)
    kill_at(told, 3, ranks=2)
    tiny.complete(told, ranks=2)
    assert tiny.rows(told) == tiny.rows(whole)
    plain = parameters(base, tmp_path / "plain", num_epochs=2)
    tiny.complete(plain, ranks=2)
    losses = [[row["loss"] for row in tiny.rows(one)] for one in (told, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05), "dropout draws other numbers"


def test_killed_at_the_end_of_an_epoch(
    base: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    told = parameters(base, tmp_path, checkpoint_every_steps=3, checkpoint_at_epoch=True)
    # The first state falls on the end of epoch 1, behind its export.
    assert tiny.finish(tiny.start(told, die_at_sync=1)) == [KILLED]
    folder = RunFolder(tmp_path)
    assert folder.is_complete(folder.export_of_epoch(1))
    assert folder.complete_checkpoints() == []
    # COMPLETE of the state of epoch 1 is on disk, nothing of epoch 2 is.
    assert tiny.finish(tiny.start(told, die_at_sync=SYNCS)) == [KILLED]
    assert folder.complete_checkpoints()[-1] == folder.checkpoint(3)
    tiny.complete(told)
    assert tiny.rows(told) == undisturbed
    assert all(folder.is_complete(folder.export_of_epoch(epoch)) for epoch in (1, 2, 3, 4))


@pytest.mark.parametrize("moment", [1, 4, 5])
def test_killed_inside_a_save(
    base: Path, tmp_path: Path, undisturbed: list[dict[str, float]], moment: int
) -> None:
    """At the rows, before the rename, and between the rename and the marker."""
    told = parameters(base, tmp_path)
    assert tiny.finish(tiny.start(told, die_at_sync=SYNCS + moment)) == [KILLED]
    assert RunFolder(tmp_path).complete_checkpoints() == [RunFolder(tmp_path).checkpoint(2)]
    assert RunFolder(tmp_path).checkpoint(4).exists() == (moment == 5)
    tiny.complete(told)
    assert tiny.rows(told) == undisturbed
    leftovers = [path.name for path in RunFolder(tmp_path).checkpoints.glob(".*")]
    assert leftovers == []


def test_it_goes_on_with_another_number_of_ranks(base: Path, tmp_path: Path) -> None:
    """Without dropout: its random numbers belong to a rank."""
    model = tiny.model_folder(tmp_path / "model")

    def told(name: str) -> TrainingParameters:
        return tiny.training(
            model,
            base.parent / "data.jsonl",
            tmp_path / name,
            checkpoint_every_steps=3,
            max_tokens_per_gpu=128,
            # Square factors are 4 x 4 then: the third of three ranks holds no row of them.
            unfreeze_rank_ratio=0.12,
            other_parameters="norms",
        )

    tiny.complete(told("whole"), ranks=2)
    whole = tiny.rows(told("whole"))
    assert len(whole) == 6
    kill_at(told("2 to 2"), 4, ranks=2)
    kill_at(told("1 to 2"), 4, ranks=1)
    for name in ("2 to 1", "2 to 3"):
        shutil.copytree(tmp_path / "2 to 2", tmp_path / name)
    for name in ("2 to 2", "2 to 1", "2 to 3", "1 to 2"):
        tiny.complete(told(name), ranks=int(name[-1]))
        losses = [row["loss"] for row in tiny.rows(told(name))]
        assert losses == pytest.approx([row["loss"] for row in whole], abs=1e-4), name
    assert tiny.rows(told("2 to 2")) == whole
