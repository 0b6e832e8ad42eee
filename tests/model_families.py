"""Tiny model folders of many families, as hubs hold them: for tests of families x invariants.

`FAMILIES` is the table; `save_family` writes a folder; the fixture `family_folder` (conftest) makes
each once, for reading. Unlike `tiny_models.save_tiny_model` a
folder has the class that config.json names, bfloat16 weights, and what real folders have beside
them: towers and heads that the language model does not load, and single tensors in float32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VOCABULARY = 272
"""Room for the tokenizer of `tiny`."""
BLOCKS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HEADS = {**_COMMON, "head_dim": 8}
_EXPERTS = {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_OLD: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
_NEXT_TOKENS = {
    "mtp.fc.weight": (32, 64),
    "mtp.norm.weight": (32,),
    "mtp.layers.0.mlp.gate_proj.weight": (48, 32),
}


@dataclass(frozen=True)
class Family:
    """How a tiny folder of a family is made."""

    architecture: str
    """The class that config.json names; its configuration class is the class's own."""
    values: dict[str, Any]
    float32: str = r"(?!)"
    """Names in the files of tensors that real folders hold in float32, a regular expression."""
    not_loaded: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Further tensors of the files, by shape, that the class does not make."""
    seed: int = 0


_ROUTER_BIAS = r"e_score_correction_bias$"
_STATE_SPACE = r"(A_log|\.D|dt_bias)$"

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _COMMON),
    "llama-tied": Family("LlamaForCausalLM", {**_COMMON, "tie_word_embeddings": True}),
    "mistral": Family("MistralForCausalLM", {**_COMMON, "sliding_window": 4}),
    "qwen2": Family("Qwen2ForCausalLM", _COMMON),
    "qwen3": Family("Qwen3ForCausalLM", _HEADS),
    "gemma": Family("GemmaForCausalLM", {**_HEADS, "tie_word_embeddings": True}),
    "gemma2": Family("Gemma2ForCausalLM", {**_HEADS, "sliding_window": 4}),
    "gemma3": Family("Gemma3ForCausalLM", {**_HEADS, "sliding_window": 4}),
    "phi3": Family("Phi3ForCausalLM", _COMMON),
    "granite": Family("GraniteForCausalLM", {**_COMMON, "logits_scaling": 3.0}),
    "olmo2": Family("Olmo2ForCausalLM", _COMMON),
    "gpt2": Family("GPT2LMHeadModel", _OLD),
    "gpt_neox": Family("GPTNeoXForCausalLM", _COMMON),
    "falcon": Family("FalconForCausalLM", {**_COMMON, "alibi": False}),
    "falcon-rw": Family(
        "FalconForCausalLM",
        {**_COMMON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "opt": Family("OPTForCausalLM", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": Family(
        "MixtralForCausalLM", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _EXPERTS),
    "olmoe": Family("OlmoeForCausalLM", _EXPERTS),
    "gpt_oss": Family(
        "GptOssForCausalLM", {**_EXPERTS, "num_local_experts": 4, "sliding_window": 4}
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _DEEPSEEK, _ROUTER_BIAS),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {**_DEEPSEEK, "head_dim": 8, "num_nextn_predict_layers": 1},
        _ROUTER_BIAS,
        {f"model.layers.{BLOCKS}.mlp.gate_proj.weight": (48, 32)},
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 16},
        _STATE_SPACE,
        _NEXT_TOKENS,
    ),
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {**_HEADS, **_LINEAR},
            "vision_config": _VISION,
            "tie_word_embeddings": False,
        },
        r"A_log$",
        _NEXT_TOKENS,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **_COMMON,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
        _STATE_SPACE,
    ),
    "bamba": Family(
        "BambaForCausalLM", {**_COMMON, **_MAMBA, "attn_layer_indices": [1]}, _STATE_SPACE
    ),
    "phi": Family("PhiForCausalLM", {**_COMMON, "num_key_value_heads": 4}),
    "bloom": Family("BloomForCausalLM", {**_OLD, "hidden_size": 32}),
    "starcoder2": Family("Starcoder2ForCausalLM", _COMMON),
    "cohere2": Family("Cohere2ForCausalLM", {**_HEADS, "tie_word_embeddings": True}),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        {**_COMMON, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    ),
    "jamba": Family(
        "JambaForCausalLM",
        {
            **_COMMON,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        r"(A_log|\.D)$",
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        {
            **_EXPERTS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        _ROUTER_BIAS,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM", {**_EXPERTS, "num_local_experts": 4}, _ROUTER_BIAS
    ),
    "phimoe": Family(
        "PhimoeForCausalLM", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "flex_olmo": Family("FlexOlmoForCausalLM", _EXPERTS),
    "hunyuan_moe": Family("HunYuanMoEV1ForCausalLM", {**_EXPERTS, "moe_topk": 2}),
    "llama4": Family(
        "Llama4ForCausalLM",
        {
            **_HEADS,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
    ),
    "gemma3-vision": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_HEADS, "sliding_window": 4},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        _STATE_SPACE,
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {
            **_HEADS,
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
        _STATE_SPACE,
    ),
}


def save_family(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model folder of a family: random weights, larger than usual."""
    family = FAMILIES[name]
    torch.manual_seed(family.seed)
    make = getattr(transformers, family.architecture)
    model = make(make.config_class(**family.values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    model.to(dtype).save_pretrained(folder)
    _add_what_real_folders_have(folder / "model.safetensors", family, dtype)
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def _add_what_real_folders_have(path: Path, family: Family, dtype: torch.dtype) -> None:
    tensors = weights_of(path.parent)
    for name, tensor in tensors.items():
        if re.search(family.float32, name):
            # Numbers that bfloat16 has not.
            tensors[name] = tensor.float() + torch.rand(tensor.shape) / 1000
    for name, shape in family.not_loaded.items():
        tensors[name] = torch.randn(shape).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
