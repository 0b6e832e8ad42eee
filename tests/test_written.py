"""No text is lost in silence: each message's words reach the text where they belong, or a refusal.

Over real chat templates with one question, and on templates made for one way of losing text each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from chat_samples import (
    CHATML,
    TOOLS,
    FirstOfMay,
    agent,
    chat,
    ids_digest,
    make_tokenizer,
    on_published_templates,
    on_real_templates,
    real_masker,
    trained_runs,
)
from drawn import SOAK, examples
from osft_trainer.chat_template import Dialogue
from osft_trainer.conversations import THOUGHTS
from osft_trainer.masking import ChatMasker, MaskedText
from readme_tables import TEMPLATES, filled

GOLDEN = Path(__file__).parent / "golden" / "training_ids.json"


@on_real_templates
def test_training_ids_are_as_ever_where_nothing_was_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests that were made before anything was looked for. One template's turns had no end."""
    recorded = json.loads(GOLDEN.read_text()).get(path.stem)
    if path.stem == "glm4moe":
        assert recorded is None
        return
    template = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if recorded is None or recorded["template"] != template:
        pytest.skip("no digest of this template")
    monkeypatch.setattr(chat_template_utils, "datetime", FirstOfMay)
    assert ids_digest(real_masker(path)[1]) == recorded["ids"]


def rows() -> list[list[dict[str, Any]]]:
    """Conversations in which each message has words that no other has."""
    asked = chat("ASKED1", "SAID1", "ASKED2", "SAID2", system="RULE1")
    late = chat("ASKED1", "SAID1", "ASKED2", "SAID2")
    late.insert(2, {"role": "system", "content": "RULE1"})
    twice = [{"role": "system", "content": "RULE1"}, *chat("ASKED1", "SAID1", system="RULE2")]
    developer = [{"role": "developer", "content": "RULE1"}, *chat("ASKED1", "SAID1")]
    inside = chat("ASKED1", "<think>\nTHINK1\n</think>\n\nSAID1", "ASKED2", "SAID2")
    beside = agent(thoughts=None)
    beside[1]["content"] = "BESIDE1"
    between = [*agent(), *chat("ASKED3", "SAID3")]
    return [asked, late, twice, developer, inside, beside, agent(), between]


def own_words(message: dict[str, Any]) -> list[str]:
    content = message["content"].replace("<think>", "").replace("</think>", "")
    calls = ["get_weather", "Paris"] if "tool_calls" in message else []
    return [*content.split(), *(message[key] for key in THOUGHTS if key in message), *calls]


def check_nothing_is_lost(messages: list[dict[str, Any]], texts: list[MaskedText]) -> None:
    """Each answer's words are learned, in order; what others say stands before it, not in it."""
    answers = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
    spans = [(text.text, span) for text in texts for span in text.spans]
    for place, (text, (start, end)) in zip(answers, spans, strict=True):
        learned, before = text[start:end], text[:start]
        for message in messages[:place]:
            if message["role"] != "assistant":
                assert message["content"] in before
                assert message["content"] not in learned
        assert all(word in learned for word in own_words(messages[place]))


@on_real_templates
def test_words_reach_the_text_where_they_belong_or_the_row_is_refused(path: Path) -> None:
    _, masker = real_masker(path)
    for messages in rows():
        dialogue = Dialogue(masker.template, messages, TOOLS)
        try:
            texts = masker.texts_of(dialogue)
        except ValueError:
            continue
        check_nothing_is_lost(messages, texts)
        assert all(text.has_turn_end for text in texts)
        last = max(place for place, m in enumerate(messages) if m["role"] == "assistant")
        begin = texts[-1].text[: texts[-1].spans[-1][0]]
        assert begin.startswith(dialogue.prompt(last)) or not texts[-1].prompt_is_served


PIECES = (
    *("yes", "no", '{"a": 1}', "für dich", "你好", "🙂", "\n\n", "\t", "C:\\new", '"q"', "it's"),
    *("<b>x</b>", "user", "assistant", "{{ x }}", "{% raw %}", "- item", "1.5e3", "None", "&amp;"),
    *("```py\nx = 1\n```", "/no_think", "Paris", "<|user|>"),
)


def drawn_text(draw: random.Random, most: int = 6) -> str:
    pieces = draw.choices(PIECES, k=draw.randint(1, most))
    return "".join(piece + draw.choice(("", " ", "\n")) for piece in pieces)


def drawn_conversation(draw: random.Random) -> list[dict[str, Any]]:
    """Turns that say much the same in awkward characters, some with calls or thoughts."""
    messages = chat(*(drawn_text(draw) for _ in range(2 * draw.randint(1, 3))))
    for place in reversed(range(1, len(messages), 2)):
        if draw.random() < 0.3:
            messages[place]["reasoning_content"] = drawn_text(draw)
        if draw.random() < 0.3:
            call, result = agent(thoughts=None)[1:3]
            call["tool_calls"][0]["function"]["arguments"]["city"] = drawn_text(draw, 2)
            messages[place:place] = [call, {**result, "content": drawn_text(draw)}]
    if draw.random() < 0.5:
        messages.insert(0, {"role": "system", "content": drawn_text(draw)})
    return messages


def missing_in(text: str, words: list[str]) -> list[str]:
    at = 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return [word]
    return []


@on_published_templates
def test_drawn_conversations_are_whole_or_refused(path: Path) -> None:
    _, masker = real_masker(path)
    draw = random.Random(f"{path.stem} {os.urandom(8).hex() if SOAK else ''}")
    for _ in range(examples(4)):
        messages = drawn_conversation(draw)
        try:
            texts = masker.texts(messages, TOOLS)
        except ValueError:
            continue
        answers = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
        spans = [(text.text, span) for text in texts for span in text.spans]
        for place, (text, (start, end)) in zip(answers, spans, strict=True):
            for key in ("content", "reasoning_content"):
                words = re.findall(r"\w+", messages[place].get(key, ""))
                assert not missing_in(text[start:end], words), messages
            for message in messages[:place]:
                if message["role"] != "assistant":
                    words = re.findall(r"\w+", message["content"])
                    assert all(word in text[:start] for word in words), messages


CUTS_THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>OPENED{% endif %}"
)
"""Takes thoughts off every answer, also off the one that is learned."""


def learned_of(template: str, *messages: dict[str, Any]) -> tuple[str, list[str]]:
    """The last sample: what is before the loss, and what is learned."""
    tokenizer = make_tokenizer(template)
    masker = ChatMasker(tokenizer)
    sample = masker.tokenize(masker.texts(messages))[-1]
    before = tokenizer.decode(sample.input_ids[~sample.loss_mask].tolist())
    return before, trained_runs(tokenizer, sample)


@pytest.mark.parametrize("opened", ["", "<think>", "<think>\n"])
@pytest.mark.parametrize("given", ["<think>\nso\n</think>\n\nit", "so\n</think>\n\nit"])
def test_thoughts_that_a_template_cuts_off_the_answer_are_learned_behind_the_prompt(
    opened: str, given: str
) -> None:
    """As the model writes them: what the prompt has opened comes once."""
    template = CUTS_THOUGHTS.replace("OPENED", opened.replace("\n", "{{ '\\n' }}"))
    before, learned = learned_of(template, *chat("who", "<think>a</think>me", "why", given))
    assert before == f"<|user|>who<|assistant|>me</s><|user|>why<|assistant|>{opened}"
    whole = given.removeprefix("<think>" if opened else "")
    assert learned == [whole.removeprefix(opened.removeprefix("<think>")) + "</s>"]


def test_thoughts_beside_the_content_close_what_the_prompt_opens() -> None:
    messages = chat("why", "it")
    messages[1]["reasoning_content"] = "so"
    before, learned = learned_of(CUTS_THOUGHTS.replace("OPENED", "<think>{{ '\\n' }}"), *messages)
    assert before == "<|user|>why<|assistant|><think>\n"
    assert learned == ["so\n</think>\n\nit</s>"]
    with pytest.raises(ValueError, match=r"message 2 \(assistant\): .* \(reasoning_content\), so"):
        learned_of(CUTS_THOUGHTS.replace("OPENED", ""), *messages)


def test_an_answer_without_thoughts_behind_a_prompt_that_opens_them_is_marked() -> None:
    template = CUTS_THOUGHTS.replace("OPENED", "<think>{{ '\\n' }}")
    masker = ChatMasker(make_tokenizer(template))
    (text,) = masker.texts(chat("why", "it"))
    assert (text.text, text.prompt_is_served) == ("<|user|>why<|assistant|>it</s>", False)


CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}WRITTEN{% endfor %}",
)
PARIS, ROME = (
    {"name": "fly", "arguments": {"to": city, "by": ["plane", {"seats": 2}]}}
    for city in ("Paris", "Rome")
)
ZÜRICH = {"name": "fly", "arguments": {"to": "Zürich, 1. Stock\nlinks", "by": ["plane"]}}


@pytest.mark.parametrize(
    ("written", "calls", "refusal"),
    [
        ("{{ c | tojson }}", [PARIS, ROME], None),
        ("{{ c | tojson(ensure_ascii=True) }}", [ZÜRICH], None),
        ("{{ c.name }}({{ c.arguments | tojson }})", [PARIS, PARIS], None),
        ("{% if loop.first %}{{ c | tojson }}{% endif %}", [PARIS, PARIS], "calls 'fly', which"),
        ("{% if loop.first %}{{ c | tojson }}{% endif %}", [PARIS, ROME], "calls 'fly', which"),
        ("{{ c.name }}()", [PARIS], "calls 'fly' with 'to', which the chat template does not"),
        ("{{ c.name }} to {{ c.arguments.to }} by plane", [PARIS], "with 'seats', which"),
    ],
)
def test_each_call_is_written_with_its_arguments(
    written: str, calls: list[dict[str, Any]], refusal: str | None
) -> None:
    messages = [*chat("go", ""), {"role": "tool", "content": "gone"}]
    messages[1]["tool_calls"] = calls
    masker = ChatMasker(make_tokenizer(CALLS.replace("WRITTEN", written)))
    if refusal is None:
        assert masker.texts(messages)[0].text.count("plane") == len(calls)
        return
    with pytest.raises(ValueError, match=refusal):
        masker.texts(messages)


TURN = "{% if SHOWN %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endif %}"
HEAD = "m.content.split('[')[0] if m.role == ROLE else m.content"
LOSING = {
    "the first of two system turns": ("m.role != 'system' or loop.index0 == 1", "m.content", 1),
    "results of tools": ("m.role != 'tool'", "m.content", 4),
    "a user's brackets": ("true", HEAD.replace("ROLE", "'user'"), 3),
    "an assistant's brackets": ("true", HEAD.replace("ROLE", "'assistant'"), 5),
}


@pytest.mark.parametrize(("shown", "content", "number"), LOSING.values(), ids=LOSING)
def test_a_row_is_refused_of_which_the_template_loses(
    shown: str, content: str, number: int
) -> None:
    """Also where what is lost stands elsewhere in the conversation."""
    turn = TURN.replace("SHOWN", shown).replace("CONTENT", content)
    end = CHATML[CHATML.index("{% if add") :]
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}{end}"
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "who [and why]"},
        {"role": "tool", "content": "who"},
        {"role": "assistant", "content": "who [and why]"},
    ]
    role = messages[number - 1]["role"]
    with pytest.raises(
        ValueError, match=rf"^message {number} \({role}\): the chat template leaves"
    ):
        ChatMasker(make_tokenizer(template)).texts(messages)


KEEPING = {
    "JSON strings": "{{ m.content | tojson }}",
    "ASCII alone": "{{ m.content | tojson(ensure_ascii=True) }}",
    "no white space at the ends": "{{ m.content | trim }}",
    "flags that decide": "{{ m.content | replace('/quiet', '') }}"
    "{% if '/quiet' in m.content %}({{ 'silent' }}){% endif %}",
    "other tags": "{{ m.content | replace('<b>', '**') | replace('</b>', '**') }}",
}


@pytest.mark.parametrize("written", KEEPING.values(), ids=KEEPING)
def test_other_spellings_are_no_loss(written: str) -> None:
    content = '  says "<b>für</b>" C:\\new\n你好 世界 /quiet\t🙂 '
    messages = [*chat(content, content, system=content), {"role": "tool", "content": content}]
    messages.append({"role": "assistant", "content": "done"})
    masker = ChatMasker(make_tokenizer(CHATML.replace("{{ m.content }}", written)))
    assert masker.texts(messages)


def test_rendering_of_a_row_costs_no_more_with_a_form_that_is_known() -> None:
    """The question of each form is asked once, and further renderings only where words miss."""
    masker = ChatMasker(make_tokenizer(CHATML))
    rendered = 0
    render = masker.template.render

    def counted(*args: Any, **options: Any) -> str:
        nonlocal rendered
        rendered += 1
        return render(*args, **options)

    masker.template.render = counted  # type: ignore[method-assign]
    counts = []
    for answer in ("one", "two", "three"):
        rendered = 0
        masker.texts(chat("what now", answer, "and then", "it sat", system="be kind"))
        counts.append(rendered)
    assert counts == [5, 4, 4], "prompt and text of each turn, and of the form once"


def test_the_page_about_templates_is_as_they_are() -> None:
    assert filled(TEMPLATES) == TEMPLATES.read_text(), "make generate"
