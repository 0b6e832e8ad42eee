"""Text that a model writes itself: how much at once, of which form, and what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

import tiny
from chat_samples import CHATML, make_tokenizer, on_published_templates, real_masker
from osft_trainer import self_sampling
from osft_trainer.chat_template import ChatTemplate
from osft_trainer.config import TrainingParameters
from osft_trainer.model import load_model, load_tokenizer
from osft_trainer.report import RunFolder
from osft_trainer.self_sampling import sample_conversations, samples_at_once
from tiny_models import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_and_values_of_all_samples_stay_in_their_bound(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what the model really holds after a pass."""
    # A window shorter than the text holds less; here none is.
    wide = {"sliding_window": 64} if "sliding_window" in FAMILIES[family][1] else {}
    model, length = tiny_model(family, **wide), 4
    cache = model(torch.ones(1, length, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    monkeypatch.setattr(self_sampling, "CACHE_BYTES", 10 * held)
    assert samples_at_once(model, length) == 10
    assert samples_at_once(model, 10 * length) == 1
    assert samples_at_once(model, 100 * length) == 1, "one more than none"
    assert samples_at_once(model.bfloat16(), length) == 20
    monkeypatch.undo()
    assert samples_at_once(model, length) == self_sampling.AT_ONCE


def test_a_small_bound_gives_as_much_text(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    widest: list[int] = []
    real = hf.generate

    def generate(**told: Any) -> Any:
        widest.append(len(told["input_ids"]))
        return real(**told)

    monkeypatch.setattr(hf, "generate", generate)
    monkeypatch.setattr(self_sampling, "CACHE_BYTES", 3 * 40 * 2 * 2 * 2 * 8 * 4)
    found = sample_conversations(hf, tokenizer, tokens=200, max_seq_len=40, seed=3)
    assert max(widest) == 3
    assert len(found) > 3


def own_text(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(
        base, base.parent / "data.jsonl", out, num_epochs=1, split_by="activations",
        retention_tokens=600, **changes,
    )  # fmt: skip


def without_template(base: Path, folder: Path) -> Path:
    model = tiny.model_folder(folder)
    (model / "chat_template.jinja").unlink()
    assert load_tokenizer(model).chat_template is None
    return model


def test_a_tokenizer_without_a_template_is_refused_by_the_parameters_name(
    base: Path, tmp_path: Path
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 20
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = without_template(base, tmp_path / "model")
    told = own_text(base, tmp_path / "out", use_processed_dataset=True)
    told = told.model_copy(update={"model_path": str(model), "data_path": str(data)})
    with pytest.raises(ValueError, match=r"^retention_data_path: the tokenizer has no chat templ"):
        tiny.run(told)


@pytest.mark.parametrize("column", [None, "story"])
def test_a_run_on_documents_reads_documents_that_the_model_writes(
    base: Path, tmp_path: Path, column: str | None
) -> None:
    """No chat template is needed for them."""
    model = without_template(base, tmp_path / "model")
    data = tmp_path / "documents.jsonl"
    name = column or "document"
    data.write_text("".join(json.dumps({name: f"once {n} " * 9}) + "\n" for n in range(30)))
    told = own_text(
        base, tmp_path / "out", is_pretraining=True, block_size=32, document_column_name=column
    )
    told = told.model_copy(update={"model_path": str(model), "data_path": str(data)})
    result = tiny.run(told)
    assert result.retention is not None
    (path,) = (RunFolder(tmp_path / "out").cache / "retention").iterdir()
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(row) == [column or "text"] for row in written)


class Scripted(LlamaForCausalLM):
    """Writes one text, whatever part of it is given; the library's own generation asks it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        super().__init__(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip
        self._tokenizer, self._text = tokenizer, text
        assert self.generation_config is not None
        self.generation_config.use_cache = False

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:  # type: ignore[override]
        logits = torch.full((len(input_ids), 1, len(self._tokenizer)), -1e9)
        for row, ids in enumerate(input_ids.tolist()):
            given = self._tokenizer.decode(ids)
            assert self._text.startswith(given), given
            rest = self._text[len(given) :]
            following = self._tokenizer(rest, add_special_tokens=False)["input_ids"]
            logits[row, 0, (following or [self._tokenizer.eos_token_id])[0]] = 0
        return CausalLMOutputWithPast(logits=logits)


def conversation_of(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """What is made of a model that writes a question, an answer, and goes on, as it was taught."""
    template = ChatTemplate(tokenizer)
    prompt = template.prompted(template.adapted(asked()))
    going_on = [
        *asked(),
        {"role": "assistant", "content": "SAID"},
        {"role": "user", "content": "MORE"},
    ]
    answered, behind = (
        template.tried(turns).partition("SAID")[2] for turns in (going_on[:2], going_on)
    )
    # Behind the last answer some templates write another token than within a conversation.
    behind = answered + behind if answered.strip() else behind
    return sampled(tokenizer, f"{prompt}SAID{behind}", monkeypatch)


def sampled(
    tokenizer: PreTrainedTokenizerFast, written: str, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """The conversation that is made of a model that writes this text."""
    monkeypatch.setattr(self_sampling, "AT_ONCE", 1)
    model = Scripted(tokenizer, written)
    (sample,) = sample_conversations(model, tokenizer, tokens=1, max_seq_len=9999, seed=0)
    found = sample["messages"]
    assert isinstance(found, list)
    return found


WRITTEN = [{"role": "user", "content": "ASKED"}, {"role": "assistant", "content": "SAID"}]


@on_published_templates
def test_question_and_answer_are_cut_where_the_template_ends_a_turn(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether that is the token that ends the model's turns, another one, or the next header."""
    assert conversation_of(real_masker(path)[0], monkeypatch) == WRITTEN


@on_published_templates
def test_thoughts_and_answer_come_back_as_the_template_writes_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that is learned from is what the model wrote, control tokens and all."""
    tokenizer, masker = real_masker(path)
    template = masker.template
    prompt = template.prompted(template.adapted(asked()))
    answer = {"role": "assistant", "content": "SAID"}
    thinking = answer | {str(template.thoughts): "THOUGHT"}
    written = template.tried([*asked(), thinking])
    if template.thoughts and "THOUGHT" in written and written.startswith(prompt):
        answer = thinking
    else:
        written = template.tried([*asked(), answer])
    if not written.startswith(prompt):  # the prompt opens thoughts that the template cuts off
        answer["content"] = "THOUGHT\n</think>\n\nSAID"
        written = f"{prompt}{answer['content']}{written.partition('SAID')[2]}"
    messages = sampled(tokenizer, written, monkeypatch)
    assert messages == [*asked(), answer]
    (text,) = masker.texts(messages)
    assert text.text.startswith(written.rstrip())


def asked() -> list[dict[str, str]]:
    return [{"role": "user", "content": "ASKED"}]


ENDLESS_QUESTIONS = {
    "a token": ("[INST] ", "[/INST]", " ", "</s>"),
    "text": ("[Q] ", " [/Q]", " ", "</s>"),
    "a header of text": ("<|user|>\n", "\n", "<|assistant|>\n", "</s>\n"),
    "headers of text alone": ("User: ", "\n\n", "Assistant: ", "\n\n"),
}


@pytest.mark.parametrize("parts", ENDLESS_QUESTIONS.values(), ids=ENDLESS_QUESTIONS)
def test_a_users_turn_need_not_end_in_a_stop_token(
    parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, behind, answer, answered = (json.dumps(part) for part in parts)
    template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}"
        f"{{{{ {ask} + m.content + {behind} }}}}"
        f"{{% else %}}{{{{ {answer} + m.content + {answered} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer} }}}}{{% endif %}}"
    )
    tokenizer = make_tokenizer(CHATML, special=("[INST]", "[/INST]"))
    tokenizer.chat_template = template
    assert conversation_of(tokenizer, monkeypatch) == WRITTEN
