"""Makes the small model of the demo: a Llama with 0.4 M weights that learns its first skills here.

Called by demo.py and by the end-to-end tests. Plain torch on fresh samples, no hub.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import skills
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

BATCH = 96
PEAK_LEARNING_RATE = 3e-3


def config(vocabulary: int) -> LlamaConfig:
    """Three layers of width 96: the smallest that learned all three skills to 100 %."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chats: Sequence[dict]) -> torch.Tensor:
    """Token numbers of whole chats, [chats, tokens]; all have one length."""
    texts = [
        "".join(f"<|{turn['role']}|> {turn['content']} <|end|> " for turn in chat["messages"])
        for chat in chats
    ]
    return torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])


def pretrain(
    folder: Path,
    names: Sequence[str],
    steps: int = 700,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    whole_text: bool = False,
) -> None:
    """Train from scratch on these skills and save a Hugging Face folder.

    `whole_text`: learn the questions, too, so that the model can write text by itself.
    """
    torch.manual_seed(seed)
    source = random.Random(seed)
    tokenizer = skills.tokenizer()
    model = LlamaForCausalLM(config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    for step in range(steps):
        chats = [_fresh(names[i % len(names)], source) for i in range(BATCH)]
        tokens = encode(tokenizer, chats)
        labels = tokens.clone()
        if not whole_text:
            labels[:, : -(skills.LENGTH + 1)] = -100  # the answer and its end are learned
        loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, float(loss.detach()))
    # under another name first: an interrupted demo leaves no half a model that is taken for whole
    saving = folder.with_name(f"{folder.name}.new")
    # Its bar for one small file stands in the middle of what the demo tells.
    logging.disable_progress_bar()
    model.save_pretrained(saving)
    tokenizer.save_pretrained(saving)
    saving.rename(folder)


def _fresh(skill: str, source: random.Random) -> dict:
    return skills.sample(skill, [source.randrange(10) for _ in range(skills.LENGTH)])
