"""What ends an assistant's turn: a stop token of the model's folder, or what is written next."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from chat_samples import (
    CHATML,
    FAMILIES,
    TOOLS,
    agent,
    chat,
    family_of,
    make_tokenizer,
    on_real_templates,
    real_masker,
    trained_runs,
    writes_calls,
)
from data_rows import row, write
from osft_trainer.base_model import stop_token_ids
from osft_trainer.config import TrainingParameters
from osft_trainer.data import form_of, prepare
from osft_trainer.masking import ChatMasker, OnMissingEos
from osft_trainer.samples import Chat
from osft_trainer.turn_ends import MissingTurnEnd

# Written by hand from the templates' texts: what stops the model behind a call.
CALL_ENDS = {
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
    "gemma4_v2": "<turn|>",
    "glm4moe": "<|observation|>",
    "gptoss": "<|call|>",
    "lfm2": "<|im_end|>",
}


@on_real_templates
def test_real_templates_end_a_call_with_what_stops_the_model(path: Path) -> None:
    """Not with the end of the call itself, behind which another call may follow."""
    tokenizer, masker = real_masker(path)
    if not writes_calls(path):
        with pytest.raises(ValueError, match=r"does not write|refuses the conversation"):
            masker.texts(agent(thoughts=None), TOOLS)
        return
    calls = masker.tokenize(masker.texts(agent(thoughts=None), TOOLS))[0]
    known = [name for name in CALL_ENDS if path.stem.startswith(name)]
    end = CALL_ENDS[max(known, key=len)] if known else FAMILIES[family_of(path)][1]
    assert trained_runs(tokenizer, calls)[0].endswith(end)


NEXT_ROLE_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.name }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROLES = ("<|user|>", "<|tool|>", "<|assistant|>", "<|system|>", "<tool_call>", "</tool_call>")


def runs(template: str, messages: list[dict[str, Any]], *stops: str) -> list[list[str]]:
    tokenizer = make_tokenizer(template, special=(*ROLES, *stops))
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    masker = ChatMasker(tokenizer, ids)
    return [trained_runs(tokenizer, each) for each in masker.tokenize(masker.texts(messages))]


def test_a_turn_without_a_token_of_its_own_ends_with_the_next_roles() -> None:
    """One sample all the same: the text goes on so."""
    messages = [*chat("go", "")[:2], {"role": "tool", "content": "gone"}]
    messages[1]["tool_calls"] = [{"name": "walk"}, {"name": "walk"}]
    messages += chat("", "home", "and?", "nothing")[1:]
    calls = "<tool_call>walk</tool_call>" * 2
    assert runs(NEXT_ROLE_ENDS, messages) == [
        [f"\n{calls}<|tool|>", "\nhome<|user|>", "\nnothing<|user|>"]
    ]


def test_a_token_that_the_folder_names_goes_before_what_the_template_ends_with() -> None:
    """Here a template closes each turn with a mark that stops nobody."""
    template = NEXT_ROLE_ENDS.replace(
        "{% endfor %}{% endfor %}", "{% endfor %}<|shown|>{% endfor %}"
    )
    assert runs(template, chat("hi", "yes"), "<|shown|>") == [["\nyes<|shown|>"]]
    assert runs(template, chat("hi", "yes"), "<|user|>") == [["\nyes<|shown|><|user|>"]]


def test_the_end_of_thoughts_is_no_end_of_a_turn() -> None:
    template = NEXT_ROLE_ENDS.replace(
        "\n{{ m.content }}",
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
    )
    assert runs(template, chat("hi", "")) == [["<think></think><|user|>"]]


ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def prepared(tmp_path: Path, template: str, **form: Any) -> Any:
    file = write(tmp_path / "d.jsonl", *[row("hi", "yes"), row("so", "no")] * 50)
    tokenizer = make_tokenizer(template)
    data = prepare(
        file,
        tokenizer,
        max_seq_len=100,
        on_overlong="error",
        on_bad_sample="skip",
        cache_root=tmp_path,
        form=Chat(**form),
    )
    return [tokenizer.decode(data.sample(i)[0]) for i in (0, 1)]


def test_where_no_end_can_be_trained_is_one_error(tmp_path: Path) -> None:
    """Also where bad rows are skipped: the template is at fault."""
    with pytest.raises(ValueError, match="on_missing_eos to append") as caught:
        prepared(tmp_path, ENDLESS)
    assert str(caught.value).startswith("model_path: the chat template ends an assistant's turn")
    assert str(caught.value).endswith("(seen in d.jsonl, line 1)")


@pytest.mark.parametrize(("choice", "end", "warnings"), [("append", "</s>", 0), ("ignore", "", 1)])
def test_the_missing_end_is_appended_or_left_out(
    tmp_path: Path, choice: OnMissingEos, end: str, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = prepared(tmp_path, ENDLESS, on_missing_eos=choice)
    assert texts == [f"user: hi\nassistant: yes{end}", f"user: so\nassistant: no{end}"]
    assert caplog.text.count("where to stop") == warnings


def test_nothing_can_be_appended_without_an_eos_token() -> None:
    tokenizer = make_tokenizer(ENDLESS)
    tokenizer.eos_token = None
    with pytest.raises(MissingTurnEnd, match="on_missing_eos append: the tokenizer has no eos_tok"):
        ChatMasker(tokenizer, on_missing_eos="append").texts(chat("hi", "yes"))


def test_an_end_at_which_no_server_stops_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prepared(tmp_path, CHATML)
        assert caplog.text.count("'<|im_end|>', at which a server does not stop") == 1
        caplog.clear()
        ids = make_tokenizer(CHATML).convert_tokens_to_ids(["<|im_end|>"])
        prepared(tmp_path, CHATML, stop_token_ids=tuple(ids))
    assert "does not stop" not in caplog.text


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"text_config": {"eos_token_id": [7, 3]}}}, (3, 7)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"top_k": 1}}, (2,)),
        (
            {"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [9]}},
            (9,),
        ),
        ({"generation_config.json": {"eos_token_id": [True, None, "x", 4]}}, (4,)),
        ({"generation_config.json": ["no object"]}, ()),
    ],
)
def test_stop_tokens_of_a_model_folder(
    tmp_path: Path, files: dict[str, Any], ids: tuple[int, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert stop_token_ids(tmp_path) == ids


def test_a_run_reads_them_from_its_model(tmp_path: Path) -> None:
    """So they belong to what the prepared data are named by."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    training = TrainingParameters(
        model_path=str(tmp_path), data_path="d", ckpt_output_dir="o", unfreeze_rank_ratio=0.5,
        effective_batch_size=1, max_tokens_per_gpu=8, max_seq_len=8, learning_rate=0.1,
        on_missing_eos="append",
    )  # fmt: skip
    assert form_of(training) == Chat(stop_token_ids=(1, 5), on_missing_eos="append")
