"""The model folders of a run, and attempts that write them at the same time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import export
from osft_trainer.config import RunParameters, TrainingParameters
from osft_trainer.durable import work_folder
from osft_trainer.identity import Fingerprint, OwnerRecord, claim
from osft_trainer.outcome import Superseded
from osft_trainer.report import RunFolder, read_document


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, num_epochs=1, **changes)


def overtaken_while_writing(
    patch: pytest.MonkeyPatch, folder: RunFolder, next_attempt: Callable[[], None]
) -> None:
    """When the weights are written, a newer attempt takes the folder."""
    real = export._copy_base_files

    def copy(*told: Any) -> None:
        real(*told)
        newer = RunParameters(run_id=tiny.RUN_ID, attempt=2)
        owner = read_document(folder.owner, OwnerRecord)
        assert owner is not None
        claim(folder, newer, Fingerprint(owner.parts))
        next_attempt()

    patch.setattr(export, "_copy_base_files", copy)


def test_an_export_ends_where_a_newer_attempt_has_taken_the_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one was quicker: what it has written stays."""
    folder = RunFolder(tmp_path)

    def write_final() -> None:
        folder.final.mkdir()
        (folder.final / "whose").write_text("the newer attempt's")

    overtaken_while_writing(monkeypatch, folder, write_final)
    with pytest.raises(Superseded, match="attempt 2"):
        tiny.run(parameters(base, tmp_path))
    assert [path.name for path in folder.final.iterdir()] == ["whose"]
    assert not list(tmp_path.glob(".final*"))


def test_attempts_do_not_write_into_each_others_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one is in the middle of its own export; the older one's failure leaves it alone."""
    theirs: list[Path] = []

    def begin_export() -> None:
        newer = read_document(RunFolder(tmp_path).owner, OwnerRecord)
        assert newer is not None
        theirs.append(work_folder(RunFolder(tmp_path).final, newer.token))
        theirs[0].mkdir()
        (theirs[0] / "part-00001.safetensors").write_text("the newer attempt's")

    overtaken_while_writing(monkeypatch, RunFolder(tmp_path), begin_export)
    with pytest.raises(Superseded):
        tiny.run(parameters(base, tmp_path))
    assert [path.name for path in theirs[0].iterdir()] == ["part-00001.safetensors"]
    assert list(tmp_path.glob(".*")) == theirs


def test_a_final_model_whose_exchange_was_cut_is_back_for_the_next_attempt(tmp_path: Path) -> None:
    folder, run, prints = (
        RunFolder(tmp_path),
        RunParameters(run_id="r"),
        Fingerprint({"model": "m"}),
    )
    claim(folder, run, prints)
    aside = tmp_path / ".final.old"
    aside.mkdir()
    (aside / "COMPLETE").touch()
    (tmp_path / ".final.abc.writing").mkdir()
    (folder.best_export.parent / ".best.old").mkdir(parents=True)
    ours = claim(folder, run, prints)
    assert ours.state == "finished"
    assert folder.best_export.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OWNER", "exports", "final"]


def test_a_cut_exchange_is_moved_away_with_its_run(tmp_path: Path) -> None:
    """Else the next run would take the older one's model for its own."""
    folder = RunFolder(tmp_path)
    claim(folder, RunParameters(run_id="first"), Fingerprint({"model": "m"}))
    aside = tmp_path / ".final.old"
    aside.mkdir()
    (aside / "COMPLETE").touch()
    second = RunParameters(run_id="second", on_existing_run="restart")
    ours = claim(folder, second, Fingerprint({"model": "m"}))
    assert ours.state == "fresh"
    assert (folder.previous(1) / "final" / "COMPLETE").is_file()
    assert not folder.final.exists()
