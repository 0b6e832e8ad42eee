"""The rank rule and the decomposition."""

from __future__ import annotations

import pytest
import torch

from osft_trainer.subspace import Split, free_rank, needed_parts, split_weight


@pytest.mark.parametrize(
    ("rows", "cols", "ratio", "expected"),
    [
        (100, 100, 0.0, 0),
        (100, 100, 1.0, 100),
        (100, 300, 0.1, 10),
        (1000, 1000, 0.9, 900),
        (10, 10, 0.3, 3),
        (10, 10, 0.7, 7),
        (4096, 1024, 0.25, 256),
        (2, 3, 0.5, 1),
        (5, 5, 0.5, 3),
        (4, 4, 0.01, 1),
        (4, 4, 0.99, 3),
        (1, 8, 0.5, 1),
        (1000, 1000, 1e-5, 1),
    ],
)
def test_rank_is_the_rounded_share(rows: int, cols: int, ratio: float, expected: int) -> None:
    assert free_rank(rows, cols, ratio) == expected


def test_rank_has_no_float_error_for_any_two_digit_ratio() -> None:
    for percent in range(101):
        assert free_rank(100, 200, percent / 100) == percent
        assert free_rank(100, 200, float(f"{percent / 100:.2f}")) == percent


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf")])
def test_rank_refuses_what_is_no_share(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"unfreeze_rank_ratio.*between 0 and 1"):
        free_rank(4, 4, ratio)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40), (3, 20, 12), (3, 12, 12)])
def test_factored_parts_match_a_float64_reference(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    rank = 5
    split = split_weight(weight, rank, "factored")
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = values.shape[-1] - rank
    pairs = [
        (split.kept_rows, left[..., :kept]),
        (split.free_rows, left[..., kept:]),
        (split.kept_cols, right[..., :kept, :].mT),
        (split.free_cols, right[..., kept:, :].mT),
    ]
    for found, reference in pairs:
        assert found is not None
        basis = found.double() if found.shape == reference.shape else found.double().mT
        projector = basis @ basis.mT
        assert (projector - reference @ reference.mT).abs().max() < 1e-6
    assert torch.allclose(split.free_values.double(), values[..., kept:], atol=1e-6)
    low = (split.free_rows * split.free_values[..., None, :]) @ split.free_cols
    reference_low = (left[..., kept:] * values[..., None, kept:]) @ right[..., kept:, :]
    assert (low - reference_low).abs().max() < 1e-6


def test_bases_are_orthonormal_and_apart_for_a_steep_spectrum() -> None:
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(48, 32, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))
    weight = ((left * torch.logspace(2, -6, 32)) @ right.T).float()
    split = split_weight(weight, 8, "factored")
    both = torch.cat([split.kept_rows, split.free_rows], dim=1).double()
    assert (both.T @ both - torch.eye(32)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "rank", "parameterization", "parts"),
    [
        ((8, 8), 2, "exact", {"free_rows", "free_cols"}),
        ((12, 8), 2, "exact", {"free_cols", "kept_rows"}),
        ((8, 12), 2, "exact", {"free_rows", "kept_cols"}),
        ((8, 12), 2, "core", {"free_rows", "free_cols"}),
        ((8, 12), 8, "exact", set()),
        ((8, 12), 0, "exact", set()),
        ((8, 12), 3, "dense", set()),
    ],
)
def test_only_needed_parts_are_kept(
    shape: tuple[int, int], rank: int, parameterization: str, parts: set[str]
) -> None:
    assert needed_parts(*shape, rank, parameterization) == parts
    tensors = split_weight(torch.randn(shape), rank, parameterization).to_tensors()
    assert set(tensors) == parts
    assert all(part.is_contiguous() for part in tensors.values())
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in tensors.values())


def test_equal_input_gives_equal_output_and_survives_a_cache() -> None:
    weight = torch.randn(10, 14)
    first, second = split_weight(weight, 3), split_weight(weight.clone(), 3)
    again = Split.from_tensors(first.to_tensors())
    for name, part in first.to_tensors().items():
        assert torch.equal(part, second.to_tensors()[name])
        assert torch.equal(part, again.to_tensors()[name])


def test_bfloat16_weights_get_float32_bases() -> None:
    split = split_weight(torch.randn(8, 8).bfloat16(), 2)
    assert {part.dtype for part in split.to_tensors().values()} == {torch.float32}


def test_a_weight_with_nan_is_refused() -> None:
    weight = torch.randn(4, 4)
    weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        split_weight(weight, 2)
