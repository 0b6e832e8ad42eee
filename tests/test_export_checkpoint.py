"""A Hugging Face folder of any state: equal to what the run itself writes, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import decomposition, export, retention
from osft_trainer.config import TrainingParameters
from osft_trainer.export_checkpoint import export_checkpoint
from osft_trainer.report import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def trained(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    """A finished run with a state and an export at the end of each of its two epochs."""
    told = tiny.training(base, base.parent / "data.jsonl", out, checkpoint_at_epoch=True, **changes)
    tiny.run(told)
    return told


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("run")
    trained(base, out)
    return RunFolder(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parameterization": "factored"},
        {"other_parameters": "all", "save_dtype": "bfloat16"},
        {"compute_dtype": "bfloat16", "other_parameters": "norms"},
        {"target_patterns": ["self_attn"]},
        {"unfreeze_rank_ratio": 1.0},
        {"validation_split": 0.3, "validate_at_epoch": True},
    ],
    ids=["exact", "factored", "all", "bfloat16", "attention", "ratio 1", "validation"],
)
def test_the_last_state_gives_the_final_model_bit_for_bit(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    trained(base, tmp_path / "run", **changes)
    folder = RunFolder(tmp_path / "run")
    last = folder.complete_checkpoints()[-1]
    assert export_checkpoint(last, tmp_path / "out").step == 6
    assert content(tmp_path / "out") == content(folder.final)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "given"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "made again"])
def test_a_split_by_activations_is_exported_too(
    base: Path, tmp_path: Path, sampled: bool, cached: bool
) -> None:
    text = None if sampled else str(base.parent / "data.jsonl")
    trained(
        base,
        tmp_path / "run",
        split_by="activations",
        retention_data_path=text,
        retention_tokens=1024,
    )
    folder = RunFolder(tmp_path / "run")
    if not cached:
        shutil.rmtree(folder.cache / "decomposition")
    export_checkpoint(folder.complete_checkpoints()[-1], tmp_path / "out")
    assert_final_but_for_retention(folder, tmp_path / "out")


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "given"])
def test_bases_that_would_be_others_are_refused_before_any_work(
    base: Path, tmp_path: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is text written anew, nor are matrices split."""
    old = tiny.data_file(tmp_path / "old.jsonl", seed=5)
    trained(
        base,
        tmp_path / "run",
        split_by="activations",
        retention_data_path=None if sampled else str(old),
        retention_tokens=1024,
    )
    folder = RunFolder(tmp_path / "run")
    shutil.rmtree(folder.cache)
    tiny.data_file(old, seed=6)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("hours of work")

    monkeypatch.setattr(retention, "sample_conversations", never)
    monkeypatch.setattr(decomposition, "second_moments", never)
    words = r"retention_data_path: what the model wrote.* is gone" if sampled else "would be others"
    with pytest.raises(ValueError, match=rf"(?s)lacks the bases.*{words}.*its run's cache folder"):
        export_checkpoint(folder.complete_checkpoints()[-1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (folder.cache / "retention").exists()


def test_adaptive_ranks_are_those_of_the_run(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "run", rank_allocation="adaptive", retention_tokens=1024)
    folder = RunFolder(tmp_path / "run")
    export_checkpoint(folder.complete_checkpoints()[-1], tmp_path / "out")
    assert_final_but_for_retention(folder, tmp_path / "out")


def assert_final_but_for_retention(folder: RunFolder, out: Path) -> None:
    """What the run measured on its text at its end is not in any state."""
    ours, theirs = content(out), content(folder.final)
    told, expected = json.loads(ours.pop("osft.json")), json.loads(theirs.pop("osft.json"))
    assert expected.pop("retention")
    assert told == expected
    assert ours == theirs


def test_an_earlier_state_gives_that_epochs_export(run: RunFolder, tmp_path: Path) -> None:
    first = run.complete_checkpoints()[0]
    assert export_checkpoint(first, tmp_path / "out").step == 3
    assert content(tmp_path / "out") == content(run.export_of_epoch(1))
    assert content(tmp_path / "out") != content(run.final)


def test_without_the_cache_the_bases_are_made_again(
    run: RunFolder, base: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run.root, moved)
    shutil.rmtree(moved / "cache")
    last = RunFolder(moved).complete_checkpoints()[-1]
    export_checkpoint(last, tmp_path / "out")
    assert content(tmp_path / "out") == content(run.final)


def test_the_run_folder_is_only_read(run: RunFolder, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in run.root.rglob("*")}

    before = times()
    export_checkpoint(run.complete_checkpoints()[-1], tmp_path / "out")
    assert times() == before


def test_the_base_model_may_have_moved_but_not_changed(
    run: RunFolder, base: Path, tmp_path: Path
) -> None:
    last = run.complete_checkpoints()[-1]
    moved = shutil.copytree(base, tmp_path / "moved")
    export_checkpoint(last, tmp_path / "out", model_path=str(moved))
    assert content(tmp_path / "out") == content(run.final)
    other = tiny.model_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"--model: .* is not the model that .* was trained from"):
        export_checkpoint(last, tmp_path / "third", model_path=str(other))
    assert not (tmp_path / "third").exists()


def test_another_type_can_be_asked_for(run: RunFolder, tmp_path: Path) -> None:
    export_checkpoint(run.complete_checkpoints()[-1], tmp_path / "out", save_dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert weights < 0.6 * (run.final / "model.safetensors").stat().st_size


def test_an_interrupted_export_is_done_again_and_nothing_replaced(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = run.complete_checkpoints()[-1]

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "_copy_base_files", crash)
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(last, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_checkpoint(last, tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is not empty: give a new folder"):
        export_checkpoint(last, tmp_path / "out")
    assert content(tmp_path / "out") == content(run.final)


def test_what_is_no_whole_state_is_refused(run: RunFolder, tmp_path: Path) -> None:
    last = run.complete_checkpoints()[-1]
    with pytest.raises(ValueError, match=f"no complete state of a run: give {last}"):
        export_checkpoint(run.root, tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder: give <run>/checkpoints/step-N"):
        export_checkpoint(tmp_path / "missing", tmp_path / "out")
    copy = tmp_path / "run" / "checkpoints" / last.name
    shutil.copytree(last, copy)
    rows = copy / "rank-00000.safetensors"
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged .* take an older state"):
        export_checkpoint(copy, tmp_path / "out")
    rows.write_bytes(whole)
    state = json.loads((copy / "state.json").read_text())
    del state["run"]
    (copy / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="export it with the version that wrote it"):
        export_checkpoint(copy, tmp_path / "out")
    (copy / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="no complete state"):
        export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_two_ranks_is_exported_by_one(base: Path, tmp_path: Path) -> None:
    told = tiny.training(base, base.parent / "data.jsonl", tmp_path / "run")
    tiny.complete(told, ranks=2)
    folder = RunFolder(tmp_path / "run")
    export_checkpoint(folder.complete_checkpoints()[-1], tmp_path / "out")
    ours, theirs = content(tmp_path / "out"), content(folder.final)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours.keys() == theirs.keys()
