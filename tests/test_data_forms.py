"""Preparing rows that are no conversations: documents in blocks, and token ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_rows import make_tokenizer, prepare_default, write
from osft_trainer.data import DataCounts, prepare
from osft_trainer.packing import collate
from osft_trainer.samples import Documents, Processed


def documents(*texts: str, column: str = "document") -> list[dict[str, str]]:
    return [{column: text} for text in texts]


def test_documents_become_blocks_whose_pieces_do_not_mix(tmp_path: Path) -> None:
    rows = documents("abcd", "  ", "ef", "g" * 9, "")
    file = write(tmp_path / "d.jsonl", *rows)
    data = prepare_default(file, tmp_path, form=Documents(block_size=6))
    decode = make_tokenizer().decode
    blocks = [[decode(ids) for ids, _ in data.pieces(i)] for i in range(len(data))]
    assert blocks == [["abcd<e>", "e"], ["f<e>", "gggg"], ["ggggg<e>"]]
    for index in range(len(data)):
        ids, labels = data.sample(index)
        starts = np.cumsum([0] + [len(piece) for piece, _ in data.pieces(index)])[:-1]
        unlearned = [place for place, label in enumerate(labels.tolist()) if label == -100]
        assert unlearned == starts.tolist(), "all but the first of each piece is learned"
        assert all(a == b for a, b in zip(ids, labels, strict=True) if b != -100)
    assert data.counts == DataCounts(rows=5, samples=3, dropped_empty=2, tokens=18, loss_tokens=13)
    batch = collate([piece for index in range(2) for piece in data.pieces(index)])
    assert batch.lengths == (5, 1, 2, 4)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 0, 1, 2, 3]
    assert batch.loss_tokens == int(data.loss_counts[:2].sum())


def test_last_block_of_one_token_is_counted_as_empty(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", *documents("abcdef"))
    data = prepare_default(file, tmp_path, form=Documents(block_size=6))
    assert (len(data), data.counts.dropped_empty, data.counts.tokens) == (1, 1, 6)


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        ({"title": "x"}, None, "has no 'document' and no 'text' (keys: 'title'): set"),
        ({"text": "x"}, "body", "has no 'body' (keys: 'text'): set document_column_name"),
        ({"text": ["x"]}, None, "'text' must be a string, is a list"),
        ({"text": "\ud83d"}, None, "'text' holds half a character"),
        (["x"], None, "must be a JSON object with a document, is a list"),
    ],
)
def test_fault_of_a_document_names_file_line_and_reason(
    tmp_path: Path, line: Any, column: str | None, reason: str
) -> None:
    file = write(tmp_path / "d.jsonl", {"text": "ok", "body": "ok"}, line)
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2: ") as caught:
        prepare_default(file, tmp_path, form=Documents(block_size=9, column=column))
    assert reason in str(caught.value)


def test_documents_need_a_token_between_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token: set one"):
        prepare(
            write(tmp_path / "d.jsonl", *documents("a")),
            tokenizer,
            max_seq_len=9,
            on_overlong="error",
            cache_root=tmp_path,
            form=Documents(block_size=9),
        )


def test_processed_data_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100], "len": 4},
        {"input_ids": [5, 6], "labels": [5, 6]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
    ]
    data = prepare_default(write(tmp_path / "d.jsonl", *rows), tmp_path, form=Processed())
    samples = [[part.tolist() for part in data.sample(i)] for i in range(len(data))]
    assert samples == [[[5, 6, 7], [-100, 6, 7]], [[5, 6], [-100, 6]]]
    assert data.counts == DataCounts(rows=3, samples=2, dropped_empty=1, tokens=5, loss_tokens=3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids but 1 labels: give one for each"),
        ({"input_ids": [1]}, "has no 'labels' (keys: 'input_ids')"),
        ({"input_ids": [], "labels": []}, "'input_ids' is empty"),
        ({"input_ids": [1, 261], "labels": [1, 2]}, "input_ids[1] is 261: the tokenizer has the"),
        ({"input_ids": [-1], "labels": [1]}, "input_ids[0] is -1"),
        (
            {"input_ids": [1, 2], "labels": [2, -100]},
            "labels[0] is 2: must be -100 or input_ids[0]",
        ),
        ({"input_ids": [1, 2], "labels": [-100, -1]}, "labels[1] is -1"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, "'input_ids' must hold whole numbers"),
        ({"input_ids": [1, 2], "labels": [True, 2]}, "'labels' must hold whole numbers"),
        ({"input_ids": [True, False], "labels": [1, 0]}, "'input_ids' must hold whole numbers"),
        ({"input_ids": [1, None], "labels": [1, 2]}, "'input_ids' must hold whole numbers"),
        ({"input_ids": [[1], [2, 3]], "labels": [1, 2]}, "'input_ids' must hold whole numbers"),
        ({"input_ids": [2**80], "labels": [1]}, "'input_ids' holds a number that is no token's"),
        ({"input_ids": "12", "labels": [1]}, "'input_ids' must be a list of token ids, is a str"),
    ],
)
def test_fault_of_processed_data_names_file_line_and_reason(
    tmp_path: Path, line: Any, reason: str
) -> None:
    file = write(tmp_path / "d.jsonl", {"input_ids": [1, 260], "labels": [1, 260]}, line)
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2: ") as caught:
        prepare_default(file, tmp_path, form=Processed())
    assert reason in str(caught.value)
