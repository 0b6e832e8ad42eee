"""Small skills on strings of digits: data, tokenizer and exact-match scoring.

Used by the demo and the end-to-end tests. A skill is a word and a function on digits; a sample is
the chat `user: rev 3 1 4` / `assistant: 4 1 3`. Needs no hub: the tokenizer is built here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

Digits = list[int]

SKILLS: dict[str, Callable[[Digits], Digits]] = {
    "rev": lambda digits: digits[::-1],
    "sort": sorted,
    "inc": lambda digits: [(digit + 1) % 10 for digit in digits],
    "rot": lambda digits: digits[1:] + digits[:1],
    "swap": lambda digits: digits[len(digits) // 2 :] + digits[: len(digits) // 2],
}
LENGTH = 6
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def sample(skill: str, digits: Digits) -> dict[str, list[dict[str, str]]]:
    """One chat: the skill's word and digits, answered by the skill's result."""
    answer = " ".join(map(str, SKILLS[skill](digits)))
    question = " ".join([skill, *map(str, digits)])
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def samples(skill: str, count: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """So many chats; held-out ones by another seed (a million strings, so few meet)."""
    source = random.Random(f"{skill}/{seed}")
    for _ in range(count):
        yield sample(skill, [source.randrange(10) for _ in range(LENGTH)])


def write_jsonl(path: Path, skill: str, count: int, seed: int) -> None:
    """Write chats as the trainer reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item) + "\n" for item in samples(skill, count, seed))
    # at once: an `osft run` in another window may be reading it
    writing = path.with_name(f".{path.name}.new")
    writing.write_text("".join(lines), encoding="utf-8")
    writing.replace(path)


def tokenizer() -> object:
    """A transformers tokenizer with one token a digit, skill word and role."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    words = [*special, *map(str, range(10)), *SKILLS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
    )
    made.chat_template = TEMPLATE
    return made
