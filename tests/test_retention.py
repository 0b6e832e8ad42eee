"""Runs with text of the old skills: split by it, measured on it, told to everybody."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import tiny
from osft_trainer import train as train_module
from osft_trainer.config import TrainingParameters
from osft_trainer.identity import contents_of, fingerprint
from osft_trainer.last_words import Result
from osft_trainer.model import load_model, load_tokenizer
from osft_trainer.report import Progress, Retention, RunFolder, read_document
from osft_trainer.self_sampling import sample_conversations
from osft_trainer.server import metrics_text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    tiny.data_file(folder / "old.jsonl", conversations=60, seed=7)
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    old = {"retention_data_path": str(base.parent / "old.jsonl")}
    return tiny.training(base, base.parent / "data.jsonl", out, **{**old, **changes})


def test_loss_on_the_old_text_is_measured_before_and_after(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path)
    result = tiny.run(told)
    kept = result.retention
    assert kept is not None
    assert kept.loss_after is not None
    # Both data sets are of one kind: what is learned helps here, too.
    assert kept.loss_after < kept.loss_before - 0.05
    folder = RunFolder(tmp_path)
    facts = json.loads((folder.final / "osft.json").read_text())
    assert facts["retention"] == kept.model_dump(by_alias=True)
    progress = read_document(folder.progress, Progress)
    assert progress is not None
    assert progress.retention == kept
    plan = json.loads(folder.plan.read_text())["retention"]
    assert not plan["sampledFromModel"]
    assert plan["usedShare"] == {}
    again = tiny.run(told)
    assert again.already_finished
    assert again.retention == kept


def test_measuring_does_not_change_the_training(base: Path, tmp_path: Path) -> None:
    with_text = parameters(base, tmp_path / "with")
    without = parameters(base, tmp_path / "without", retention_data_path=None)
    assert tiny.run(without).retention is None
    tiny.run(with_text)
    assert tiny.rows(with_text) == tiny.rows(without)


def test_a_split_by_activations_trains_and_keeps_more(base: Path, tmp_path: Path) -> None:
    """The update leaves the inputs of the old text alone, so its loss moves less."""
    # Another alphabet: what is old and what is new are told apart by the tokens.
    old = tiny.data_file(tmp_path / "old.jsonl", conversations=60, letters="123456", task="0")
    changes = {"retention_data_path": str(old), "num_epochs": 4}
    told = parameters(base, tmp_path / "activations", split_by="activations", **changes)
    result = tiny.run(told)
    rows = tiny.rows(told)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert result.leak is not None
    assert result.leak < 1e-5
    by_weights = tiny.run(parameters(base, tmp_path / "weights", **changes))
    print(result.retention, by_weights.retention, rows[0]["loss"], rows[-1]["loss"])
    assert abs(_change(result.retention)) < abs(_change(by_weights.retention)) / 2
    shares = json.loads(RunFolder(tmp_path / "activations").plan.read_text())["retention"]
    assert len(shares["usedShare"]) == 14
    assert 0 < max(shares["usedShare"].values()) < 0.2


def _change(kept: Retention | None) -> float:
    assert kept is not None
    assert kept.change is not None
    return kept.change


def test_ranks_read_the_same_directions_and_give_the_losses_of_one(
    base: Path, tmp_path: Path
) -> None:
    changes = {"split_by": "activations", "max_tokens_per_gpu": 128}
    alone = parameters(base, tmp_path / "1", **changes)
    tiny.run(alone)
    together = parameters(base, tmp_path / "2", **changes)
    tiny.complete(together, ranks=2)
    for one, several in zip(tiny.rows(alone), tiny.rows(together), strict=True):
        assert several["loss"] == pytest.approx(one["loss"], abs=1e-4)
    files = [sorted((tmp_path / n).glob("cache/decomposition/*/*.safetensors")) for n in "12"]
    assert len(files[0]) == 14
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_a_stopped_run_goes_on_in_the_same_directions(base: Path, tmp_path: Path) -> None:
    changes = {"split_by": "activations", "retention_data_path": None, "retention_tokens": 400}
    whole = parameters(base, tmp_path / "whole", **changes)
    tiny.run(whole)
    cut = parameters(base, tmp_path / "cut", checkpoint_every_steps=2, **changes)
    (process,) = tiny.start(cut, die_at_sync=5)
    tiny.finish([process])
    assert process.exitcode == -9
    assert not RunFolder(tmp_path / "cut").final.exists()
    result = tiny.run(cut)
    assert tiny.rows(cut) == tiny.rows(whole)
    assert result.retention is not None
    plan = json.loads(RunFolder(tmp_path / "cut").plan.read_text())["retention"]
    assert plan["sampledFromModel"]
    assert plan["tokensRead"] > 200


def test_what_the_model_writes_fits_and_repeats(base: Path) -> None:
    hf = load_model(base, torch.float32)
    tokenizer = load_tokenizer(base)
    state = torch.random.get_rng_state()
    told = {"tokens": 500, "max_seq_len": 40, "seed": 3}
    first = sample_conversations(hf, tokenizer, **told)
    assert torch.equal(state, torch.random.get_rng_state())
    assert hf.training
    assert first == sample_conversations(hf, tokenizer, **told)
    lengths = [
        len(tokenizer(tokenizer.apply_chat_template(c["messages"], tokenize=False))["input_ids"])
        for c in first
    ]
    assert 500 <= sum(lengths) < 500 + 64 * 50
    assert [m["role"] for m in first[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("changes", [{"parameterization": "core"}, {"other_parameters": "norms"}])
def test_what_activations_cannot_do_is_refused_by_name(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        parameters(base, tmp_path, split_by="activations", **changes)


def test_adaptive_ranks_follow_the_text(base: Path, tmp_path: Path) -> None:
    # Large weights: blocks that change their input little would all matter alike.
    model = tiny.model_folder(tmp_path / "model", initializer_range=0.3)
    old = str(base.parent / "old.jsonl")
    told = tiny.training(
        model, base.parent / "data.jsonl", tmp_path / "out", num_epochs=1,
        rank_allocation="adaptive", retention_data_path=old,
    )  # fmt: skip
    tiny.run(told)
    plan = json.loads(RunFolder(tmp_path / "out").plan.read_text())
    ranks = {t["module"]: t["free_rank"] for t in plan["targets"]}
    first, last = (ranks[f"model.layers.{n}.self_attn.q_proj"] for n in (0, 1))
    assert first != last
    assert first + last == pytest.approx(2 * 16, abs=1)


def test_too_little_or_missing_text_is_refused(base: Path, tmp_path: Path) -> None:
    few = tiny.data_file(tmp_path / "few.jsonl", conversations=9)
    with pytest.raises(ValueError, match=r"retention_data_path.*9 samples.*10 are needed"):
        tiny.run(parameters(base, tmp_path / "a", retention_data_path=str(few)))
    with pytest.raises(ValueError, match=r"^retention_data_path .*does not exist"):
        tiny.run(parameters(base, tmp_path / "b", retention_data_path="/nowhere.jsonl"))


def test_the_text_is_part_of_the_identity_where_it_decides_the_split(
    base: Path, tmp_path: Path
) -> None:
    told = parameters(base, tmp_path, split_by="activations")
    one = fingerprint(told, contents_of(told, "model"))
    elsewhere = told.model_copy(update={"retention_data_path": str(base.parent / "data.jsonl")})
    other = fingerprint(told, contents_of(elsewhere, "model"))
    assert one.digest != other.digest
    moved = told.model_copy(update={"retention_data_path": "/elsewhere"})
    assert fingerprint(moved, contents_of(told, "model")).digest == one.digest


def test_prometheus_sees_both_losses() -> None:
    kept = Retention(loss_before=1.25, loss_after=1.5)
    text = metrics_text(Progress(run_id="r", retention=kept))
    assert 'osft_training_retention_loss{model="base"} 1.25' in text
    assert 'osft_training_retention_loss{model="trained"} 1.5' in text
    assert kept.change == 0.25


def test_a_text_that_is_only_measured_on_changes_no_identity(base: Path, tmp_path: Path) -> None:
    one = fingerprint(parameters(base, tmp_path, retention_tokens=50), {})
    other = fingerprint(parameters(base, tmp_path, retention_tokens=60), {})
    assert one.digest == other.digest
    changes = {"split_by": "activations", "retention_tokens": 50}
    read = fingerprint(parameters(base, tmp_path, **changes), {})
    assert read.digest != one.digest


def test_another_model_in_the_same_folder_writes_a_text_of_its_own(
    base: Path, tmp_path: Path
) -> None:
    changes = {"split_by": "activations", "retention_data_path": None, "retention_tokens": 300}
    tiny.run(parameters(base, tmp_path, num_epochs=1, **changes))
    shutil.move(tmp_path / "OWNER", tmp_path / "old-owner")
    for name in ("final", "checkpoints"):
        shutil.rmtree(tmp_path / name)
    other = tiny.model_folder(tmp_path / "model", seed=5)
    data = base.parent / "data.jsonl"
    tiny.run(tiny.training(other, data, tmp_path, num_epochs=1, **changes))
    texts = list((tmp_path / "cache" / "retention").glob("sampled-*.jsonl"))
    assert len({path.read_text() for path in texts}) == 2


def documents(path: Path, bad_lines: int = 0) -> Path:
    lines = [json.dumps({"text": f"once upon {n} there was " * 4}) for n in range(40)]
    path.write_text("\n".join([*lines, *["no json"] * bad_lines]) + "\n")
    return path


def test_given_text_has_the_form_of_the_training_data(base: Path, tmp_path: Path) -> None:
    """And its bad rows are treated alike."""
    data = documents(tmp_path / "new.jsonl")
    old = documents(tmp_path / "old.jsonl", bad_lines=2)
    told = tiny.training(
        base, data, tmp_path / "out", num_epochs=1, is_pretraining=True, block_size=48,
        retention_data_path=str(old),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^retention_data_path: 2 problems"):
        tiny.run(told)
    result = tiny.run(told.model_copy(update={"on_bad_sample": "skip"}))
    assert result.retention is not None


def strict(text: str) -> Any:
    """JSON as everybody else reads it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("found", [[math.nan, 1.0], [1.5, math.inf]], ids=["before", "after"])
def test_a_loss_that_is_no_number_is_left_out_everywhere(
    base: Path, tmp_path: Path, found: list[float], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The training goes by its own losses, and ends as ever."""
    script = iter(found)
    monkeypatch.setattr(train_module, "mean_loss", lambda *_, **__: next(script))
    told = parameters(base, tmp_path)
    result = tiny.run(told)
    kept = None if math.isnan(found[0]) else Retention(loss_before=1.5)
    assert result.retention == kept
    assert "the loss on retention text is" in caplog.text
    folder = RunFolder(tmp_path)
    facts = strict((folder.final / "osft.json").read_text())
    assert facts.get("retention") == (None if kept is None else {"lossBefore": 1.5})
    progress = read_document(folder.progress, Progress)
    assert progress is not None
    assert progress.retention == kept
    for path in [folder.plan, folder.progress, *folder.root.rglob("state.json")]:
        strict(path.read_text())
    for line in folder.metrics.read_text().splitlines():
        strict(line)
    assert Result.parse(Result.of(result).to_json()) is not None
    assert tiny.run(told).retention == kept
