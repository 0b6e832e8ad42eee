"""Whose run folder it is: fingerprints, claims, verdicts, and where old results go."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import identity, previous_runs
from osft_trainer.config import RunParameters, TrainingParameters
from osft_trainer.export import base_digest
from osft_trainer.identity import (
    NOT_IN_FINGERPRINT,
    Claim,
    Fingerprint,
    check_owner,
    claim,
    contents_of,
    data_digest,
    fingerprint,
    is_finished,
    standing_verdict,
    write_verdict,
)
from osft_trainer.outcome import Superseded
from osft_trainer.report import ExitCode, Owner, RunFolder, Verdict, read_document

REQUIRED: dict[str, Any] = {
    "model_path": "/m", "data_path": "/d", "ckpt_output_dir": "/o", "unfreeze_rank_ratio": 0.25,
    "effective_batch_size": 8, "max_tokens_per_gpu": 64, "max_seq_len": 64, "learning_rate": 1e-5,
}  # fmt: skip


def prints(data: str = "d1", model: str = "m1", **changes: Any) -> Fingerprint:
    return fingerprint(
        TrainingParameters(**{**REQUIRED, **changes}), {"data": data, "model": model}
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def complete(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "COMPLETE").touch()


def named(run_id: str | None, **changes: Any) -> RunParameters:
    return RunParameters(run_id=run_id, **changes)


@pytest.mark.parametrize(
    ("changes", "is_equal"),
    [
        ({"learning_rate": 2e-5}, False),
        ({"data": "d2"}, False),
        ({"model": "m2"}, False),
        ({"num_epochs": 2}, False),
        ({"save_dtype": "float32"}, False),
        ({"num_epochs": 1}, True),
        ({"max_tokens_per_gpu": 128}, True),
        ({"ckpt_output_dir": "/elsewhere", "data_path": "/moved"}, True),
        ({"wandb_project": "p", "keep_checkpoints": 9, "use_liger": False}, True),
        ({"validation_split": 0.1}, False),
        ({"validation_data_path": "v", "validation_frequency": 3}, True),
        ({"tensorboard": True, "checkpoint_every_minutes": 5.0}, True),
        ({"weight_decay": 0.0}, True),
    ],
)
def test_a_fingerprint_holds_what_changes_the_model(
    changes: dict[str, Any], is_equal: bool
) -> None:
    assert (prints(**changes).digest == prints().digest) is is_equal


def test_what_is_left_out_of_the_fingerprint_are_parameters() -> None:
    assert set(TrainingParameters.model_fields) >= NOT_IN_FINGERPRINT


def test_data_are_known_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text("{}\n")
    two.write_text("{}\n")
    assert data_digest(one) == data_digest(two)
    two.write_text("{ }\n")
    assert data_digest(one) != data_digest(two)
    assert data_digest(tmp_path) not in (data_digest(one), data_digest(two))


def change_template(base: Path) -> None:
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))


def change_vocabulary(base: Path) -> None:
    path = base / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


CHANGES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "template": (change_template, "tokenizer"),
    "template of its own": (
        lambda base: (base / "chat_template.jinja").write_text("{{ 1 }}"),
        "tokenizer",
    ),
    "vocabulary": (change_vocabulary, "tokenizer"),
    "end tokens": (
        lambda base: (base / "generation_config.json").write_text('{"eos_token_id": [1, 2]}'),
        "tokenizer",
    ),
    "sampling": (
        lambda base: (base / "generation_config.json").write_text('{"temperature": 2}'),
        None,
    ),
    "code": (lambda base: (base / "modeling_own.py").touch(), "code"),
    "words about it": (lambda base: (base / "README.md").touch(), None),
    "weights": (lambda base: (base / "more.safetensors").write_bytes(bytes(8)), "model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_only_with_the_model_folder_that_it_began_with(
    tmp_path: Path, change: str
) -> None:
    """Its position counts samples of those tokens; a finished one is another model than asked."""
    base = tiny.model_folder(tmp_path / "base")
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    (base / "generation_config.json").unlink(missing_ok=True)
    training = tiny.training(base, data, tmp_path / "run", trust_remote_code=True)

    def now() -> Fingerprint:
        return fingerprint(training, contents_of(training, base_digest(base)))

    folders = {name: RunFolder(tmp_path / name) for name in ("named", "unnamed", "finished")}
    for name, folder in folders.items():
        folder.root.mkdir()
        claim(folder, named("uid" if name == "named" else None), now())
        complete(folder.final if name == "finished" else folder.checkpoint(3))
    act, part = CHANGES[change]
    before = now()
    act(base)
    if part is None:
        assert now().digest == before.digest
        return
    what = identity.CONTENTS[part]
    with pytest.raises(ValueError, match=f"{what} has changed since.*Put the former files back"):
        claim(folders["named"], named("uid", attempt=2), now())
    for name in ("unnamed", "finished"):
        with pytest.raises(ValueError, match=f"{part}: {what} differs"):
            claim(folders[name], named(None), now())


def test_a_run_that_began_before_the_tokenizer_was_digested_goes_on(folder: RunFolder) -> None:
    old = prints()
    new = Fingerprint({**old.parts, "tokenizer": "t1", "code": "c1"})
    claim(folder, named("first"), old)
    complete(folder.checkpoint(3))
    assert claim(folder, named("first", attempt=2), new).state == "resume"
    # From here on it is known.
    changed = Fingerprint({**new.parts, "tokenizer": "t2"})
    with pytest.raises(ValueError, match=r"the tokenizer, chat template .* has changed since"):
        claim(folder, named("first", attempt=3), changed)
    assert claim(folder, named("another"), new).state == "resume"
    with pytest.raises(ValueError, match="tokenizer: the tokenizer, chat template"):
        claim(folder, named("third"), changed)


def test_another_run_may_follow_one_of_a_version_without_digests_of_tokenizers(
    folder: RunFolder,
) -> None:
    claim(folder, named("first"), prints())
    complete(folder.final)
    new = Fingerprint({**prints().parts, "tokenizer": "t1"})
    assert claim(folder, named("second"), new).state == "finished"


def test_the_same_run_goes_on(folder: RunFolder) -> None:
    assert claim(folder, named("uid"), prints()).state == "fresh"
    complete(folder.checkpoint(3))
    second = claim(folder, named("uid", attempt=2), prints())
    assert (second.state, second.run_id, second.attempt) == ("resume", "uid", 2)
    complete(folder.final)
    assert claim(folder, named("uid", attempt=2), prints()).state == "finished"


def test_a_run_without_a_name_is_known_by_its_fingerprint(folder: RunFolder) -> None:
    first = claim(folder, named(None), prints())
    assert first.run_id == first.fingerprint == prints().digest
    complete(folder.checkpoint(3))
    assert claim(folder, named(None), prints()).state == "resume"
    with pytest.raises(ValueError, match=r"learning_rate: 1e-05 there, 2e-05 here"):
        claim(folder, named(None), prints(learning_rate=2e-5))


def test_another_run_of_the_same_training_takes_over(folder: RunFolder) -> None:
    claim(folder, named("first"), prints())
    complete(folder.final)
    second = claim(folder, named("second"), prints())
    assert second.state == "finished"
    owner = read_document(folder.owner, Owner)
    assert owner is not None
    assert owner.run_id == "second"


def test_another_training_is_refused_with_what_differs(folder: RunFolder) -> None:
    claim(folder, named("first"), prints(weight_decay=0.1))
    complete(folder.checkpoint(3))
    with pytest.raises(ValueError) as refusal:
        claim(folder, named("second"), prints(data="d2", seed=7))
    text = str(refusal.value)
    for line in (
        f"ckpt_output_dir: {folder.root} holds run first",
        "data: the content of data_path differs",
        "seed: 42 there, 7 here",
        "weight_decay: 0.1 there, 0.0 here",
        "set on_existing_run to restart",
    ):
        assert line in text
    assert "model:" not in text
    owner = read_document(folder.owner, Owner)
    assert owner is not None
    assert owner.run_id == "first"


def test_error_refuses_even_the_same_training(folder: RunFolder) -> None:
    claim(folder, named("first"), prints())
    with pytest.raises(ValueError, match="holds run first"):
        claim(folder, named("second", on_existing_run="error"), prints())
    assert claim(folder, named("first", on_existing_run="error"), prints()).run_id == "first"


def test_results_of_unknown_origin_are_not_touched(folder: RunFolder) -> None:
    complete(folder.checkpoint(3))
    with pytest.raises(ValueError, match="without an OWNER"):
        claim(folder, named("uid"), prints())
    assert claim(folder, named("uid", on_existing_run="restart"), prints()).state == "fresh"


def fill(folder: RunFolder) -> None:
    complete(folder.checkpoint(3))
    complete(folder.export_of_epoch(1))
    complete(folder.final)
    for path in (folder.metrics, folder.progress, folder.plan, folder.verdict):
        path.write_text("{}")
    folder.cache.mkdir(exist_ok=True)
    (folder.root / "data.jsonl").write_text("the user's own")


MOVED = {"OWNER", "VERDICT", "checkpoints", "exports", "final", "metrics.jsonl", "plan.json",
         "progress.json"}  # fmt: skip


def test_restart_moves_the_old_run_away(folder: RunFolder) -> None:
    for number, run_id in enumerate(("first", "second", "third")):
        new = claim(folder, named(run_id, on_existing_run="restart"), prints(seed=number))
        assert new.state == "fresh"
        fill(folder)
    for number, run_id in ((1, "first"), (2, "second")):
        old = folder.previous(number)
        assert {path.name for path in old.iterdir()} == MOVED
        owner = read_document(RunFolder(old).owner, Owner)
        assert owner is not None
        assert owner.run_id == run_id
    assert folder.cache.is_dir()
    assert (folder.root / "data.jsonl").is_file()


@pytest.mark.parametrize("dies_at", range(11))
def test_a_crash_while_moving_loses_and_mixes_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    claim(folder, named("old"), prints())
    fill(folder)
    counter = 0

    class PowerCut(Exception):
        pass

    def count(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal counter
            counter += 1
            if counter > dies_at:
                raise PowerCut
            return real(*args, **kwargs)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", count(os.rename))
        for module in (identity, previous_runs):
            patch.setattr(module, "write_atomically", count(module.write_atomically))
        patch.setattr(Path, "unlink", count(Path.unlink))
        with pytest.raises(PowerCut):
            claim(folder, named("new", on_existing_run="restart"), prints(seed=1))
    # Whoever comes next, with whatever wish, finds the decision already made.
    new = claim(folder, named("new", on_existing_run="restart"), prints(seed=1))
    assert new.state == "fresh"
    check_owner(folder, new)
    old = [path for path in folder.root.glob("previous-*") if any(path.iterdir())]
    assert [{path.name for path in one.iterdir()} for one in old] == [MOVED]


def test_the_last_claim_owns_the_folder(folder: RunFolder) -> None:
    old = claim(folder, named("uid"), prints())
    check_owner(folder, old)
    # The same attempt again: its pod was lost and made anew, but the old one may still run.
    new = claim(folder, named("uid"), prints())
    with pytest.raises(Superseded, match="nothing more is written"):
        check_owner(folder, old)
    check_owner(folder, new)


def test_an_older_attempt_may_not_claim(folder: RunFolder) -> None:
    claim(folder, named("uid", attempt=3), prints())
    with pytest.raises(Superseded, match="attempt 3 of this run owns the folder"):
        claim(folder, named("uid", attempt=2), prints())


def verdict_of(claimed: Claim) -> Verdict:
    return Verdict(run_id=claimed.run_id, exit_code=ExitCode.BAD_INPUT, reason="BadInput")


def test_a_verdict_stands_for_the_run_that_was_given_its_name(folder: RunFolder) -> None:
    mine = claim(folder, named("uid"), prints())
    write_verdict(folder, mine, verdict_of(mine))
    assert standing_verdict(folder, named("uid")) == verdict_of(mine)
    assert standing_verdict(folder, named("another")) is None
    assert standing_verdict(folder, named(None)) is None


def test_a_verdict_is_not_written_into_anothers_folder(folder: RunFolder) -> None:
    mine = claim(folder, named("uid"), prints())
    claim(folder, named("second"), prints())
    write_verdict(folder, mine, verdict_of(mine))
    assert not folder.verdict.exists()


def test_a_corrected_run_takes_the_place_of_one_that_failed_without_results(
    folder: RunFolder,
) -> None:
    first = claim(folder, named(None), prints(data="with a mistake"))
    with pytest.raises(ValueError, match="content of data_path differs"):
        claim(folder, named(None), prints(data="corrected"))
    write_verdict(folder, first, verdict_of(first))
    assert claim(folder, named(None), prints(data="corrected")).state == "fresh"
    assert not folder.verdict.exists()


def test_a_failed_run_with_results_is_kept(folder: RunFolder) -> None:
    first = claim(folder, named(None), prints())
    complete(folder.checkpoint(3))
    write_verdict(folder, first, verdict_of(first))
    with pytest.raises(ValueError, match="learning_rate"):
        claim(folder, named(None), prints(learning_rate=1e-6))


def test_finished_is_said_of_this_run_only(folder: RunFolder) -> None:
    claim(folder, named("uid"), prints())
    assert not is_finished(folder, named("uid"))
    complete(folder.final)
    assert is_finished(folder, named("uid"))
    assert not is_finished(folder, named("another"))
    assert not is_finished(folder, named(None))


def test_an_owner_file_that_would_be_too_long_still_works(folder: RunFolder) -> None:
    mine = claim(folder, named("uid"), prints(target_patterns=["é" * 256] * 64,
                 lr_scheduler_kwargs={"x": "y" * 70_000}))  # fmt: skip
    check_owner(folder, mine)
