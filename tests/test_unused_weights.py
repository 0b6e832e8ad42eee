"""What a base's files hold beside the language model is copied; what does not belong is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from model_families import save_family, weights_of
from osft_trainer.memory import empty_model
from osft_trainer.model import load_model
from osft_trainer.planning import make_report
from osft_trainer.unused_weights import not_loaded

Tensors = dict[str, Tensor]


def _changed(folder: Path, family: str, added: Tensors, **config: Any) -> Path:
    """A folder with more tensors, and other entries in its configuration."""
    base = save_family(folder, family)
    save_file(weights_of(base) | added, base / "model.safetensors", metadata={"format": "pt"})
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return base


BLOCK = "model.layers.0."
REFUSED: dict[str, tuple[str, Tensors, str]] = {
    "scales of a matrix": (
        "llama",
        {f"{BLOCK}mlp.up_proj.weight_scale_inv": torch.ones(1, 1)},
        r"up_proj.weight_scale_inv.*quantization_config.*dequantized",
    ),
    "scales of experts": (
        "qwen3_moe",
        {f"{BLOCK}mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1)},
        r"quantization_config.*dequantized",
    ),
    "scales of the head": (
        "llama",
        {"lm_head.weight_scale": torch.ones(1)},
        r"lm_head.weight_scale.*quantization_config",
    ),
    "weights in float8": (
        "llama",
        {f"{BLOCK}mlp.up_proj.weight": torch.ones(48, 32).to(torch.float8_e4m3fn)},
        r"up_proj.weight in .* type F8_E4M3.*dequantized",
    ),
    "more blocks": (
        "llama",
        {"model.layers.2.input_layernorm.weight": torch.ones(32)},
        r"model.layers.2.*num_hidden_layers 2.*save_pretrained",
    ),
    "more blocks than are announced": (
        "glm4_moe",
        {"model.layers.3.mlp.gate_proj.weight": torch.ones(48, 32)},
        r"1 tensors in .* \(model.layers.3.*num_hidden_layers 2",
    ),
    "a bias that is switched off": (
        "llama",
        {f"{BLOCK}self_attn.q_proj.bias": torch.ones(32)},
        r"q_proj.bias.*no place in LlamaForCausalLM.*one revision",
    ),
    "a norm of another architecture": (
        "llama",
        {f"{BLOCK}self_attn.q_norm.weight": torch.ones(8)},
        r"q_norm.weight.*no place in LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_the_configuration_does_not_mean_are_refused(case: str, tmp_path: Path) -> None:
    """By the run and, before any weight is read, by the plan."""
    family, added, message = REFUSED[case]
    base = _changed(tmp_path / "base", family, added)
    for model in (load_model, lambda *told: not_loaded(empty_model(*told), base)):
        with pytest.raises(ValueError, match=rf"^model_path: .*{message}"):
            model(base, torch.bfloat16)


COPIED: dict[str, tuple[str, Tensors, str]] = {
    "a head that scores": ("llama", {"score.weight": torch.ones(1, 32)}, "score"),
    "another tower": ("llama", {"model.vision.1.weight": torch.ones(4, 4)}, "model.vision"),
    "tables of old versions": (
        "llama",
        {f"{BLOCK}self_attn.rotary_emb.inv_freq": torch.ones(4)},
        f"{BLOCK}self_attn.rotary_emb",
    ),
    "masks of old versions": ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}, ""),
    "a block for further tokens": (
        "deepseek_v3",
        {"model.layers.2.enorm.weight": torch.ones(32)},
        "model.layers.2",
    ),
}


@pytest.mark.parametrize("case", COPIED)
def test_what_stands_beside_the_language_model_is_named(case: str, tmp_path: Path) -> None:
    family, added, name = COPIED[case]
    more = {"num_nextn_predict_layers": 1} if family == "deepseek_v3" else {}
    base = _changed(tmp_path / "base", family, added, **more)
    (found,) = not_loaded(load_model(base, torch.bfloat16), base)
    (tensor,) = added.values()
    assert (found.tensors, found.bytes) == (1, tensor.nbytes)
    assert found.name == name or not name


def test_it_is_named_in_plan_and_log_and_is_in_final(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_family(tmp_path / "base", "qwen3_5")
    tiny.tokenizer().save_pretrained(base)
    (base / "consolidated.safetensors").write_bytes(b"the same weights for another program")
    data = tiny.data_file(tmp_path / "data.jsonl", conversations=2)
    told = tiny.training(
        base, data, tmp_path / "out", training_mode="step", max_steps=1, effective_batch_size=2
    )
    report = make_report(told, processes=1, device="cpu", energy=False)
    names = [part["name"] for part in json.loads(report.to_json())["not_loaded"]]
    assert names == ["model.visual", "mtp"]
    assert "copied as it is: model.visual (" in report.to_text()
    with caplog.at_level(logging.INFO):
        final = tiny.run(told).final_dir
    assert "model folders get them as they are: model.visual, mtp" in caplog.text
    assert "in no model folder of this run: consolidated.safetensors" in caplog.text
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [part["name"] for part in plan["not_loaded"]] == names
    assert plan["left_out"] == ["consolidated.safetensors"]
    (base / "consolidated.safetensors").unlink()
    old, new = weights_of(base), weights_of(final)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed)
