"""Rows of training data for tests, what prepares them, and a tokenizer of one token a byte."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from osft_trainer.data import PreparedData, prepare

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


SOUND = json.dumps(row())
