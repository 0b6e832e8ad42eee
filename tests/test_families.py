"""Families x invariants: what holds for a tiny folder of every family that hubs hold."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from model_families import FAMILIES, save_family, weights_of
from osft_trainer.activations import input_groups, second_moments
from osft_trainer.export import export_hf
from osft_trainer.forward import packed_forward
from osft_trainer.masters import fill_masters
from osft_trainer.memory import empty_model
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.parallel import World
from osft_trainer.targets import plan_targets
from osft_trainer.unused_weights import not_loaded
from tiny_models import packed_batch

pytestmark = pytest.mark.parametrize("family", FAMILIES)
FamilyFolder = Callable[[str], Path]
ALONE = World(0, 0, 1, torch.device("cpu"))


def test_it_is_a_folder_as_hubs_hold_them(family: str, family_folder: FamilyFolder) -> None:
    """Some tensors beside bfloat16, and some beside what is loaded."""
    weights = weights_of(family_folder(family))
    assert set(FAMILIES[family].not_loaded) <= set(weights)
    dtypes = {weight.dtype for weight in weights.values()}
    has_float32 = FAMILIES[family].float32 != r"(?!)"
    assert dtypes == {torch.bfloat16} | ({torch.float32} if has_float32 else set())


def test_samples_of_a_row_are_computed_and_read_as_each_alone(
    family: str, family_folder: FamilyFolder
) -> None:
    """Logits, and what `split_by: activations` reads: every input of every sample, counted."""
    hf = load_model(family_folder(family), torch.float32).eval()
    lengths = [7, 1, 4, 9]
    batch = packed_batch(lengths)
    whole = (batch["input_ids"], batch["position_ids"])
    apart = [(ids, torch.arange(ids.shape[1])[None]) for ids in whole[0].split(lengths, dim=1)]
    with torch.no_grad():
        alone = torch.cat([hf(input_ids=ids, use_cache=False).logits[0] for ids, _ in apart])
        assert (packed_forward(hf, *whole)[0] - alone).abs().max() < 1e-5 * alone.abs().max()
    linear = [t.name for t in plan_targets(hf, 0.5).targets if t.kind != "experts"]
    # Jamba multiplies with the weight of `dt_proj` itself; the split refuses it by name.
    patterns = [f"^{re.escape(name)}$" for name in linear if not name.endswith("dt_proj")]
    plan = plan_targets(hf, 0.5, target_patterns=patterns, split_by="activations")
    groups = input_groups(hf, plan, apart[0])
    together, single = (second_moments(hf, groups, rows) for rows in ([whole], apart))
    for one, other in zip(together, single, strict=True):
        assert one.inputs == other.inputs == sum(lengths)
        assert (one.total - other.total).norm() <= 1e-4 * other.total.norm()


def test_an_export_is_the_base_and_what_was_trained(
    family: str, family_folder: FamilyFolder, tmp_path: Path
) -> None:
    base, out = family_folder(family), tmp_path / "out"
    model = _trained(base)
    export_hf(model, base, out, ALONE)
    old, new = weights_of(base), weights_of(out)
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }
    changed = {name for name, tensor in old.items() if _bits(tensor) != _bits(new[name])}
    assert changed
    kept = re.compile(rf"({FAMILIES[family].float32})|^mtp|visual|vision_tower")
    assert not any(kept.search(name) for name in changed)
    (named,) = json.loads((out / "config.json").read_text())["architectures"]
    _, info = getattr(transformers, named).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["mismatched_keys"]
    assert info["unexpected_keys"] <= set(FAMILIES[family].not_loaded)
    wanted = _wanted(model, load_model(base, torch.float32))
    for name, parameter in load_model(out, torch.float32).named_parameters():
        assert torch.equal(parameter, wanted[name]), name


def test_what_is_trained_in_full_begins_with_the_numbers_of_the_files(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on CUDA, where a base in float32 is loaded in bfloat16. All of it goes and comes back."""
    base, out = save_family(tmp_path / "base", family, torch.float32), tmp_path / "out"
    model = load_model(base, torch.bfloat16)
    osft = convert(model, plan_targets(model, 0.3, "dense", other_parameters="all"))
    with caplog.at_level(logging.WARNING, "osft_trainer"):
        fill_masters(model, base, torch.bfloat16)
    assert not [r for r in caplog.records if r.name.startswith("osft_trainer")]
    export_hf(osft, base, out, ALONE)
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_is_not_loaded_is_named_before_the_weights_are_read(
    family: str, family_folder: FamilyFolder
) -> None:
    base = family_folder(family)
    found = not_loaded(empty_model(base, torch.bfloat16), base)
    names = tuple(f"{part.name}." for part in found)
    weights = weights_of(base)
    named = {name for name in weights if name.startswith(names)}
    assert set(FAMILIES[family].not_loaded) <= named
    assert sum(part.bytes for part in found) == sum(weights[name].nbytes for name in named)


def _trained(folder: Path) -> OSFTModel:
    """Load in bfloat16, convert and move every trainable a little within what is allowed."""
    hf = load_model(folder, torch.bfloat16)
    osft = convert(hf, plan_targets(hf, 0.3, other_parameters="norms"))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in osft.trainables().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    osft.finish_step()
    return osft


@torch.no_grad()
def _wanted(trained: OSFTModel, whole: PreTrainedModel) -> dict[str, Tensor]:
    """By the base held in float32: W + dW rounded once, trained norms, and the rest as it was."""
    wanted = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for target, (_, subspace) in zip(trained.plan.targets, trained.subspaces(), strict=True):
        wanted[target.parameter] += subspace.update()
        wanted[target.parameter] = wanted[target.parameter].bfloat16().float()
    for name, parameter in trained.trainables().items():
        if name.endswith("_trained.value"):
            rounded = parameter.detach().bfloat16().float()
            wanted[name.removesuffix("_trained.value")] = rounded
    return wanted


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
