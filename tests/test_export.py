"""Exported folders load with plain transformers."""

from __future__ import annotations

import errno
import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from model_families import save_family
from osft_trainer import base_copy, durable
from osft_trainer.durable import work_folder
from osft_trainer.export import base_digest, base_dtype, export_hf
from osft_trainer.masters import fill_masters
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.parallel import World, shard, start_world, stop_world
from osft_trainer.report import RunFolder
from osft_trainer.targets import plan_targets
from tiny_models import save_tiny_model, tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))


def _trained(folder: Path, dtype: torch.dtype = torch.float32, **kw: str) -> OSFTModel:
    """Load, convert and move every trainable a little within what is allowed."""
    model = load_model(folder, dtype)
    osft = convert(model, plan_targets(model, 0.3, **kw))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in osft.trainables().values():
            p.add_(torch.randn_like(p), alpha=0.02)
    osft.finish_step()
    return osft.eval()


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


def test_nothing_trained_gives_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    model = load_model(base, torch.float32)
    export_hf(convert(model, plan_targets(model, 0.3)), base, tmp_path / "out", ALONE)
    old, new = _weights(base), _weights(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


def test_numbers_that_are_not_those_of_the_files_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_tiny_model(tmp_path / "base", "llama")
    model = load_model(base, torch.bfloat16)
    convert(model, plan_targets(model, 0.3, other_parameters="norms"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    fill_masters(model, base, torch.bfloat16)
    assert "start as compute_dtype has rounded them, such as model.layers.0" in caplog.text


def test_a_run_in_bfloat16_begins_with_the_numbers_of_the_files(tmp_path: Path) -> None:
    """One step so short that it moves nothing by more than rounding to bfloat16 would."""
    base, data = tiny.model_folder(tmp_path / "base"), tiny.data_file(tmp_path / "data.jsonl")
    told = tiny.training(
        base, data, tmp_path / "out", compute_dtype="bfloat16", other_parameters="all",
        learning_rate=1e-9, warmup_steps=0, training_mode="step", max_steps=1,
    )  # fmt: skip
    old, new = _weights(base), _weights(tiny.run(told).final_dir)
    assert all((new[name] - tensor).abs().max() < 1e-7 for name, tensor in old.items())


@pytest.mark.parametrize("parameterization", ["exact", "factored"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma"])
def test_an_update_is_added_to_the_base_as_its_files_hold_it(
    family: str, parameterization: str, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", family)
    model = _trained(
        base, torch.bfloat16, parameterization=parameterization, other_parameters="norms"
    )
    export_hf(model, base, tmp_path / "out", ALONE)
    # By the same model, held in float32: there every weight is W + dW.
    whole = load_model(base, torch.float32)
    wanted = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for target, (_, subspace) in zip(model.plan.targets, model.subspaces(), strict=True):
        wanted[target.parameter] += subspace.update()
    for name, trained in model.trainables().items():
        if name.endswith("_trained.value"):
            wanted[name.removesuffix("_trained.value")] = trained.detach()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def _export_sharded(bases: list[Path]) -> None:
    world = start_world("cpu", timeout=timedelta(seconds=60))
    for base in bases:
        model = load_model(base, torch.bfloat16)
        osft = convert(model, plan_targets(model, 0.3))
        shard(osft, world)
        export_hf(osft, base, base.with_suffix(".out"), world)
    stop_world(world)


def test_two_ranks_export_a_base_together(tmp_path: Path) -> None:
    """Also where names depend on the model's class, which has another name once it is sharded."""
    bases = [save_tiny_model(tmp_path / "mixtral", "mixtral")]
    bases += [save_family(tmp_path / name, name) for name in ("gpt_neox", "qwen3_5")]
    assert tiny.finish(tiny.start_ranks(_export_sharded, 2, [(bases,)] * 2)) == [0, 0]
    for base in bases:
        old = (base / "model.safetensors").read_bytes()
        assert (base.with_suffix(".out") / "model.safetensors").read_bytes() == old


OTHER_NAMES = {"mixtral": "model.", "gpt2": "transformer."}
"""What the names of the bare decoder lack; so GPT-2 lies on the hub."""


@pytest.mark.parametrize("family", OTHER_NAMES)
def test_weights_under_other_names_keep_these(family: str, tmp_path: Path) -> None:
    """Names that transformers finds all the same."""
    base = save_tiny_model(tmp_path / "base", family, tie_word_embeddings=True)
    prefix = OTHER_NAMES[family]
    other = {name.removeprefix(prefix): tensor for name, tensor in _weights(base).items()}
    save_file(other, base / "model.safetensors", metadata={"format": "pt"})
    model = load_model(base, torch.bfloat16)
    osft = convert(model, plan_targets(model, 0.3, "dense", other_parameters="all"))
    fill_masters(model, base, torch.bfloat16)
    export_hf(osft, base, tmp_path / "out", ALONE)
    new = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert new == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "gemma3-vision"])
def test_experts_and_towers_in_the_layout_of_the_model_keep_it(family: str, tmp_path: Path) -> None:
    """As newer versions save them, when they are asked to: nothing is converted on loading."""
    base = tmp_path / "base"
    loaded = load_model(save_family(tmp_path / "hub", family), torch.float32)
    loaded.save_pretrained(base, save_original_format=False)
    assert _weights(base).keys() != _weights(tmp_path / "hub").keys()
    export_hf(_trained(base, torch.bfloat16), base, tmp_path / "out", ALONE)
    old, new = _weights(base), _weights(tmp_path / "out")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == len(plan_targets(loaded, 0.3).targets)


def test_a_tied_head_that_the_files_hold_too_is_written_too(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    both = _weights(base)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    save_file(both, base / "model.safetensors", metadata={"format": "pt"})
    export_hf(_trained(base, other_parameters="all"), base, tmp_path / "out", ALONE)
    new = _weights(tmp_path / "out")
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(new["lm_head.weight"], both["lm_head.weight"])


def test_the_folder_is_complete_and_described(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model("llama", eos_token_id=[2, 3]).save_pretrained(base, max_shard_size=20_000)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("y")
    (base / "consolidated.safetensors").write_bytes(b"the same weights for another program")
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("x")
    (base / "pytorch_model.bin").write_text("old weights")
    model = _trained(base)
    out = tmp_path / "deep" / "out"
    export_hf(model, base, out, ALONE, extra={"parent_run": "abc"})
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "y"
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "consolidated.safetensors").exists()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [2, 3]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 3]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index == json.loads((base / "model.safetensors.index.json").read_text())
    for path in base.glob("model-*.safetensors"):
        assert (out / path.name).stat().st_size == path.stat().st_size
    description = json.loads((out / "osft.json").read_text())
    assert description["base_digest"] == base_digest(base)
    assert description["parent_run"] == "abc"
    assert description["leak"] < 1e-5
    assert description["leak_exported"] < 1e-3, "the export is float32"
    ranks = description["ranks"]["model.layers.0.mlp.down_proj"]
    assert ranks == {"kept": 22, "free": 10}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_rounding_on_export_is_measured(tmp_path: Path) -> None:
    """Against the folder itself: what is in it, less the base, in float64."""
    base = save_tiny_model(tmp_path / "base", "llama")
    model = _trained(base)
    export_hf(model, base, tmp_path / "out", ALONE, save_dtype=torch.bfloat16)
    old, new = _weights(base), _weights(tmp_path / "out")
    largest = 0.0
    for target in model.plan.targets:
        delta = new[target.parameter].double() - old[target.parameter].double()
        left, _, right = torch.linalg.svd(old[target.parameter].double(), full_matrices=False)
        kept = target.kept_rank
        touched = max((left[:, :kept].mT @ delta).norm(), (delta @ right[:kept].mT).norm())
        largest = max(largest, float(touched / delta.norm()))
    description = json.loads((tmp_path / "out" / "osft.json").read_text())
    assert description["leak_exported"] == pytest.approx(largest, rel=1e-4)
    assert description["leak"] < 1e-5 < 1e-2 < description["leak_exported"]


def test_a_leak_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    """Weights beyond float16 become infinite when they are rounded to it."""
    base = save_tiny_model(tmp_path / "base", "llama")
    model = _trained(base)
    with torch.no_grad():
        next(iter(model.trainables().values())).mul_(1e7)
    model.finish_step()
    export_hf(model, base, tmp_path / "out", ALONE, save_dtype=torch.float16)
    description = json.loads(
        (tmp_path / "out" / "osft.json").read_text(), parse_constant=pytest.fail
    )
    assert description["leak"] < 1e-5
    assert "leak_exported" not in description


def test_a_known_digest_is_taken(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    export_hf(_trained(base), base, tmp_path / "out", ALONE, digest="known")
    assert json.loads((tmp_path / "out" / "osft.json").read_text())["base_digest"] == "known"


def test_save_dtype_is_noted(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    export_hf(_trained(base), base, tmp_path / "out", ALONE, save_dtype=torch.bfloat16)
    new = _weights(tmp_path / "out")
    assert {t.dtype for t in new.values()} == {torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert base_dtype(tmp_path / "out") == torch.bfloat16


def test_save_dtype_leaves_tensors_of_another_type(tmp_path: Path) -> None:
    """A router's bias in float32 of a base in bfloat16."""
    base = save_family(tmp_path / "base", "deepseek_v3")
    export_hf(_trained(base), base, tmp_path / "out", ALONE, save_dtype=torch.float16)
    old, new = _weights(base), _weights(tmp_path / "out")
    for name, tensor in old.items():
        if tensor.dtype == torch.float32:
            assert torch.equal(new[name], tensor), name
        else:
            assert new[name].dtype == torch.float16, name


def test_trained_masters_are_exported_under_their_own_names(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "gemma")
    model = _trained(base, torch.bfloat16, other_parameters="all")
    export_hf(model, base, tmp_path / "out", ALONE)
    new = _weights(tmp_path / "out")
    assert set(new) == set(_weights(base))
    master = model.trainables()["model.norm.weight_trained.value"]
    assert torch.equal(new["model.norm.weight"], master)


def test_an_older_export_and_remains_of_a_broken_one_are_replaced(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.txt").write_text("old")
    work_folder(out, "").mkdir()
    (work_folder(out, "") / "part-00001.safetensors").write_text("half")
    export_hf(_trained(base), base, out, ALONE)
    assert not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    AutoModelForCausalLM.from_pretrained(out)


def test_a_failing_write_leaves_the_older_export_alone(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("old")
    work_folder(out, "").write_text("a file where the folder must go")
    with pytest.raises(OSError, match=r"out\..*writing"):
        export_hf(_trained(base), base, out, ALONE)
    assert (out / "kept.txt").read_text() == "old"


@pytest.mark.parametrize("step", ["read_header", "_bytes_of", "_copy"])
def test_a_full_disk_is_an_os_error(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When files are begun, when what is trained is written, and when the rest is copied."""

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    base = save_tiny_model(tmp_path / "base")
    monkeypatch.setattr(base_copy, step, no_space)
    with pytest.raises(OSError, match=r"out: .*No space left.*free or add space"):
        export_hf(_trained(base), base, tmp_path / "out", ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "the room is free again"


def test_a_base_that_was_changed_meanwhile_is_not_added_to(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    model = _trained(base)
    save_tiny_model(base, seed=1)
    with pytest.raises(OSError, match=r"model\.safetensors in .* changed since it was loaded"):
        export_hf(model, base, tmp_path / "out", ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_it_is_complete_from_the_moment_that_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = save_tiny_model(tmp_path / "base"), tmp_path / "out"
    real = durable.sync

    def crash_after_the_rename(path: Path) -> None:
        if path == out.parent:
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(durable, "sync", crash_after_the_rename)
    with pytest.raises(KeyboardInterrupt):
        export_hf(_trained(base), base, out, ALONE)
    assert RunFolder.is_complete(out)
    AutoModelForCausalLM.from_pretrained(out)


def test_the_digest_follows_content(tmp_path: Path) -> None:
    first = save_tiny_model(tmp_path / "a", seed=1)
    same = save_tiny_model(tmp_path / "b", seed=1)
    other = save_tiny_model(tmp_path / "c", seed=2)
    assert base_digest(first) == base_digest(same) != base_digest(other)
