"""Preparing conversations: what is trained of them, their order, and those that are too long."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_rows import (
    SOUND,
    TEMPLATE,
    make_tokenizer,
    prepare_default,
    prepared,
    row,
    trained_text,
    write,
)
from osft_trainer.data import DataCounts, prepare
from osft_trainer.samples import Chat, Documents, Form


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


def test_unmask_of_a_sample_trains_its_other_turns(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {**row(), "unmask": True}, {**row(), "unmask": False}, row())
    data = prepare_default(file, tmp_path)
    assert [trained_text(data, i) for i in range(3)] == ["hi<e>yes<e>", "yes<e>", "yes<e>"]
    everywhere = prepare_default(file, tmp_path, form=Chat(unmask=True))
    assert [trained_text(everywhere, i) for i in range(3)] == ["hi<e>yes<e>"] * 3


def test_what_the_template_leaves_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tools, and keys that nothing reads: of rows, of messages, of a template's arguments."""
    named = {**row(), "tools": [{"type": "function", "function": {"name": "f"}}], "id": 7}
    named["chat_template_kwargs"] = {"enable_thinking": False, "add": 1}
    named["messages"][0]["name"] = "Bob"
    named["messages"][1] |= {"prefix": True, "weight": 1}
    data = prepare_default(write(tmp_path / "d.jsonl", *[named] * 9, row()), tmp_path)
    assert [trained_text(data, i) for i in (0, 9)] == ["yes<e>"] * 2
    assert sorted(record.message for record in caplog.records if record.levelname == "WARNING") == [
        "nothing uses 'id' of a row",
        "the chat template does not use 'add' of chat_template_kwargs",
        "the chat template does not use 'enable_thinking' of chat_template_kwargs",
        "the chat template does not use 'name' of a message of the role user",
        "the chat template does not use 'prefix' of a message of the role assistant",
        "the chat template does not write the tools: the model is not told of them",
    ]


def test_keys_that_the_template_reads_are_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shown = "{{ m.name }}{{ m.content | upper if loud else m.content }}"
    template = TEMPLATE.replace("{{ m.content }}", shown)
    rows = [{**row(), "chat_template_kwargs": {"loud": loud}} for loud in (True, False)]
    rows.append({**row(), "chat_template_kwargs": '{"loud": true}'})
    for each in rows:
        each["messages"][0]["name"] = "Bob"
    tokenizer = make_tokenizer(template)
    file = write(tmp_path / "d.jsonl", *rows)
    options: Any = {"max_seq_len": 99, "on_overlong": "error", "cache_root": tmp_path}
    data = prepare(file, tokenizer, **options)
    texts = [tokenizer.decode(data.sample(i)[0]) for i in range(3)]
    assert texts == ["<u>BobHI<e><a>YES<e>", "<u>Bobhi<e><a>yes<e>", "<u>BobHI<e><a>YES<e>"]
    assert caplog.text == ""


def test_a_turn_of_weight_0_is_read_and_not_learned(tmp_path: Path) -> None:
    def weighted(*weights: Any) -> dict[str, Any]:
        turns = [*row("a", "one")["messages"], *row("b", "two")["messages"]]
        return {"messages": [{**turn, "weight": w} for turn, w in zip(turns, weights, strict=True)]}

    rows = [
        weighted(None, 0, None, 1),
        weighted(None, 1.0, None, 0),
        weighted(None, 0, None, 0),
        {**weighted(0, None, None, 0), "unmask": True},
    ]
    data = prepare_default(write(tmp_path / "d.jsonl", *rows), tmp_path)
    assert [trained_text(data, i) for i in range(3)] == ["two<e>", "one<e>", "one<e>b<e>"]
    assert make_tokenizer().decode(data.sample(0)[0]) == "<u>a<e><a>one<e><u>b<e><a>two<e>"
    assert data.counts.dropped_empty == 1


def test_parts_of_text_are_one_content_a_line_each(tmp_path: Path) -> None:
    """As servers read them."""
    parted = row()
    parted["messages"][0]["content"] = [{"type": "text", "text": text} for text in ("one", "two")]
    parted["messages"][1]["content"] = [{"text": "yes", "type": "text"}]
    data = prepare_default(write(tmp_path / "d.jsonl", parted), tmp_path)
    assert make_tokenizer().decode(data.sample(0)[0]) == "<u>one\ntwo<e><a>yes<e>"


@pytest.mark.parametrize("nothing", ["", " \n", "null", "[]", None, []])
def test_a_blank_string_of_calls_or_tools_is_none(tmp_path: Path, nothing: Any) -> None:
    """So has a column of text the rows without any; templates ask whether the key is there."""
    template = (
        "{% if tools %}TOOLS{% endif %}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
        "{% if m.tool_calls is defined %}CALLS{% endif %}<e>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    messages = [{**message, "tool_calls": nothing} for message in row()["messages"]]
    data = prepare(
        write(tmp_path / "d.jsonl", {"messages": messages, "tools": nothing}),
        make_tokenizer(template),
        max_seq_len=100,
        on_overlong="error",
        cache_root=tmp_path,
    )
    assert make_tokenizer().decode(data.sample(0)[0]) == "<u>hi<e><a>yes<e>"


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


def test_more_conversations_than_one_group_keep_their_order(tmp_path: Path) -> None:
    rows = [row(answer=f"n{i}") for i in range(300)]
    data = prepare_default(write(tmp_path / "d.jsonl", *rows), tmp_path)
    assert [trained_text(data, i) for i in (0, 63, 64, 299)] == [
        "n0<e>", "n63<e>", "n64<e>", "n299<e>"
    ]  # fmt: skip


@pytest.mark.parametrize("form", [Chat(), Documents(block_size=9)])
def test_text_that_the_tokenizer_does_not_know_is_named_once(
    tmp_path: Path, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = {"<unk>": 0, "<e>": 1, "hi": 2, "yes": 3, "once": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "<e>"])
    template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
    options: Any = {"eos_token": "<e>", "unk_token": "<unk>", "chat_template": template}
    rows = [{**row("hi", answer), "text": answer} for answer in ("yes", "never", "never")]
    prepare(
        write(tmp_path / "d.jsonl", *rows),
        PreTrainedTokenizerFast(tokenizer_object=backend, **options),
        max_seq_len=9,
        on_overlong="error",
        cache_root=tmp_path,
        form=form,
    )
    assert caplog.text.count("d.jsonl, line 2: the tokenizer has no token for some of") == 1
    assert caplog.text.count("has no token") == 1


def test_line_ends_of_windows_are_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    write(file, row(), "", row(answer="no"))
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    data = prepare_default(file, tmp_path)
    assert [trained_text(data, i) for i in (0, 1)] == ["yes<e>", "no<e>"]
