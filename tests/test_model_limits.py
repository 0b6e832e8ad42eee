"""Token ids and positions that the model has not: bad input, told before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny
from data_rows import make_tokenizer, prepare_default, row, write
from osft_trainer.model_limits import check_fits, table_of_positions, warn_beyond
from osft_trainer.planning import make_report
from osft_trainer.samples import Documents
from osft_trainer.spectrum import measure
from osft_trainer.validation import split_off
from tiny_models import save_tiny_model

WORDS = len(tiny.tokenizer())
"""Ids of the tokenizer; the last one is in every sample."""
LONGEST = 38
"""Tokens of the longest sample of `tiny.data_file`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_file(tmp_path_factory.mktemp("data") / "data.jsonl")


def gpt2_folder(folder: Path, positions: int) -> Path:
    save_tiny_model(folder, "gpt2", vocab_size=WORDS, n_positions=positions, n_layer=1)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def model(kind: str, **changes: Any) -> PreTrainedModel:
    """Shapes without numbers."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **changes)
        )
    return made


def everything(base: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    """What a run and a plan of it say; empty where they go through."""
    told = tiny.training(base, data, out, max_steps=1, training_mode="step", **changes)
    said = []
    for action in (
        lambda: make_report(told, processes=1, device="cpu", energy=False),
        lambda: tiny.run(told),
    ):
        try:
            action()
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_token_without_a_row_of_the_embedding_is_bad_input(tmp_path: Path, data: Path) -> None:
    base = tiny.model_folder(tmp_path / "model", vocab_size=WORDS - 1)
    planned, run = everything(base, data, tmp_path / "out")
    assert planned == run
    assert run.startswith(f"data_path: the token id {WORDS - 1} is in the data, and the embedding")
    assert f"rows for the ids 0 to {WORDS - 2} only: give the tokenizer" in run
    with pytest.raises(ValueError, match=f"--data: the token id {WORDS - 1} is in the data"):
        measure(str(base), data, [0.1], tolerance=0.1, max_tokens=99)


@pytest.mark.parametrize("name", ["validation_data_path", "retention_data_path"])
def test_the_other_data_are_held_to_the_same(tmp_path: Path, name: str) -> None:
    """The data to train on keep to what the model has; the other has one token more."""
    base = tiny.model_folder(tmp_path / "model", vocab_size=WORDS - 1)
    form = {"use_processed_dataset": True}
    sample = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    beyond = {"input_ids": [1, 2, WORDS - 1], "labels": [-100, 2, WORDS - 1]}
    known = write(tmp_path / "known.jsonl", *[sample] * 12)
    more = write(tmp_path / "more.jsonl", *[sample] * 12, beyond)
    assert everything(base, known, tmp_path / "out", **form, **{name: str(known)}) == []
    said = everything(base, known, tmp_path / "other", **form, **{name: str(more)})
    assert [words.partition(":")[0] for words in said] == [name] * 2


def test_a_sample_beyond_a_table_of_positions_is_bad_input(tmp_path: Path, data: Path) -> None:
    base = gpt2_folder(tmp_path / "short", positions=LONGEST - 1)
    planned, run = everything(base, data, tmp_path / "out")
    assert planned == run
    assert run == (
        f"max_seq_len: a sample of data_path has {LONGEST} tokens, and the model at model_path has "
        f"a table of {LONGEST - 1} positions: set max_seq_len (of documents block_size) to at most "
        f"{LONGEST - 1}, and on_overlong to drop or truncate"
    )
    cut = {"max_seq_len": LONGEST - 1, "on_overlong": "truncate"}
    assert everything(base, data, tmp_path / "cut", **cut) == []
    base = gpt2_folder(tmp_path / "enough", positions=LONGEST)
    assert everything(base, data, tmp_path / "whole") == []
    assert measure(str(base), data, [0.1], tolerance=0.1, max_tokens=99).loss is not None


@pytest.mark.parametrize("documents", [True, False])
def test_a_model_writes_no_more_than_its_positions(tmp_path: Path, documents: bool) -> None:
    """Its words may have more tokens when they are read again: such a question gets no answer."""
    base = gpt2_folder(tmp_path / "model", positions=64)
    changes: dict[str, Any] = {"is_pretraining": True, "block_size": 64} if documents else {}
    changes.update(split_by="activations", retention_tokens=900)
    data = write(tmp_path / "d.jsonl", *[{"text": "abc" * 9} if documents else row()] * 9)
    assert everything(base, data, tmp_path / "out", **changes) == []
    planned, run = everything(base, data, tmp_path / "other", **{**changes, "max_seq_len": 65})
    assert planned == run
    assert run.startswith("retention_data_path: max_seq_len 65 is more than the 64 positions")


def test_plain_text_for_a_spectrum_is_held_to_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what is old is kept; " * 20, encoding="utf-8")
    short = gpt2_folder(tmp_path / "short", positions=LONGEST)
    assert measure(str(short), text, [0.1], tolerance=0.1, max_tokens=99).loss is not None
    base = tiny.model_folder(tmp_path / "model", vocab_size=50)
    with pytest.raises(ValueError, match=r"--data: the token id \d+ is in the data"):
        measure(str(base), text, [0.1], tolerance=0.1, max_tokens=99)


def test_a_sample_beyond_what_a_model_was_made_for_is_said_once(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny.model_folder(tmp_path / "model", max_position_embeddings=LONGEST - 1)
    told = tiny.training(base, data, tmp_path / "out", validation_data_path=str(data))
    make_report(told, processes=1, device="cpu", energy=False)
    assert caplog.text.count(f"has {LONGEST} tokens, more than the model was made for") == 1
    caplog.clear()
    warn_beyond(model("llama", max_position_embeddings=9, num_hidden_layers=1), 9)
    warn_beyond(model("bloom", n_layer=1), 10**9)
    assert not caplog.text


@pytest.mark.parametrize(
    ("kind", "changes", "positions"),
    [
        ("gpt2", {"n_positions": 12, "n_layer": 1}, 12),
        ("gpt_neo", {"max_position_embeddings": 12}, 12),
        ("opt", {"max_position_embeddings": 12, "num_hidden_layers": 1}, 12),
        ("gptj", {"n_positions": 12, "n_layer": 1}, 12),
        ("llama", {"num_hidden_layers": 1}, None),
        ("bloom", {"n_layer": 1}, None),
        ("gemma3_text", {"num_hidden_layers": 1}, None),
    ],
)
def test_tables_of_positions_are_found(
    kind: str, changes: dict[str, Any], positions: int | None
) -> None:
    assert table_of_positions(model(kind, **changes)) == positions


def test_documents_in_one_block_count_their_own_positions(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "abc"}, {"text": "defgh"}, {"text": "ij"})
    data = prepare_default(file, tmp_path, form=Documents(block_size=13))
    assert (data.lengths.tolist(), data.longest) == ([13], 6)
    check_fits(model("gpt2", n_positions=6, n_layer=1), data, "data_path")
    with pytest.raises(ValueError, match=r"has 6 tokens, .* a table of 5 positions"):
        check_fits(model("gpt2", n_positions=5, n_layer=1), data, "data_path")


def test_the_largest_id_is_that_of_all_samples(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", *[row(answer="y" * n) for n in range(1, 40)])
    data = prepare_default(file, tmp_path)
    assert data.largest_id == max(int(data.sample(i)[0].max()) for i in range(len(data)))
    assert data.largest_id == make_tokenizer().convert_tokens_to_ids("<e>")
    for part in split_off(data, 0.5):
        assert (part.largest_id, part.longest) == (data.largest_id, data.longest)
