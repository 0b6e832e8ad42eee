"""Families x invariants: what holds for a tiny folder of every family that hubs hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_families import FAMILIES, weights_of
from osft_trainer.activations import input_groups, second_moments
from osft_trainer.forward import packed_forward
from osft_trainer.model import load_model
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch

pytestmark = pytest.mark.parametrize("family", FAMILIES)
FamilyFolder = Callable[[str], Path]


def test_it_is_a_folder_as_hubs_hold_them(family: str, family_folder: FamilyFolder) -> None:
    """Loaded by our own reader, some tensors beside bfloat16 and some beside what is loaded."""
    folder = family_folder(family)
    load_model(folder, torch.float32)
    weights = weights_of(folder)
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
