"""Retention text that is learned again: which samples, in which step, and what comes of it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from osft_trainer.config import TrainingParameters
from osft_trainer.identity import data_digest, fingerprint
from osft_trainer.packing import GlobalBatch, batches
from osft_trainer.planning import make_report
from osft_trainer.prepared import PreparedData
from osft_trainer.replay import Replay
from osft_trainer.report import RunFolder
from packed_data import make_data, members


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    tiny.data_file(folder / "old.jsonl", conversations=60, letters="123456", task="0", seed=7)
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    old = {"retention_data_path": str(base.parent / "old.jsonl"), "replay_ratio": 0.5}
    return tiny.training(base, base.parent / "data.jsonl", out, **{**old, **changes})


def replay(folder: Path, samples: int, ratio: float) -> Replay:
    return Replay(make_data(folder, [3] * samples).whole(), ratio, seed=5)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1.0, 2.5])
def test_shares_add_up_however_the_samples_are_cut_into_steps(tmp_path: Path, ratio: float) -> None:
    ours = replay(tmp_path / "old", 7, ratio)
    whole = ours.between(0, 60)
    assert len(whole) == int(60 * ratio)
    steps = [ours.between(at, min(at + 8, 60)) for at in range(0, 60, 8)]
    assert np.concatenate(steps).tolist() == whole.tolist()


def test_every_sample_comes_once_before_any_comes_again(tmp_path: Path) -> None:
    dealt = replay(tmp_path / "old", 7, 1.0).between(0, 21)
    rounds = dealt.reshape(3, 7)
    assert all(sorted(turn) == list(range(7)) for turn in rounds.tolist())
    assert len({tuple(turn) for turn in rounds.tolist()}) == 3


def first_batches(data: PreparedData, ours: Replay | None, ranks: int) -> list[list[GlobalBatch]]:
    """Four steps of 8 samples, of every rank; the third ends the epoch."""
    return [
        list(
            islice(
                batches(
                    data, effective_batch_size=8, max_tokens_per_gpu=64, rank=rank,
                    world_size=ranks, seed=7, replay=ours,
                ),
                4,
            )
        )
        for rank in range(ranks)
    ]  # fmt: skip


def test_steps_and_epochs_stay_those_of_the_data(tmp_path: Path) -> None:
    data = make_data(tmp_path / "new", [5] * 20)
    # Both have the samples 0 to 6: told apart by how many of each there are.
    ours = replay(tmp_path / "old", 7, 0.5)
    alone = first_batches(data, None, 2)
    both = first_batches(data, ours, 2)
    steps = [zip(*ranks, strict=True) for ranks in (alone, both)]
    for one, two in zip(*steps, strict=True):
        before, after = one[0], two[0]
        assert (after.epoch, after.index, after.is_last) == (
            before.epoch, before.index, before.is_last,
        )  # fmt: skip
        assert (before.replayed, after.replayed) == (0, len(members(list(one))) // 2)
        assert after.samples == before.samples
        assert after.tokens == before.tokens + 3 * after.replayed
        assert after.loss_tokens == before.loss_tokens + 2 * after.replayed
        start = 20 * before.epoch + 8 * before.index
        again = ours.between(start, start + before.samples).tolist()
        added = Counter(members(list(two)))
        added.subtract(members(list(one)))
        assert sorted(added.elements()) == sorted(again)


def test_ranks_share_what_is_learned_again(base: Path, tmp_path: Path) -> None:
    alone = parameters(base, tmp_path / "1", split_by="activations")
    tiny.run(alone)
    several = parameters(base, tmp_path / "2", split_by="activations")
    tiny.complete(several, ranks=2)
    for one, two in zip(tiny.rows(alone), tiny.rows(several), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["replayedSamples"] == one["replayedSamples"] == one["samples"] // 2


def test_a_killed_run_goes_on_to_the_same_result(base: Path, tmp_path: Path) -> None:
    changes = {"retention_data_path": None, "retention_tokens": 400, "replay_ratio": 0.3}
    whole = parameters(base, tmp_path / "whole", **changes)
    result = tiny.run(whole)
    assert result.retention is not None
    cut = parameters(base, tmp_path / "cut", checkpoint_every_steps=2, **changes)
    (process,) = tiny.start(cut, die_at_sync=5)
    tiny.finish([process])
    assert process.exitcode == -9
    tiny.run(cut)
    assert tiny.rows(cut) == tiny.rows(whole)
    files = [next(RunFolder(tmp_path / n).final.glob("*.safetensors")) for n in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    plan = json.loads(RunFolder(tmp_path / "whole").plan.read_text())["retention"]
    assert plan["sampledFromModel"]


def test_more_of_the_old_is_kept(base: Path, tmp_path: Path) -> None:
    """Its loss falls, for it is learned too; without, it only suffers."""
    again = tiny.run(parameters(base, tmp_path / "again", num_epochs=4)).retention
    never = tiny.run(parameters(base, tmp_path / "never", num_epochs=4, replay_ratio=0)).retention
    assert again is not None
    assert never is not None
    assert again.loss_after is not None
    assert never.loss_after is not None
    assert again.loss_after < again.loss_before
    assert again.loss_after < never.loss_after - 0.05


def test_the_text_that_is_learned_counts_for_the_identity(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path)
    prints = {
        fingerprint(parameters(base, tmp_path, **changes), {"retention": text}).digest
        for changes in ({}, {"replay_ratio": 0.25}, {"retention_tokens": 50})
        for text in (data_digest(str(told.retention_data_path)), "another")
    }
    assert len(prints) == 6


@pytest.mark.parametrize("path", [True, False], ids=["a text", "own text"])
def test_a_plan_counts_the_passes_that_it_takes(base: Path, tmp_path: Path, path: bool) -> None:
    text = {} if path else {"retention_data_path": None}
    passes = [
        make_report(
            parameters(base, tmp_path, replay_ratio=ratio, **text),
            processes=1, device="cpu", energy=False,
        ).passes_per_step
        for ratio in (0.0, 4.0)
    ]  # fmt: skip
    assert passes[1] > 2 * passes[0]
