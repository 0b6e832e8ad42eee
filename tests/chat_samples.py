# ruff: noqa: RUF001 - the bars in one family's control tokens are full-width
"""Real chat templates, a tokenizer for each, and conversations to render with them.

The templates are those that trl carries: they are read at run time and never copied.
"""

import datetime
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from osft_trainer.masking import ChatMasker, MaskedTokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the cat sat on the mat", "Assistant: the user asked\n\n", "What is <b>bold</b> text?"]


def make_tokenizer(template: str, *, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, so that tokens cross word and prompt borders."""
    control = re.findall(r"<[|｜]?[A-Za-z_▁/]+[|｜]?>", template)
    control = [t for t in control if any(mark in t for mark in "|｜_") and "think" not in t]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    names = ["<s>", "</s>", *special, *control]
    backend.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(names)])
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def trained_runs(tokenizer: PreTrainedTokenizerFast, sample: MaskedTokens) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, trained in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if trained:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


# What each family writes between the generation prompt and the answer, and what ends a turn.
# Written by hand from the templates' texts; the longest matching name wins. "\n\n" is one token
# here: where the prompt ends in "<think>\n" its line end is the answer's first token's.
FAMILIES = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek": ("", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("", "<turn|>"),
    "gemma": ("", "<end_of_turn>"),
    "gemma4": ("", "<turn|>"),
    "glm4moe": ("\n<think></think>\n", "<|user|>"),  # its turns end with the next one's first token
    "gptoss": ("<|channel|>final<|message|>", "<|return|>"),
    "idefics3": (" ", "<end_of_utterance>"),
    "lfm2": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "llava_next": (" ", "</s>"),
    "muse_glimmer": (" to=user<|message|>", "<|eot|>"),
    "nemotron": ("</think>", "<|im_end|>"),
    "phi3": ("", "<|end|>"),
    "qwen2": ("", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_5_nothink": ("", "<|im_end|>"),
    "qwen3_5_think": ("\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_6": ("\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_8": ("\n\n</think>\n\n", "<|im_end|>"),
    "qwen3_instruct": ("", "<|im_end|>"),
    "qwen3_vl": ("", "<|im_end|>"),
    "smolvlm": (" ", "<end_of_utterance>"),
}


def template_files() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]
WITHOUT_CALLS = (
    *("cohere", "gemma3", "gemma", "idefics3", "llama3", "llava_next", "phi3", "qwen2_5_vl"),
    *("smolvlm", "deepseek_r1_distill", "lfm2"),
)
"""Templates that write no calls; deepseek_r1_distill asks for content that is null, which
transformers leaves out."""


def agent(*, thoughts: str | None = "reasoning_content", as_text: bool = False) -> list[Any]:
    """A question, a call, its result, an answer."""
    arguments: Any = {"city": "Paris"}
    call = {
        "type": "function",
        "id": "call00001",
        "function": {
            "name": "get_weather",
            "arguments": json.dumps(arguments) if as_text else arguments,
        },
    }
    result = {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call00001",
        "content": "RESULT",
    }
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    answering = {"role": "assistant", "content": "ANSWER"}
    if thoughts:
        calling[thoughts], answering[thoughts] = "THOUGHT1", "THOUGHT2"
    return [{"role": "user", "content": "QUESTION"}, calling, result, answering]


def on_real_templates(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of `path` once for each template."""
    return _on(template_files(), test)


def on_published_templates(test: Callable[..., None]) -> Callable[..., None]:
    """The same without those that trl made of others of them, to train with."""
    return _on([path for path in template_files() if not path.stem.endswith("_training")], test)


def _on(files: list[Path], test: Callable[..., None]) -> Callable[..., None]:
    marked = pytest.mark.parametrize("path", files, ids=lambda path: path.stem)(test)
    return pytest.mark.skipif(not files, reason="trl is not installed: it carries them")(marked)


def family_of(path: Path) -> str:
    return max((name for name in FAMILIES if path.stem.startswith(name)), key=len)


@functools.cache
def real_masker(path: Path) -> tuple[PreTrainedTokenizerFast, ChatMasker]:
    end = FAMILIES[family_of(path)][1]
    tokenizer = make_tokenizer(path.read_text(), special=(end,) if end else ())
    return tokenizer, ChatMasker(tokenizer)


def writes_calls(path: Path) -> bool:
    return path.stem.removesuffix("_training").removesuffix("_5") not in (
        *WITHOUT_CALLS,
        *("cohere2",),
    )


def writes_all_thoughts(path: Path) -> bool:
    """Whether it writes those of calls and those of answers, after results of tools, too."""
    of_calls_only = ("gemma4", "gemma4_v3", "gemma4_v4")
    masker = real_masker(path)[1]
    return masker.template.thoughts is not None and path.stem not in of_calls_only


def whole_conversations() -> dict[str, tuple[list[Any], list[Any] | None, bool]]:
    """Messages, tools, whether other turns are learned: what usual templates write all of."""
    asked = ("What is the mat?", "the cat sat", "And 2+2?", "It is <4> für dich 🙂.")
    longer = [{"role": "system", "content": "SYSTEM"}, *agent(thoughts=None), *chat("MORE", "SO")]
    return {
        "plain": (chat(*asked), None, False),
        "system": (chat(*asked, system="SYSTEM be kind"), None, False),
        "agent": (agent(thoughts=None), TOOLS, False),
        "longer": (longer, TOOLS, False),
        "unmask": (chat(*asked), None, True),
    }


def ids_digest(masker: ChatMasker) -> dict[str, str]:
    """Of each conversation that the template takes: a digest of its token ids and their mask."""
    found = {}
    for name, (messages, tools, unmask) in whole_conversations().items():
        try:
            samples = masker.tokenize(masker.texts(messages, tools, unmask=unmask))
        except ValueError:
            continue
        lines = [f"{s.input_ids.tolist()} {s.loss_mask.tolist()}" for s in samples]
        found[name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return found


class FirstOfMay(datetime.datetime):
    """The day that templates write, where their text shall be the same every day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "FirstOfMay":
        return cls(2026, 5, 1, tzinfo=tz)
