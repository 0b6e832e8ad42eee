"""What a ratio would free of a model, and what zeroing it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from osft_trainer import spectrum
from osft_trainer.forward import packed_loss
from osft_trainer.model import load_model
from osft_trainer.spectrum import Spectrum, measure
from osft_trainer.targets import plan_targets
from tiny_models import save_tiny_model

RATIOS = [0.5, 0.125, 0.25]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    (folder / "text.txt").write_text("what is old is kept, what is new is learned; " * 60)
    return tiny.model_folder(folder / "model", seed=3)


def measured(base: Path, data: str | None, max_tokens: int = 4000) -> Spectrum:
    return measure(
        str(base),
        None if data is None else base.parent / data,
        RATIOS,
        tolerance=0.05,
        max_tokens=max_tokens,
    )


def lowered(base: Path, ratio: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Each target without its weakest directions, by a decomposition of its own."""
    hf = load_model(base, torch.float32)
    for target in plan_targets(hf, ratio).targets:
        left, values, right = torch.linalg.svd(
            hf.get_parameter(target.parameter).detach().double(), full_matrices=False
        )
        kept = target.kept_rank
        strong = (left[..., :kept] * values[..., None, :kept]) @ right[..., :kept, :]
        yield target.parameter, strong.float()


def test_energies_are_those_of_the_free_parts(base: Path) -> None:
    found = measured(base, None)
    assert found.ratios == sorted(RATIOS)
    hf = load_model(base, torch.float32)
    for position, ratio in enumerate(found.ratios):
        for target in plan_targets(hf, ratio).targets:
            weight = hf.get_parameter(target.parameter).detach().double()
            squares = torch.linalg.svdvals(weight) ** 2
            expected = float(squares[target.kept_rank :].sum() / squares.sum())
            assert found.free_energy[target.name][position] == pytest.approx(expected, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("data", ["data.jsonl", "text.txt"])
def test_losses_are_those_of_the_model_without_its_free_parts(base: Path, data: str) -> None:
    found = measured(base, data)
    model = load_model(base, torch.float32)
    batches = spectrum._batches(model, base, base.parent / data, 4000, False)
    assert sum(int((batch.labels != -100).sum()) for batch in batches) >= found.tokens > 100

    def loss(weights: dict[str, torch.Tensor]) -> float:
        hf = load_model(base, torch.float32).eval()
        for name, weight in weights.items():
            hf.get_parameter(name).copy_(weight)
        total = sum(float(packed_loss(hf, b.input_ids, b.position_ids, b.labels)) for b in batches)
        return total / found.tokens

    assert found.loss == pytest.approx(loss({}), abs=1e-5)
    assert found.zeroed_loss is not None
    for ratio, zeroed in zip(found.ratios, found.zeroed_loss, strict=True):
        assert zeroed == pytest.approx(loss(dict(lowered(base, ratio))), abs=1e-4)
    assert len(set(found.zeroed_loss)) == len(RATIOS)


def test_experts_and_transposed_matrices_are_zeroed_too(tmp_path: Path) -> None:
    for family in ("mixtral", "gpt2"):
        folder = save_tiny_model(tmp_path / family, family)
        hf = load_model(folder, torch.float32)
        plan = plan_targets(hf, 0.5)
        for number, target in enumerate(plan.targets):
            spectrum._decompose(hf, target, [0.5], tmp_path / f"{number}.safetensors")
        spectrum._zero(hf, plan, 0.5, tmp_path)
        for name, weight in lowered(folder, 0.5):
            assert torch.allclose(hf.get_parameter(name), weight, atol=1e-6), name


def found_with(loss: float | None, zeroed: list[float] | None, tolerance: float = 0.1) -> Spectrum:
    return Spectrum("m", [0.1, 0.25, 0.5], {"a.0.b": [0.1] * 3}, loss, zeroed, 9, tolerance)


@pytest.mark.parametrize(
    ("loss", "zeroed", "recommended"),
    [
        (2.0, [2.0, 2.05, 3.0], 0.25),
        (2.0, [2.0, 2.05, 2.09], 0.5),
        (2.0, [1.9, 2.5, 2.0], 0.1),
        (2.0, [2.2, 2.0, 2.0], None),
        (2.0, [float("nan"), 2.0, 2.0], None),
        (None, None, None),
    ],
)
def test_the_rule_of_the_recommendation(
    loss: float | None, zeroed: list[float] | None, recommended: float | None
) -> None:
    found = found_with(loss, zeroed)
    assert found.recommended == recommended
    if recommended is not None:
        assert f"recommended unfreezeRankRatio: {recommended:g} (the largest" in found.advice()
        assert "at most 0.1 nats a token" in found.advice()
    elif loss is None:
        assert "without --data" in found.advice()
    else:
        assert "even 0.1 costs more" in found.advice()


def test_table_and_json_say_the_same(base: Path) -> None:
    found = measured(base, "data.jsonl", max_tokens=100)
    document = json.loads(found.to_json())
    assert document["recommended"] == found.recommended
    assert document["zeroed_loss"] == found.zeroed_loss
    text = found.to_text()
    assert "model.layers.*.mlp.up_proj" in text
    assert found.advice() in text
    assert f"{found.loss:.4f} as it is" in text


def test_data_that_hold_nothing_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"--data: .* holds no text"):
        measure(str(base), tmp_path / "empty.txt", [0.5], tolerance=0.1, max_tokens=10)
