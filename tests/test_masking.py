"""The loss mask: exactly the assistant's words and the end of its turn, whatever the template."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

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
    writes_all_thoughts,
    writes_calls,
)
from osft_trainer.chat_template import common_prefix_length
from osft_trainer.conversations import THOUGHTS
from osft_trainer.masking import ChatMasker, MaskedText, MaskedTokens


def trained(template: str, messages: list[dict[str, Any]], **options: Any) -> list[list[str]]:
    """Trained runs of each sample that the conversation becomes."""
    tokenizer = make_tokenizer(template, special=options.pop("special", ()))
    masker = ChatMasker(tokenizer, on_missing_eos=options.get("on_missing_eos", "error"))
    samples = masker.tokenize(masker.texts(messages, options.get("tools")))
    return [trained_runs(tokenizer, sample) for sample in samples]


@on_real_templates
def test_real_templates_train_the_answers_and_their_ends_only(path: Path) -> None:
    scaffold, end = FAMILIES[family_of(path)]
    tokenizer, masker = real_masker(path)
    messages = chat("What is the mat?", "the cat sat", "And 2+2?", "It is <4> für dich 🙂.")
    texts = masker.texts(messages)
    samples = masker.tokenize(texts)
    expected = [f"{scaffold}the cat sat{end}", f"{scaffold}It is <4> für dich 🙂.{end}"]
    runs = [trained_runs(tokenizer, sample) for sample in samples]
    assert runs in ([expected], [[run] for run in expected])
    assert all(text.has_turn_end for text in texts)
    prompts = [tokenizer.decode(s.input_ids[~s.loss_mask].tolist()) for s in samples]
    assert all("What is the mat?" in prompt for prompt in prompts)


@on_real_templates
def test_real_templates_train_calls_and_thoughts(path: Path) -> None:
    """Calls and answers whole, thoughts where the template writes them, nothing of the others."""
    tokenizer, masker = real_masker(path)
    if not writes_calls(path):
        with pytest.raises(ValueError, match=r"does not write|refuses the conversation"):
            masker.texts(agent(), TOOLS)
        return
    for thoughts in (None, *THOUGHTS):
        if thoughts and not writes_all_thoughts(path):
            with pytest.raises(ValueError, match=r"does not write its thoughts"):
                masker.texts(agent(thoughts=thoughts), TOOLS)
            continue
        texts = masker.texts(agent(thoughts=thoughts), TOOLS)
        assert all("get_weather" in text.text for text in texts)
        runs = [trained_runs(tokenizer, sample) for sample in masker.tokenize(texts)]
        call, answer = [run for sample in runs for run in sample]
        assert "get_weather" in call
        assert "Paris" in call
        assert "ANSWER" not in call
        assert answer.endswith(f"ANSWER{FAMILIES[family_of(path)][1]}")
        for word in ("QUESTION", "RESULT", "Tells the weather"):
            assert word not in call + answer
        assert ("THOUGHT1" in call) == ("THOUGHT2" in answer) == bool(thoughts)
        assert "THOUGHT1" not in answer


@on_real_templates
def test_real_templates_take_arguments_as_object_and_as_text(path: Path) -> None:
    if writes_calls(path):
        _, masker = real_masker(path)
        (as_object, *_), (as_text, *_) = (
            masker.texts(agent(thoughts=None, as_text=form), TOOLS) for form in (False, True)
        )
        assert as_object == as_text
        assert '\\"city' not in as_object.text


@on_real_templates
def test_real_templates_train_every_turn_but_the_systems_when_unmasked(path: Path) -> None:
    tokenizer, masker = real_masker(path)
    system = None if path.stem.startswith("gemma") and "3" not in path.stem else "SYSTEM"
    messages = chat("ASKED1", "ANSWER1", "ASKED2", "ANSWER2", system=system)
    samples = masker.tokenize(masker.texts(messages, unmask=True))
    runs = [run for sample in samples for run in trained_runs(tokenizer, sample)]
    text = "|".join(runs)
    words = re.findall(r"SYSTEM|ASKED\d|ANSWER\d", text)
    assert words == ["ASKED1", "ANSWER1", "ASKED2", "ANSWER2"]
    assert all(re.match(r"ASKED\d", run) for run in runs if "ASKED" in run)


def test_end_of_a_turn_behind_white_space_is_not_the_end_of_the_text() -> None:
    """A control token may close a call, and another one the turn."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
        "<tool_call>{{ m.tool_calls[0].name }}</tool_call>\n{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = chat("go", "")
    messages[1]["tool_calls"] = [{"name": "walk"}]
    special = ("<tool_call>", "</tool_call>")
    runs = trained(template, messages, special=special)
    assert runs == [["<tool_call>walk</tool_call>\n<|im_end|>"]]


def test_scaffold_before_thoughts_is_trained_where_history_changes() -> None:
    """Thoughts go from a turn once another follows, so P and F differ before the turn begins."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking and loop.last %}<|channel|>"
        "{{ m.thinking }}<|end|>{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    template = template.replace("loop.last", "(loop.last or add_generation_prompt)")
    messages = chat("a", "one", "b", "two")
    messages[1]["thinking"] = messages[3]["thinking"] = "hmm"
    assert trained(template, messages) == [
        [f"<|channel|>hmm<|end|><|message|>{answer}<|end|>" for answer in ("one", "two")]
    ], "a server gives the model the thoughts before, so they are in the text that it learns from"


def test_call_that_the_template_does_not_write_is_refused() -> None:
    """Trained as it is, it would teach to say nothing."""
    messages = chat("go", "")
    messages[1]["tool_calls"] = [{"name": "walk"}]
    with pytest.raises(
        ValueError, match="message 2 calls 'walk', which the chat template does not"
    ):
        trained(CHATML, messages)


@pytest.mark.parametrize(
    ("value", "words"),
    [("\ud83d", "holds half a character"), (functools.reduce(lambda v, _: [v], range(900), 1), "")],
)
def test_arguments_that_no_text_can_hold_are_refused(value: Any, words: str) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0] | tojson }}")
    messages = chat("go", "")
    messages[1]["tool_calls"] = [{"name": "walk", "arguments": {"to": value}}]
    with pytest.raises(ValueError, match=words or "refuses the conversation"):
        trained(template, messages)


def test_unmasked_turns_are_trained_from_their_words_to_their_end() -> None:
    messages = chat("hi", "the cat", "and?", "sat on", system="be kind")
    tokenizer = make_tokenizer(CHATML)
    masker = ChatMasker(tokenizer)
    (sample,) = masker.tokenize(masker.texts(messages, unmask=True))
    assert trained_runs(tokenizer, sample) == [
        f"{turn}<|im_end|>" for turn in ("hi", "the cat", "and?", "sat on")
    ]


def test_two_turns_of_a_plain_template_are_one_sample() -> None:
    runs = trained(CHATML, chat("hi", "the cat", "and?", "sat on", system="be kind"))
    assert runs == [["the cat<|im_end|>", "sat on<|im_end|>"]]


def test_end_of_turn_need_not_be_the_end_of_text_token() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}<|stop|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% else %}{{ eos_token }}{% endif %}"
    )
    assert trained(template, chat("a", "one", "b", "two")) == [["one<|stop|>", "two<|stop|>"]]


def test_token_over_the_border_belongs_to_the_answer() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    # " the" is one token here; its blank is the prompt's last character.
    samples = trained(template, chat("hi", "the cat"), on_missing_eos="ignore")
    assert samples == [[" the cat"]]


def test_without_an_end_of_turn_the_text_says_so() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    masker = ChatMasker(make_tokenizer(template), on_missing_eos="ignore")
    assert [text.has_turn_end for text in masker.texts(chat("hi", "yes"))] == [False]


def test_prompt_text_that_moves_is_not_trained() -> None:
    """Some templates put the system prompt before the last user turn while it is the last turn."""
    template = (
        "{% set system = messages[0].role == 'system' and messages[0].content %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and system %}{{ system }} {% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    messages = chat("what now", "the cat", "and then", "it sat", system="secret rule")
    tokenizer = make_tokenizer(template)
    masker = ChatMasker(tokenizer)
    samples = masker.tokenize(masker.texts(messages))
    assert [trained_runs(tokenizer, s) for s in samples] == [[" the cat</s>"], [" it sat</s>"]]
    assert [tokenizer.decode(s.input_ids[~s.loss_mask].tolist()) for s in samples] == [
        "[INST] secret rule what now[/INST]",
        "[INST] what now[/INST] the cat</s>[INST] secret rule and then[/INST]",
    ], "what a server gives the model for each turn"


@on_real_templates
def test_turns_that_became_one_sample_are_predicted_from_the_same_tokens(path: Path) -> None:
    """Each turn's words and all before them, whether other turns share the sample or not."""
    _, masker = real_masker(path)
    messages = chat("What is the mat?", "the cat sat", "And 2+2?", "It is <4>.", "Who?", "the cat")

    def predictions(samples: list[MaskedTokens]) -> set[tuple[int, ...]]:
        return {
            tuple(sample.input_ids[: place + 1].tolist())
            for sample in samples
            for place in sample.loss_mask.nonzero()[0]
        }

    alone = [masker.texts(messages[: 2 * turn])[-1] for turn in (1, 2, 3)]
    only_last = [MaskedText(text.text, text.spans[-1:], True) for text in alone]
    together = masker.texts(messages)
    assert predictions(masker.tokenize(only_last)) == predictions(masker.tokenize(together))


def test_answer_that_starts_like_the_prompts_last_token_is_whole() -> None:
    """The prompt opens a thought, the answer a tag with the same first letters."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    runs = trained(template, chat("hi", "<the cat>"), special=("<|user|>", "<|assistant|>"))
    assert runs == [["<the cat></s>"]]


def test_control_token_that_swallows_the_answers_blank_is_not_trained() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    swallowing = AddedToken("<assistant>", special=True, rstrip=True)
    tokenizer.backend_tokenizer.add_special_tokens([swallowing])
    masker = ChatMasker(tokenizer, on_missing_eos="ignore")
    (sample,) = masker.tokenize(masker.texts(chat("hi", " cat")))
    assert trained_runs(tokenizer, sample) == ["cat"]


def test_empty_answer_trains_the_end_of_the_turn() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    special = ("<|assistant|>", "<|user|>", "<|end|>")
    assert trained(template, chat("hi", ""), special=special) == [["<|end|>"]]


def test_thoughts_of_the_answer_are_trained_with_it() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = chat("hi", "four")
    messages[1]["reasoning_content"] = "two and two"
    assert trained(template, messages) == [["<think>two and two</think>four<|im_end|>"]]


def test_tools_reach_the_template_and_calls_are_trained() -> None:
    template = (
        "{% if tools %}<|im_start|>tools\n{{ tools[0].name }}<|im_end|>\n{% endif %}" + CHATML
    ).replace("{{ m.content }}", "{{ m.content or m.tool_calls[0].name }}")
    messages = chat("go", "")
    messages[1]["tool_calls"] = [{"name": "walk"}]
    tokenizer = make_tokenizer(template)
    masker = ChatMasker(tokenizer)
    (text,) = masker.texts(messages, [{"name": "legs"}])
    assert "tools\nlegs" in text.text
    (sample,) = masker.tokenize([text])
    assert trained_runs(tokenizer, sample) == ["walk<|im_end|>"]


def test_conversation_may_start_with_the_assistant() -> None:
    refuses_empty = "{{ messages[0].role | length and '' }}" + CHATML
    assert trained(refuses_empty, [{"role": "assistant", "content": "the cat"}]) == [
        ["the cat<|im_end|>"]
    ]


def test_sample_ends_with_its_last_target_and_never_starts_with_one() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    masker = ChatMasker(tokenizer, on_missing_eos="ignore")
    messages = [*chat("", "sat 🙂 mat"), {"role": "user", "content": "never answered"}]
    (sample,) = masker.tokenize(masker.texts(messages))
    assert tokenizer.decode(sample.input_ids.tolist()) == "sat 🙂 mat"
    assert not sample.loss_mask[0]
    assert sample.loss_mask[1:].all()


def test_nothing_to_learn_is_an_empty_sample() -> None:
    masker = ChatMasker(make_tokenizer(CHATML))
    (sample,) = masker.tokenize(masker.texts([{"role": "user", "content": "hello"}]))
    assert len(sample.input_ids) == len(sample.loss_mask) == 0


def test_refusal_of_the_template_is_told() -> None:
    refusing = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    masker = ChatMasker(make_tokenizer(refusing))
    with pytest.raises(ValueError, match="refuses the conversation: too long"):
        masker.texts(chat("a", "b", "c", "d"))


def test_tokenizer_without_template_is_refused_with_the_cure() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatMasker(tokenizer)


def test_template_that_loses_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="words out"):
        ChatMasker(make_tokenizer("nothing"))


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "abc", 0), ("abc", "abc", 3), ("abcd", "abxd", 2), ("abc", "abcdef", 3), ("x", "y", 0)],
)
def test_common_prefix_length(first: str, second: str, length: int) -> None:
    assert common_prefix_length(first, second) == length
    assert common_prefix_length(second, first) == length
