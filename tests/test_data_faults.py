"""What is wrong with data is named by file, line and reason, or skipped and counted."""

from pathlib import Path
from typing import Any

import pytest

from data_rows import SOUND, TEMPLATE, make_tokenizer, prepare_default, row, trained_text, write
from osft_trainer import faults
from osft_trainer.data import prepare
from osft_trainer.prepared import PreparedWriter

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
    "content of an image": (
        SOUND.replace('"yes"', '[{"type": "text", "text": "a"}, {"type": "image_url"}]'),
        "message 2 (assistant): part 2 of 'content' is 'image_url': only text is trained, so",
    ),
    "content of plain strings": (
        SOUND.replace('"yes"', '["yes"]'),
        "part 1 of 'content' is a string: only text is trained, so give parts as {",
    ),
    "content of thoughts": (
        SOUND.replace('"yes"', '[{"type": "thinking", "thinking": "a"}]'),
        "part 1 of 'content' is 'thinking': only text is trained, so",
    ),
    "weight": (
        SOUND.replace('"yes"', '"yes", "weight": 0.5'),
        "'weight' must be 1 (learned as usual) or 0 (read and not learned), is 0.5",
    ),
    "weight true": (SOUND.replace('"yes"', '"yes", "weight": true'), "'weight' must be 1 "),
    "template arguments": (
        SOUND.replace("{", '{"chat_template_kwargs": [1], ', 1),
        "'chat_template_kwargs' must be an object, is a list",
    ),
    "template argument taken": (
        SOUND.replace("{", '{"chat_template_kwargs": {"tokenize": true}, ', 1),
        "'chat_template_kwargs' holds 'tokenize', which is not the chat template's: remove it",
    ),
    "messages as an argument": (
        SOUND.replace("{", '{"chat_template_kwargs": {"messages": []}, ', 1),
        "'chat_template_kwargs' holds 'messages', which is not the chat template's: remove it",
    ),
    "thoughts that are not written": (
        SOUND.replace('"yes"', '"yes", "thinking": "b"'),
        "message 2 (assistant): the chat template does not write its thoughts (reasoning_content)",
    ),
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


def test_one_fault_is_told_before_all_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows are read on, to name a second one; nothing more is written."""
    written = 0
    append = PreparedWriter.append

    def counted(writer: PreparedWriter, *sample: Any) -> int:
        nonlocal written
        written += 1
        return append(writer, *sample)

    monkeypatch.setattr(faults, "ROWS_AFTER_THE_FIRST", 200)
    monkeypatch.setattr(PreparedWriter, "append", counted)
    rows = [row()] * 64 + ["no"] + [row()] * 99 + ["no"] + [row()] * 100
    near = write(tmp_path / "near.jsonl", *rows, row(), *["no"] * 9)
    with pytest.raises(
        ValueError, match=r"2 problems in the data \(reading stopped 200 rows behind the first\):"
    ) as caught:
        prepare_default(near, tmp_path / "cache")
    assert [f"line {n}:" in str(caught.value) for n in (65, 165, 267)] == [True, True, False]
    assert written == 64
    with pytest.raises(ValueError, match=r"2 problems in the data:\n"):
        prepare_default(write(tmp_path / "short.jsonl", *rows), tmp_path / "cache")


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
