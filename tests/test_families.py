"""Families x invariants: what holds for a tiny folder of every family that hubs hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_families import FAMILIES, weights_of
from osft_trainer.model import load_model

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
