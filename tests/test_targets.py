"""Choosing targets and planning."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from osft_trainer.model import convert
from osft_trainer.targets import decoder_blocks, is_router, plan_targets
from tiny_models import FAMILIES, tiny_model

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FOUR = {"q_proj", "k_proj", "v_proj", "o_proj"}
LEAVES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite"), SEVEN
    ),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mixtral": {*FOUR, "gate_up_proj", "down_proj"},
    "qwen2_moe": {*SEVEN, "gate_up_proj"},
    "qwen3_moe": {*FOUR, "gate_up_proj", "down_proj"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    plan = plan_targets(model, 0.25)
    assert {target.name.rpartition(".")[2] for target in plan.targets} == LEAVES[family]
    prefix, blocks = decoder_blocks(model)
    assert len(blocks) == 2
    assert all(target.name.startswith(f"{prefix}.") for target in plan.targets)
    for target in plan.targets:
        assert tuple(model.get_parameter(target.parameter).shape) == target.shape
    assert not any(is_router(target.name) for target in plan.targets)
    assert not any("lm_head" in target.name or "embed" in target.name for target in plan.targets)


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored", "dense"])
@pytest.mark.parametrize("other", ["frozen", "norms", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_plan_counts_what_conversion_trains(
    family: str, other: str, parameterization: str
) -> None:
    model = tiny_model(family)
    plan = plan_targets(model, 0.3, parameterization, other_parameters=other)
    total = sum(p.numel() for p in model.parameters())
    trained = convert(model, plan).trainables()
    assert plan.trainable == sum(p.numel() for p in trained.values())
    assert plan.total == total
    assert plan.frozen + plan.covered == total
    assert json.loads(json.dumps(plan.to_json()))["trainable"] == plan.trainable


def test_patterns_are_searched_regular_expressions() -> None:
    model = tiny_model("llama")
    plan = plan_targets(model, 0.25, target_patterns=[r"layers\.1\..*q_proj$", "down"])
    assert [target.name for target in plan.targets] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert "model.layers.0.self_attn.q_proj.weight" in plan.uncovered


def test_no_match_names_patterns_and_real_paths() -> None:
    with pytest.raises(ValueError, match=r"c_attn.*model\.layers\.0\.self_attn\.q_proj"):
        plan_targets(tiny_model("llama"), 0.25, target_patterns=["c_attn"])


@pytest.mark.parametrize(
    ("family", "pattern", "why"),
    [
        ("mixtral", "lm_head", "lm_head, which cannot be split: it is outside the decoder blocks"),
        ("mixtral", "embed_tokens", "embed_tokens, which cannot be split: it is outside"),
        ("mixtral", "input_layernorm", "MixtralRMSNorm is no linear layer"),
        ("mixtral", r"mlp\.gate$", "it picks experts"),
        ("mixtral", "router", "matches no matrix of the decoder blocks"),
        ("llama", "q_porj", r"paths look like: model\.layers\.0\.self_attn\.q_proj"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused_beside_one_that_does(
    family: str, pattern: str, why: str
) -> None:
    for patterns in ([pattern], ["o_proj", pattern]):
        with pytest.raises(ValueError, match=f"^target_patterns: '{pattern[:3]}.*{why}"):
            plan_targets(tiny_model(family), 0.25, target_patterns=patterns)


def test_a_pattern_may_match_more_than_what_is_split() -> None:
    model = tiny_model("mixtral")
    plan = plan_targets(model, 0.25, target_patterns=[r"layers\.0\."])
    assert {target.name.split(".")[2] for target in plan.targets} == {"0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "lora"}, "parameterization: 'lora'"),
        ({"other_parameters": "some"}, "other_parameters: 'some'"),
        ({"target_patterns": ["("]}, "no regular expression"),
        ({"unfreeze_rank_ratio": 2.0}, "unfreeze_rank_ratio"),
    ],
)
def test_bad_choices_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_targets(tiny_model("llama"), **{"unfreeze_rank_ratio": 0.5, **arguments})


def test_norms_are_norms_only() -> None:
    plan = plan_targets(tiny_model("qwen3"), 0.25, other_parameters="norms")
    assert plan.trained_others
    assert all("norm" in name for name in plan.trained_others)
    assert "model.norm.weight" in plan.trained_others
    gpt2 = plan_targets(tiny_model("gpt2"), 0.25, other_parameters="norms")
    assert "transformer.ln_f.bias" in gpt2.trained_others
    assert "transformer.h.0.attn.c_attn.bias" in gpt2.uncovered


def test_all_leaves_routers_frozen() -> None:
    plan = plan_targets(tiny_model("mixtral"), 0.25, other_parameters="all")
    assert plan.uncovered == tuple(f"model.layers.{i}.mlp.gate.weight" for i in range(2))


def test_ratio_zero_trains_nothing() -> None:
    plan = plan_targets(tiny_model("llama"), 0.0)
    assert plan.trainable == 0
    assert all(target.free_rank == 0 for target in plan.targets)


def test_a_model_on_the_meta_device_can_be_planned() -> None:
    config = tiny_model("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
    assert plan_targets(model, 0.25).to_json() == plan_targets(tiny_model("llama"), 0.25).to_json()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no list of decoder blocks"):
        plan_targets(torch.nn.Linear(2, 2), 0.25)
