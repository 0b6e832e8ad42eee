"""What is held back, when it is measured, and which model is kept as the best."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from osft_trainer import loop as loop_module
from osft_trainer import validation as validation_module
from osft_trainer.config import TrainingParameters
from osft_trainer.data import prepare
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedData
from osft_trainer.report import Progress, RunFolder, read_document
from osft_trainer.validation import split_off

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    tiny.data_file(folder / "other.jsonl", conversations=7, seed=1)
    return tiny.model_folder(folder / "model", attention_dropout=0.1)


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, **changes)


def prepared_of(folder: Path, conversations: int, seed: int = 0) -> PreparedData:
    folder.mkdir(exist_ok=True)
    return prepare(
        tiny.data_file(folder / "data.jsonl", conversations, seed),
        tiny.tokenizer(),
        max_seq_len=64,
        on_overlong="error",
        cache_root=folder,
    )


def samples(data: PreparedData) -> set[tuple[int, ...]]:
    return {tuple(data.sample(i)[0].tolist()) for i in range(len(data))}


def test_a_split_takes_its_share_and_nothing_is_on_both_sides(tmp_path: Path) -> None:
    whole = prepared_of(tmp_path, 2000)
    train, held = split_off(whole, 0.2)
    assert len(train) + len(held) == len(whole)
    assert len(held) / len(whole) == pytest.approx(0.2, abs=0.04)
    assert not samples(train) & samples(held)
    assert samples(train) | samples(held) == samples(whole)
    for part in (train, held):
        assert part.counts.samples == len(part)
        assert part.counts.loss_tokens == int(part.loss_counts.sum())
        ids, labels = part.sample(0)
        assert (len(ids), int((labels != -100).sum())) == (part.lengths[0], part.loss_counts[0])
    assert len({whole.digest, train.digest, held.digest}) == 3


def test_a_sample_stays_on_its_side_when_others_are_added(tmp_path: Path) -> None:
    """The longer file begins with the shorter one's lines."""
    _, few = split_off(prepared_of(tmp_path / "few", 50), 0.2)
    train, many = split_off(prepared_of(tmp_path / "many", 100), 0.2)
    assert samples(few) <= samples(many)
    assert not samples(few) & samples(train)


@pytest.mark.parametrize(("share", "words"), [(0.001, "to validate on"), (0.999, "to train on")])
def test_an_empty_side_is_refused(tmp_path: Path, share: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"validation_split {share} of 4 samples.*{words}"):
        split_off(prepared_of(tmp_path, 4), share)


def losses(told: TrainingParameters) -> dict[int, float]:
    return {int(r["step"]): r["validationLoss"] for r in tiny.rows(told) if "validationLoss" in r}


def test_it_is_measured_when_told_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    plain = parameters(base, tmp_path / "plain")
    tiny.run(plain)
    told = parameters(
        base, tmp_path / "measured", validation_data_path=str(base.parent / "other.jsonl"),
        validation_frequency=2, validate_at_epoch=True,
    )  # fmt: skip
    result = tiny.run(told)
    found = losses(told)
    assert list(found) == [2, 3, 4, 6]
    assert result.validation_loss == found[6]
    assert result.best_validation_loss == min(found.values())
    without = [{k: v for k, v in row.items() if k != "validationLoss"} for row in tiny.rows(told)]
    assert without == tiny.rows(plain)
    progress = read_document(RunFolder(tmp_path / "measured").progress, Progress)
    assert progress is not None
    shown = {metric.name: float(metric.value) for metric in progress.metrics}
    assert shown["validationLoss"] == pytest.approx(found[6], rel=1e-5)
    assert shown["bestValidationLoss"] == pytest.approx(min(found.values()), rel=1e-5)
    plan = json.loads(RunFolder(tmp_path / "measured").plan.read_text())
    assert plan["validation"]["samples"] == 7
    again = tiny.run(told)
    assert (again.validation_loss, again.best_validation_loss) == (
        result.validation_loss,
        result.best_validation_loss,
    )


def test_held_back_samples_are_not_trained_on(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, validation_split=0.3, validate_at_final=True)
    tiny.run(told)
    plan = json.loads(RunFolder(tmp_path).plan.read_text())
    assert plan["data"]["samples"] + plan["validation"]["samples"] == 22
    rows = tiny.rows(told)
    in_epoch = [row["samples"] for row in rows if row["epoch"] <= 1]
    assert sum(in_epoch) == plan["data"]["samples"]
    assert list(losses(told)) == [rows[-1]["step"]]


def test_bad_validation_data_is_named_as_such(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    for path in (tmp_path / "bad.jsonl", tmp_path / "gone.jsonl"):
        told = parameters(base, tmp_path, validation_data_path=str(path))
        with pytest.raises(ValueError, match=f"(?s)^validation_data_path.*{path.name}"):
            tiny.run(told)


def scripted(monkeypatch: pytest.MonkeyPatch, found: list[float]) -> None:
    """Validation losses as the test wants them."""
    script = iter(found)
    monkeypatch.setattr(validation_module, "mean_loss", lambda *_, **__: next(script))


def best_step(folder: RunFolder) -> int | None:
    path = folder.best_export / "osft.json"
    return int(json.loads(path.read_text())["steps"]) if path.is_file() else None


def test_the_best_is_the_one_that_falls_by_more_than_the_threshold(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [5.0, 4.95, math.nan, 4.0, 4.5, 3.95])
    told = parameters(
        base, tmp_path, validation_split=0.3, validation_frequency=1, save_best_val_loss=True,
        val_loss_improvement_threshold=0.1, training_mode="step", max_steps=6,
    )  # fmt: skip
    result = tiny.run(told)
    assert best_step(RunFolder(tmp_path)) == 4
    assert RunFolder.is_complete(RunFolder(tmp_path).best_export)
    assert (result.validation_loss, result.best_validation_loss) == (3.95, 4.0)
    assert list(losses(told)) == [1, 2, 4, 5, 6]


def test_without_being_asked_no_best_is_written(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, validation_split=0.3, validation_frequency=1)
    result = tiny.run(told)
    assert result.best_validation_loss == min(losses(told).values())
    assert not RunFolder(tmp_path).best_export.exists()


def test_the_best_survives_a_resume(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the best was written, before and after a state knows of it."""
    changes: dict[str, Any] = {
        "validation_split": 0.3, "validation_frequency": 1, "save_best_val_loss": True,
        "training_mode": "step", "max_steps": 6, "checkpoint_every_steps": 2,
    }  # fmt: skip
    whole = parameters(base, tmp_path / "whole", **changes)
    expected = tiny.run(whole)
    told = parameters(base, tmp_path / "killed", **changes)
    folder, real, count = RunFolder(tmp_path / "killed"), loop_module.backward, 0

    def crash_at(step: int) -> None:
        nonlocal count
        count = 0

        def counted(*given: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(loop_module, "backward", counted)
            with pytest.raises(KeyboardInterrupt):
                tiny.run(told)

    crash_at(4)
    assert [folder.step_of(path) for path in folder.complete_checkpoints()] == [2]
    crash_at(2)
    result = tiny.run(told)
    assert (result.validation_loss, result.best_validation_loss) == (
        expected.validation_loss,
        expected.best_validation_loss,
    )
    assert tiny.rows(told) == tiny.rows(whole)
    assert best_step(folder) == best_step(RunFolder(tmp_path / "whole"))
    ours, theirs = (
        load_file(RunFolder(tmp_path / name).best_export / "model.safetensors")
        for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_best_of_other_data_does_not_count(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parameters(
        base, tmp_path, validation_data_path=str(base.parent / "other.jsonl"),
        validation_frequency=1, save_final_checkpoint=False, training_mode="step", max_steps=6,
        checkpoint_every_steps=3,
    )  # fmt: skip
    scripted(monkeypatch, [1.0] * 6)
    assert tiny.run(first).best_validation_loss == 1.0
    for path in RunFolder(tmp_path).complete_checkpoints()[1:]:
        (path / "COMPLETE").unlink()
    tiny.data_file(tmp_path / "third.jsonl", 5, seed=3)
    scripted(monkeypatch, [3.0, 2.0, 4.0])
    second = first.model_copy(update={"validation_data_path": str(tmp_path / "third.jsonl")})
    assert tiny.run(second).best_validation_loss == 2.0


def test_ranks_agree_on_the_loss_and_the_best(base: Path, tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path / "model")
    changes: dict[str, Any] = {
        "validation_split": 0.3, "validation_frequency": 1, "save_best_val_loss": True,
        "max_tokens_per_gpu": 128,
    }  # fmt: skip
    data = base.parent / "data.jsonl"
    alone = tiny.training(model, data, tmp_path / "alone", **changes)
    together = tiny.training(model, data, tmp_path / "together", **changes)
    tiny.run(alone)
    tiny.complete(together, ranks=2)
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert best_step(RunFolder(tmp_path / "together")) == best_step(RunFolder(tmp_path / "alone"))
