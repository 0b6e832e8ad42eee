"""The importance of blocks is measured once for a run, whatever the next machine would find."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import tiny
from osft_trainer import importance
from osft_trainer.data import prepare
from osft_trainer.importance import block_importance, importance_of_run
from osft_trainer.model import load_model
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.retention import RetentionText, parts, rows

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(tiny.model_folder(tmp_path_factory.mktemp("base") / "model"), torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> RetentionText:
    folder = tmp_path_factory.mktemp("text")
    prepared = prepare(
        tiny.data_file(folder / "data.jsonl"),
        tiny.tokenizer(),
        max_seq_len=64,
        on_overlong="error",
        cache_root=folder,
    )
    return parts(prepared.whole(), 400, prepared.digest, sampled=False)


def test_the_next_attempt_reads_what_the_first_one_found(
    hf: PreTrainedModel, text: RetentionText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    first = importance_of_run(hf, text, folder, "base", ALONE)
    assert first == block_importance(hf, list(rows(text.read)))
    monkeypatch.setattr(importance, "block_importance", lambda *_: [0.5, 1.5])
    assert importance_of_run(hf, text, folder, "base", ALONE) == first
    assert importance_of_run(hf, text, folder, "another base", ALONE) == [0.5, 1.5]


@pytest.mark.parametrize("content", ["", "[1.0", "[1.0]", '["1", "2"]', "null"])
def test_a_damaged_file_is_made_anew(
    hf: PreTrainedModel, text: RetentionText, tmp_path: Path, content: str
) -> None:
    folder = RunFolder(tmp_path)
    first = importance_of_run(hf, text, folder, "base", ALONE)
    (path,) = (folder.cache / "importance").iterdir()
    path.write_text(content)
    assert importance_of_run(hf, text, folder, "base", ALONE) == first
    assert path.read_text() != content
