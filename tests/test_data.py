"""Preparing data: faults by file and line, overlong samples, the cache folder."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from osft_trainer import data as data_module
from osft_trainer import samples as samples_module
from osft_trainer.data import DataCounts, PreparedData, open_prepared, prepare
from osft_trainer.faults import Faults
from osft_trainer.packing import collate
from osft_trainer.prepared import PreparedWriter
from osft_trainer.samples import TEXTS_AT_ONCE, Chat, Documents, Processed
from osft_trainer.sources import Row

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def make_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths in the tests can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<u>", "<a>", "<t>", "<e>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<e>", chat_template=template
    )


def row(question: str = "hi", answer: str = "yes") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write(path: Path, *rows: Any) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def prepared(path: Path, cache: Path, **options: Any) -> PreparedData:
    return prepare(path, make_tokenizer(), cache_root=cache, **{"max_seq_len": 100, **options})


def prepare_default(path: Path, cache: Path, **options: Any) -> PreparedData:
    return prepared(path, cache, **{"on_overlong": "error", **options})


def trained_text(data: PreparedData, index: int) -> str:
    ids, labels = data.sample(index)
    assert labels[0] == -100
    assert all(a == b for a, b in zip(ids.tolist(), labels.tolist(), strict=True) if b != -100)
    return str(make_tokenizer().decode(labels[labels != -100]))


def test_samples_come_back_with_labels_and_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row("hi", "yes"), "", row("why", "so it is"))
    data = prepare_default(file, tmp_path / "cache")
    ids, labels = data.sample(0)
    assert make_tokenizer().decode(ids) == "<u>hi<e><a>yes<e>"
    assert (labels == -100).tolist() == [True] * 5 + [False] * 4
    assert [trained_text(data, i) for i in range(len(data))] == ["yes<e>", "so it is<e>"]
    assert data.counts == DataCounts(rows=2, samples=2, tokens=24, loss_tokens=13)
    assert data.lengths.tolist() == [9, 15]
    assert data.loss_counts.tolist() == [4, 9]


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "b.jsonl", row(answer="second"))
    write(folder / "a.jsonl", row(answer="first"))
    write(folder / "notes.txt", "no data")
    data = prepare_default(folder, tmp_path / "cache")
    assert [trained_text(data, i) for i in range(2)] == ["first<e>", "second<e>"]


SOUND = json.dumps(row())
FAULTS = {
    "not JSON": ("{'messages': []}", "not JSON"),
    "half a line": (SOUND[:20], "not JSON"),
    "no object": ("[1]", "must be a JSON object with 'messages', is a list"),
    "no messages": ('{"text": "hi"}', "has no 'messages' (keys: 'text')"),
    "null messages": ('{"messages": null}', "'messages' must be a list, is null"),
    "empty messages": ('{"messages": []}', "'messages' is empty"),
    "text message": ('{"messages": ["hi"]}', "message 1 must be an object"),
    "unknown role": (SOUND.replace('"user"', '"human"'), "unknown role 'human': use one of"),
    "role no text": (SOUND.replace('"user"', "[1]"), "unknown role [1]"),
    "no assistant": ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    "content parts": (SOUND.replace('"yes"', "[]"), "'content' must be a string, is a list"),
    "content null": (SOUND.replace('"yes"', "null"), "'content' must be a string, is null"),
    "half a character": (SOUND.replace("yes", "\\ud83d"), "'content' holds half a character"),
    "tools": (SOUND.replace("{", '{"tools": "x", ', 1), "'tools' is a string, and not of JSON"),
    "tools no list": (SOUND.replace("{", '{"tools": {}, ', 1), "'tools' must be a list"),
    "tool no object": (SOUND.replace("{", '{"tools": [1], ', 1), "'tools' must be a list of"),
    "unmask": (SOUND.replace("{", '{"unmask": "yes", ', 1), "'unmask' must be true or false"),
    "only system": (
        '{"unmask": true, "messages": [{"role": "system", "content": "x"}]}',
        "has only system turns",
    ),
    "call of a user": (
        SOUND.replace('"content": "hi"', '"content": "hi", "tool_calls": [{"name": "f"}]'),
        "message 1 (user): only an assistant has 'tool_calls'",
    ),
    "call without name": (
        SOUND.replace('"content": "yes"', '"content": "yes", "tool_calls": [{"id": "1"}]'),
        "must be an object with the name of a function",
    ),
    "two thoughts": (
        SOUND.replace('"yes"', '"yes", "thinking": "a", "reasoning_content": "b"'),
        "reasoning_content and thinking differ: give one of them",
    ),
    "thoughts no text": (
        SOUND.replace('"yes"', '"yes", "thinking": ["a"]'),
        "'thinking' must be a string, is a list",
    ),
    "token ids": ('{"input_ids": [1], "labels": [1]}', "set use_processed_dataset"),
    "document": ('{"text": "once"}', "set is_pretraining"),
    "deep": ("[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize(("line", "reason"), FAULTS.values(), ids=FAULTS)
def test_fault_names_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    file = write(tmp_path / "d.jsonl", row(), "", line, row())
    with pytest.raises(ValueError, match=r"d\.jsonl, line 3: ") as caught:
        prepare_default(file, tmp_path / "cache")
    assert reason in str(caught.value)
    assert "1 problem " in str(caught.value)


def test_skipped_lines_are_counted_and_the_first_few_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unreadable, of another form, and refused by the template: each is left out."""
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
    bad = ["no JSON", "{}", row("no"), *["[]"] * 4]
    file = write(tmp_path / "d.jsonl", row(answer="first"), *bad, row(answer="last"))
    data = prepare(
        file,
        make_tokenizer(refusing + TEMPLATE),
        max_seq_len=100,
        on_overlong="error",
        on_bad_sample="skip",
        cache_root=tmp_path,
    )
    assert [trained_text(data, i) for i in range(len(data))] == ["first<e>", "last<e>"]
    assert (data.counts.rows, data.counts.skipped_bad) == (2, 7)
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert [f"d.jsonl, line {n}: " in line for n, line in enumerate(told, start=2)] == [True] * 5
    assert "never" in told[2]
    assert "further ones are only counted" in told[4]


def test_overlong_samples_are_no_bad_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row(), row(answer="too long"))
    with pytest.raises(ValueError, match=r"line 2: .* set on_overlong to drop or truncate"):
        prepare_default(file, tmp_path, max_seq_len=9, on_bad_sample="skip")


def test_nothing_but_bad_lines_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", "no", "no")
    with pytest.raises(ValueError, match=r"leaves nothing to train on: .*skipped_bad=2"):
        prepare_default(file, tmp_path, on_bad_sample="skip")


def test_unmask_of_a_sample_trains_its_other_turns(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {**row(), "unmask": True}, {**row(), "unmask": False}, row())
    data = prepare_default(file, tmp_path)
    assert [trained_text(data, i) for i in range(3)] == ["hi<e>yes<e>", "yes<e>", "yes<e>"]
    everywhere = prepare_default(file, tmp_path, form=Chat(unmask=True))
    assert [trained_text(everywhere, i) for i in range(3)] == ["hi<e>yes<e>"] * 3


def test_what_the_template_leaves_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thinking = row()
    thinking["messages"][1]["thinking"] = "so"
    tools = [{"type": "function", "function": {"name": "f"}}]
    prepare_default(write(tmp_path / "d.jsonl", *[{**thinking, "tools": tools}] * 9), tmp_path)
    assert caplog.text.count("does not write the assistant's thoughts") == 1
    assert caplog.text.count("does not write the tools") == 1


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


def test_preparation_holds_a_few_conversations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were read and not yet written: never more than one group of them."""
    read = written = most = 0
    real_append = PreparedWriter.append

    def rows(files: list[Path], faults: Faults) -> Iterator[Row]:
        nonlocal read, most
        for number in range(300):
            read += 1
            most = max(most, read - written)
            yield Row(f"row {number}", row(answer="n" * 200))

    def append(writer: PreparedWriter, *sample: Any) -> int:
        nonlocal written
        written += 1
        return real_append(writer, *sample)

    monkeypatch.setattr(data_module, "read_rows", rows)
    monkeypatch.setattr(PreparedWriter, "append", append)
    file = write(tmp_path / "d.jsonl", "")
    assert len(prepare_default(file, tmp_path, max_seq_len=500)) == written == 300
    assert most <= TEXTS_AT_ONCE + 1
    read = written = most = 0
    monkeypatch.setattr(samples_module, "CHARACTERS_AT_ONCE", 2_000)
    prepare_default(write(tmp_path / "d.jsonl", "x"), tmp_path, max_seq_len=500)
    assert most <= 2_000 // 200 + 1, "long texts go in smaller groups"


def test_text_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(SOUND.replace("yes", "ü").encode("utf-8") + b"\n" + b'{"x": "\xfc"}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl, line 2: not UTF-8 text \(byte 8\)"):
        prepare_default(file, tmp_path / "cache")


def test_five_faults_are_told_and_reading_stops(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row(), *["no"] * 9)
    with pytest.raises(ValueError, match="5 problems in the data") as caught:
        prepare_default(file, tmp_path / "cache")
    assert [f"line {n}:" in str(caught.value) for n in range(1, 9)] == [False] + [True] * 5 + [
        False
    ] * 2


def test_refusal_of_the_template_names_the_line(tmp_path: Path) -> None:
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}"
    file = write(tmp_path / "d.jsonl", row(), row("no"))
    with pytest.raises(ValueError, match=r"line 2: the chat template refuses .*never"):
        prepare(
            file,
            make_tokenizer(refusing + TEMPLATE),
            max_seq_len=100,
            on_overlong="error",
            cache_root=tmp_path,
        )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        prepare_default(file, tmp_path / "cache")


def test_paths_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        prepare_default(tmp_path / "none.jsonl", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds no data file: name them \*\.jsonl, "):
        prepare_default(tmp_path, tmp_path / "cache")


def test_mark_of_windows_editors_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + SOUND.encode() + b"\r\n")
    assert len(prepare_default(file, tmp_path / "cache")) == 1


def test_sample_of_exactly_the_longest_length_fits(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row("hi", "yes"))
    assert len(prepare_default(file, tmp_path, max_seq_len=9)) == 1
    with pytest.raises(ValueError, match="line 1: 9 tokens are more than max_seq_len 8"):
        prepare_default(file, tmp_path, max_seq_len=8)


def test_overlong_samples_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    rows = [row("hi", "yes"), row("hi", "yes yes"), row("a question without room", "no")]
    file = write(tmp_path / "d.jsonl", *rows)
    dropped = prepared(file, tmp_path, max_seq_len=9, on_overlong="drop")
    assert [trained_text(dropped, i) for i in range(len(dropped))] == ["yes<e>"]
    assert dropped.counts == DataCounts(3, 1, dropped_overlong=2, tokens=9, loss_tokens=4)
    cut = prepared(file, tmp_path, max_seq_len=9, on_overlong="truncate")
    assert [trained_text(cut, i) for i in range(len(cut))] == ["yes<e>", "yes "]
    assert cut.counts == DataCounts(3, 2, truncated=1, dropped_empty=1, tokens=18, loss_tokens=8)


def test_everything_dropped_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    with pytest.raises(ValueError, match="dropped_overlong=1"):
        prepared(file, tmp_path / "cache", max_seq_len=3, on_overlong="drop")
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_second_call_opens_what_the_first_wrote(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    first = prepare_default(file, tmp_path / "cache")
    stamp = (first.folder / "input_ids.npy").stat().st_mtime_ns
    second = prepare_default(file, tmp_path / "cache")
    assert second.folder == first.folder == tmp_path / "cache" / "data" / first.digest
    assert (second.folder / "input_ids.npy").stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "cache" / "data").iterdir()] == [first.digest]
    assert first.folder.stat().st_mode & 0o777 == 0o755


def test_a_full_disk_is_told_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write(tmp_path / "d.jsonl", row())
    monkeypatch.setattr(PreparedWriter, "append", no_space)
    with pytest.raises(OSError, match=r"cache/data: No space left on device; free or add space"):
        prepare_default(file, tmp_path / "cache")
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_digest_follows_what_decides_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    base = prepare_default(file, tmp_path).digest
    renamed = write(tmp_path / "other.jsonl", row())
    assert prepare_default(renamed, tmp_path).digest == base
    others = {
        prepare_default(file, tmp_path, max_seq_len=99).digest,
        prepared(file, tmp_path, on_overlong="drop").digest,
        prepare_default(file, tmp_path, on_bad_sample="skip").digest,
        prepare_default(file, tmp_path, form=Chat(unmask=True)).digest,
        prepare_default(write(tmp_path / "e.jsonl", row(answer="no")), tmp_path).digest,
        prepare(
            file,
            make_tokenizer("<s>" + TEMPLATE),
            max_seq_len=100,
            on_overlong="error",
            cache_root=tmp_path,
        ).digest,
    }
    assert len(others | {base}) == 7


def test_folder_that_is_not_complete_is_made_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    data = prepare_default(file, tmp_path)
    (data.folder / "COMPLETE").unlink()
    (data.folder / "input_ids.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not complete"):
        open_prepared(data.folder)
    assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"


def test_damaged_folder_is_refused_and_made_anew(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", row())
    data = prepare_default(file, tmp_path)
    np.save(data.folder / "loss_mask.npy", np.zeros(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="is damaged"):
        open_prepared(data.folder)
    assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"
    for name in ("meta.json", "input_ids.npy"):
        (data.folder / name).write_bytes(b"\0")
        assert trained_text(prepare_default(file, tmp_path), 0) == "yes<e>"


def test_killed_preparation_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    """The process dies after the arrays are written and before they get their name."""
    file = write(tmp_path / "d.jsonl", row())
    code = (
        "import os, sys, pathlib\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_data\n"
        "pathlib.Path.rename = lambda self, to: os._exit(9)\n"
        "test_data.prepare_default(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))\n"
    )
    arguments = [str(Path(__file__).parent), str(file), str(tmp_path / "cache")]
    died = subprocess.run([sys.executable, "-c", code, *arguments], env=os.environ, check=False)
    assert died.returncode == 9
    assert all(p.name.startswith(".") for p in (tmp_path / "cache" / "data").iterdir())
    assert trained_text(prepare_default(file, tmp_path / "cache"), 0) == "yes<e>"


def test_more_conversations_than_one_group_keep_their_order(tmp_path: Path) -> None:
    rows = [row(answer=f"n{i}") for i in range(300)]
    data = prepare_default(write(tmp_path / "d.jsonl", *rows), tmp_path)
    assert [trained_text(data, i) for i in (0, 63, 64, 299)] == [
        "n0<e>", "n63<e>", "n64<e>", "n299<e>"
    ]  # fmt: skip


def test_arrays_are_little_endian_and_mapped(tmp_path: Path) -> None:
    data = prepare_default(write(tmp_path / "d.jsonl", row()), tmp_path)
    kinds = {f.name: np.load(f, mmap_mode="r").dtype.str for f in data.folder.glob("*.npy")}
    assert kinds == {
        "input_ids.npy": "<i4",
        "loss_mask.npy": "|b1",
        "offsets.npy": "<i8",
        "loss_counts.npy": "<i4",
    }
    assert isinstance(data._ids.base, np.memmap)


def test_missing_end_of_turn_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    prepare(
        write(tmp_path / "d.jsonl", *[row()] * 200),
        make_tokenizer(template),
        max_seq_len=100,
        on_overlong="error",
        cache_root=tmp_path,
    )
    assert caplog.text.count("where to stop") == 1


def test_line_ends_of_windows_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    write(file, row(), "", row(answer="no"))
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    data = prepare_default(file, tmp_path)
    assert [trained_text(data, i) for i in (0, 1)] == ["yes<e>", "no<e>"]
