"""The leak as the metrics tell it: a matrix at a time, and an update that leaks on purpose."""

from __future__ import annotations

import pytest
import torch

from osft_trainer import leaks
from osft_trainer.leaks import EVERY_STEPS, LeakWatch
from osft_trainer.model import OSFTModel, convert
from osft_trainer.targets import plan_targets
from tiny_models import tiny_model

GATE = "model.layers.0.mlp.gate_proj"


def moved() -> OSFTModel:
    """A model with an update that stays where it may be."""
    hf = tiny_model("llama").to(torch.bfloat16).float()
    model = convert(hf, plan_targets(hf, 0.25))
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in model.trainables().values():
            factor.add_(torch.randn_like(factor), alpha=0.01)
    model.finish_step()
    return model


def all_measures(model: OSFTModel, exported: torch.dtype) -> dict[str, leaks.Leak]:
    watch = LeakWatch(model, exported)
    count = len(list(model.subspaces()))
    found = [watch.measure(1 + turn * EVERY_STEPS) for turn in range(count)]
    return {leak.matrix: leak for leak in found if leak is not None}


def test_each_matrix_has_its_turn_and_other_steps_measure_nothing() -> None:
    model = moved()
    watch = LeakWatch(model, torch.float32)
    assert [step for step in range(1, 32) if watch.measure(step)] == [1, 11, 21, 31]
    measures = all_measures(model, torch.float32)
    assert set(measures) == {target.module for target in model.plan.targets}
    first = watch.measure(1)
    assert watch.measure(1 + EVERY_STEPS * len(measures)) == first


def test_an_update_that_leaks_on_purpose_is_seen_in_its_matrix_alone() -> None:
    model = moved()
    subspace = dict(model.subspaces())[f"{GATE}.subspace"]
    clean = all_measures(model, torch.float32)
    assert max(leak.trained for leak in clean.values()) < 1e-5
    assert subspace.kept_rows is not None
    with torch.no_grad():
        kept = subspace.kept_rows[:, :1]
        norm = subspace.factor.norm()
        subspace.factor.add_(
            kept.expand_as(subspace.factor) / subspace.factor.shape[1] ** 0.5 * norm
        )
    model.refresh()
    leaking = all_measures(model, torch.float32)
    # As long as the allowed part, and at a right angle to it.
    assert leaking[GATE].trained == pytest.approx(0.5**0.5, rel=1e-3)
    assert leaking[GATE].exported == pytest.approx(0.5**0.5, rel=1e-2)
    for name in set(clean) - {GATE}:
        assert leaking[name] == clean[name]


def test_rounding_for_the_export_is_told_apart() -> None:
    model = moved()
    fine, coarse = (all_measures(model, dtype) for dtype in (torch.float32, torch.bfloat16))
    for name, leak in coarse.items():
        assert leak.trained == fine[name].trained < fine[name].exported < 1e-5
        assert leak.exported > 1e-3
    row = coarse[GATE].to_row()
    assert (row["leakMatrix"], row["leakExported"]) == (GATE, coarse[GATE].exported)


def test_what_is_too_large_is_left_to_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved()
    monkeypatch.setattr(leaks, "MAX_BYTES", 32 * 32 * 8)
    assert set(all_measures(model, torch.float32)) == {
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"
    }
    monkeypatch.setattr(leaks, "MAX_BYTES", 0)
    assert LeakWatch(model, torch.float32).measure(1) is None
