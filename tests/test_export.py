"""Exported folders load with plain transformers."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny
from osft_trainer import base_weights, durable, export
from osft_trainer.durable import work_folder
from osft_trainer.export import base_digest, base_dtype, export_hf
from osft_trainer.masters import fill_masters
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.parallel import World, shard, start_world, stop_world
from osft_trainer.report import RunFolder
from osft_trainer.targets import plan_targets
from tiny_models import FAMILIES, packed_batch, save_tiny_model, tiny_model

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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_reloads_with_the_same_logits(family: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", family)
    model = _trained(base, other_parameters="norms")
    export_hf(model, base, tmp_path / "out", ALONE)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation=model.hf.config._attn_implementation
    ).eval()
    ids = packed_batch([12])["input_ids"]
    logits = model.hf(input_ids=ids).logits
    assert (again(input_ids=ids).logits - logits).abs().max() < 1e-5
    untrained = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (untrained(input_ids=ids).logits - logits).abs().max() > 1e-3
    old, new = _weights(base), _weights(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }


def test_nothing_trained_gives_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "mixtral")
    model = load_model(base, torch.float32)
    export_hf(convert(model, plan_targets(model, 0.3)), base, tmp_path / "out", ALONE)
    old, new = _weights(base), _weights(tmp_path / "out")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_loading_has_rounded_comes_back_bit_for_bit(
    family: str, held: torch.dtype, tmp_path: Path
) -> None:
    """As on CUDA, where compute_dtype auto is bfloat16."""
    base = tmp_path / "base"
    tiny_model(family).to(held).save_pretrained(base)
    model = load_model(base, torch.bfloat16)
    export_hf(convert(model, plan_targets(model, 0.3)), base, tmp_path / "out", ALONE)
    old, new = _weights(base), _weights(tmp_path / "out")
    assert new.keys() == old.keys()
    for name, tensor in old.items():
        assert new[name].dtype == held
        assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("parameterization", ["exact", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_begins_with_the_numbers_of_the_files(
    family: str, parameterization: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Norms, embeddings and biases, and without a split the matrices, too."""
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    model = load_model(base, torch.bfloat16)
    osft = convert(model, plan_targets(model, 0.3, parameterization, other_parameters="all"))
    before = {name: p.clone() for name, p in osft.trainables().items()}
    fill_masters(model, base, torch.bfloat16)
    changed = {n for n, p in osft.trainables().items() if not torch.equal(p, before[n])}
    assert any("embed_tokens" in name or "wte" in name for name in changed)
    # Experts lie in the files one by one, and are put together when they are loaded.
    together = parameterization == "dense" and ".experts." in " ".join(before)
    assert ("start as compute_dtype has rounded them" in caplog.text) == together
    export_hf(osft, base, tmp_path / "out", ALONE)
    old, new = _weights(base), _weights(tmp_path / "out")
    for name, tensor in old.items():
        assert torch.equal(new[name], tensor) or (together and ".experts." in name), name


def test_a_conversion_that_needs_more_than_one_tensor_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks_a_part(*_: object) -> dict[str, torch.Tensor]:
        raise KeyError("the other half")

    base = save_tiny_model(tmp_path / "base", "llama")
    model = load_model(base, torch.bfloat16)
    convert(model, plan_targets(model, 0.3, other_parameters="norms"))
    monkeypatch.setattr(base_weights, "revert_weight_conversion", lacks_a_part)
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


def _export_sharded(base: Path, out: Path) -> None:
    world = start_world("cpu", timeout=timedelta(seconds=60))
    model = load_model(base, torch.bfloat16)
    osft = convert(model, plan_targets(model, 0.3))
    shard(osft, world)
    export_hf(osft, base, out, world)
    stop_world(world)


def test_two_ranks_export_an_exact_base_together(tmp_path: Path) -> None:
    base, out = save_tiny_model(tmp_path / "base", "mixtral"), tmp_path / "out"
    assert tiny.finish(tiny.start_ranks(_export_sharded, 2, [(base, out)] * 2)) == [0, 0]
    old, new = _weights(base), _weights(out)
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


def test_weights_under_other_names_are_exported_as_they_were_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of the decoder alone, which transformers finds all the same."""
    base = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    model = load_model(base, torch.bfloat16)
    osft = convert(model, plan_targets(model, 0.3))
    bare = {n.removeprefix("model."): t for n, t in _weights(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    export_hf(osft, base, tmp_path / "out", ALONE)
    assert "exported as compute_dtype has rounded them" in caplog.text
    for name, tensor in _weights(tmp_path / "out").items():
        assert torch.equal(tensor, bare[name.removeprefix("model.")].bfloat16().float()), name


def test_the_folder_is_complete_and_described(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "llama", eos_token_id=[2, 3])
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("x")
    (base / "pytorch_model.bin").write_text("old weights")
    model = _trained(base)
    out = tmp_path / "deep" / "out"
    export_hf(model, base, out, ALONE, extra={"parent_run": "abc"}, max_shard_bytes=20_000)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [2, 3]
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 3]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(_weights(base))
    assert all((out / name).is_file() for name in index["weight_map"].values())
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
    assert {t.dtype for t in _weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert base_dtype(tmp_path / "out") == torch.bfloat16


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


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors raises an error of its own, which nobody would try again or agree on."""

    def no_space(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    base = save_tiny_model(tmp_path / "base")
    monkeypatch.setattr(export, "save_file", no_space)
    for largest in (1, 10**9):
        with pytest.raises(OSError, match=r"out: .*No space left.*free or add space"):
            export_hf(_trained(base), base, tmp_path / "out", ALONE, max_shard_bytes=largest)
        assert [path.name for path in tmp_path.iterdir()] == ["base"], "the room is free again"


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
