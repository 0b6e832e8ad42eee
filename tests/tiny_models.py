"""Tiny random models of every supported family, for tests: a few thousand parameters each."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from osft_trainer.model import OSFTModel, convert
from osft_trainer.subspace import Split
from osft_trainer.targets import Target, plan_targets

VOCABULARY = 64

_COMMON: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {**_COMMON, "head_dim": 8}
_EXPERTS = {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma": ("GemmaConfig", _HEADS),
    "gemma2": ("Gemma2Config", {**_HEADS, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "sliding_window": 4}),
    "phi3": ("Phi3Config", _COMMON),
    "granite": ("GraniteConfig", {**_COMMON, "logits_scaling": 3.0}),
    "gpt2": ("GPT2Config", _GPT2),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
}


def tiny_model(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model; weights are larger than usual so that attention is far from uniform."""
    torch.manual_seed(seed)
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**{**values, **overrides})
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Matrices that are fed what another one is."""


def shared_bases(family: str, ratio: float, **overrides: object) -> OSFTModel:
    """A model split as by activations: matrices that are fed one tensor share a random basis."""
    hf = tiny_model(family, **overrides)
    made: dict[str, nn.Parameter] = {}

    def decompose(target: Target, weight: Tensor) -> Split:
        conv1d = target.kind == "conv1d"
        path, _, leaf = target.module.rpartition(".")
        key = f"{path}.{SAME_INPUT.get(leaf, leaf)}"
        if key not in made:
            width = weight.shape[0 if conv1d else 1]
            torch.manual_seed(len(made))
            basis = torch.linalg.qr(torch.randn(width, target.free_rank))[0]
            made[key] = nn.Parameter(basis if conv1d else basis.T.contiguous(), requires_grad=False)
        return Split(free_rows=made[key]) if conv1d else Split(free_cols=made[key])

    return convert(hf, plan_targets(hf, ratio, split_by="activations"), decompose=decompose)


def save_tiny_model(folder: Path, family: str = "llama", **overrides: object) -> Path:
    """Write such a model as a plain HF folder."""
    tiny_model(family, **overrides).save_pretrained(folder)
    return folder


def packed_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random samples of these lengths in one row; every token but each first one is labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}
