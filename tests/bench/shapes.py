"""The models of the benchmarks: by configuration, with random weights.

Speed does not depend on the numbers.
"""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

import tiny

SHAPES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "quick": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 896,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
    "llama-27m": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "vocab_size": 8192,
            "hidden_size": 384,
            "intermediate_size": 1152,
            "num_hidden_layers": 11,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "tie_word_embeddings": False,
        },
    ),
    # MLP 3.5 times as wide, as Llama 3's
    "llama-100m": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "vocab_size": 8192,
            "hidden_size": 768,
            "intermediate_size": 2688,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-1.5b": (
        Qwen2,
        Qwen2Config,
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
        },
    ),
    "llama-3.1-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
}
CPU_SHAPES, CUDA_SHAPES = ("quick", "llama-100m"), ("qwen2.5-1.5b", "llama-3.1-8b")


def save(shape: str, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
    """Write the model and a tokenizer as a Hugging Face folder.

    The numbers are drawn on the device: a CPU draws for minutes on 8 billion of them. On CUDA by a
    process of its own, which leaves nothing in the memory that is measured in.
    """
    if device == "cpu":
        _save(shape, folder, dtype, device)
        return
    process = get_context("spawn").Process(target=_save, args=(shape, folder, dtype, device))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{shape} could not be made: exit code {process.exitcode}, see above")


def _save(shape: str, folder: Path, dtype: torch.dtype, device: str) -> None:
    model_class, config_class, values = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = model_class(config_class(**values)).to(dtype)
    model.save_pretrained(folder)
    # Peers want one; no text is tokenised. It comes last, see `is_whole`.
    tiny.tokenizer().save_pretrained(folder)


def is_whole(folder: Path, shape: str) -> bool:
    """Whether this model was written there, to its end.

    Raises:
        ValueError: it is another one.
    """
    if not (folder / "tokenizer.json").is_file():
        return False
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wrong = [name for name, value in SHAPES[shape][2].items() if held.get(name) != value]
    if wrong:
        raise ValueError(f"--base {folder} is no {shape}: {', '.join(wrong)}")
    return True


def counted(shape: str) -> tuple[int, int]:
    """Numbers of the model, and those that a token is multiplied with.

    An embedding is looked up; where it is the head's matrix, too, the head multiplies with it.
    """
    model_class, config_class, values = SHAPES[shape]
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config_class(**values))
    every = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    return every, every if tied else every - int(embedding.numel())


def step_flops(shape: str, multiplied: int, tokens: int) -> float:
    """Floating-point operations of one plain training step, as MFU counts them.

    6 for each multiplied weight and token, and 12 x layers x hidden x tokens^2 for attention;
    recomputation is not counted, nor what a method adds or saves.
    """
    values = SHAPES[shape][2]
    attention = 12 * values["num_hidden_layers"] * values["hidden_size"] * tokens
    return float(tokens) * (6 * multiplied + attention)
