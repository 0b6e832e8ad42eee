"""Exact-match scores of a model folder on held-out samples. Needs only `transformers`.

Called by demo.py, and by the end-to-end tests in an environment that holds only transformers:
`python score.py FOLDER rot rev` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import skills

HELD_OUT_SEED = 1_000_000
COUNT = 200


def scores(folder: Path, names: list[str], count: int = COUNT) -> dict[str, float]:
    """Share of held-out questions that the model answers exactly, by skill, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {name: _score(model, tokenizer, name, count) for name in names}


def _score(model: object, tokenizer: object, name: str, count: int) -> float:
    import torch

    chats = list(skills.samples(name, count, HELD_OUT_SEED))
    questions = [chat["messages"][:1] for chat in chats]
    prompt = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answers = model.generate(**prompt, max_new_tokens=skills.LENGTH + 1, do_sample=False)
    told = tokenizer.batch_decode(answers[:, prompt["input_ids"].shape[1] :])
    wanted = [chat["messages"][1]["content"] + " <|end|>" for chat in chats]
    return sum(a.split() == b.split() for a, b in zip(told, wanted, strict=True)) / count


if __name__ == "__main__":
    print(json.dumps(scores(Path(sys.argv[1]), sys.argv[2:])))
