"""The kept and free vectors of one matrix, against a float64 singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from osft_trainer import bases
from osft_trainer.bases import matrix_bases, singular_values
from osft_trainer.subspace import split_weight

N, RANK = 40, 10
EVERY = frozenset({"kept_rows", "free_rows", "kept_cols", "free_cols"})
SPECTRA = {
    "flat": torch.ones(N),
    "even": torch.linspace(1, 0.02, N),
    "one outlier": torch.cat([torch.tensor([300.0]), torch.linspace(1, 0.001, N - 1)]),
    "nearly equal at the cut": torch.cat(
        [torch.linspace(2, 1, 25), 0.5 + 1e-7 * torch.arange(10, 0, -1), torch.full((5,), 0.1)]
    ),
    "steep": torch.logspace(0, -3.5, N),
    "too steep for squares": torch.logspace(0, -9, N),
    "rank 35": torch.cat([torch.linspace(2, 1, 35), torch.zeros(5)]),
    "rank 20": torch.cat([torch.linspace(2, 1, 20), torch.zeros(20)]),
    "zero": torch.zeros(N),
}
SHAPES = {"square": (N, N), "wide": (N, 90), "tall": (90, N)}


def matrix(spectrum: Tensor, rows: int, cols: int) -> Tensor:
    """Rows x cols with these singular values and random vectors, float64."""
    torch.manual_seed(rows)
    left, _ = torch.linalg.qr(torch.randn(rows, N, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(cols, N, dtype=torch.float64))
    return (left * spectrum.double()) @ right.T


def deviations(found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Deviation from the identity of both sides' bases together."""
    rows = torch.cat([found["kept_rows"], found["free_rows"]], dim=1)
    cols = torch.cat([found["kept_cols"], found["free_cols"]], dim=0).mT
    eye = torch.eye(N, dtype=rows.dtype)
    return (rows.mT @ rows - eye).abs().max(), (cols.mT @ cols - eye).abs().max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_bases_split_the_matrix(spectrum: Tensor, shape: tuple[int, int]) -> None:
    """Orthonormal, uncoupled, and as much energy free as the smallest singular values have.

    Right for any spectrum, also where the vectors themselves are not determined.
    """
    weight = matrix(spectrum, *shape)
    found = matrix_bases(weight, RANK, EVERY)
    assert max(deviations(found)) < 1e-9
    size = max(float(weight.norm()), 1e-30)
    assert (found["kept_rows"].mT @ weight @ found["free_cols"].mT).norm() < 1e-9 * size
    assert (found["free_rows"].mT @ weight @ found["kept_cols"].mT).norm() < 1e-9 * size
    least = spectrum.double().sort().values[:RANK].norm()
    free = (found["free_rows"].mT @ weight @ found["free_cols"].mT).norm()
    assert abs(free - least) < 1e-9 * size


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("cut", [1.0, 1e-1, 1e-3])
def test_angles_to_the_reference_are_bounded(
    shape: tuple[int, int], gap: float, cut: float
) -> None:
    """Principal angles at a real gap: e s_1^2 / (s_k^2 - s_(k+1)^2), up to a constant."""
    spectrum = torch.cat(
        [
            torch.tensor([2.0], dtype=torch.float64),
            cut * (1 + gap) * torch.linspace(1, 1, N - RANK - 1, dtype=torch.float64),
            cut * torch.linspace(1, 0.1, RANK, dtype=torch.float64),
        ]
    )
    weight = matrix(spectrum, *shape)
    found = matrix_bases(weight, RANK, EVERY)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    sines = max(
        torch.linalg.svdvals(left[:, :-RANK].mT @ found["free_rows"]).max(),
        torch.linalg.svdvals(right[:-RANK] @ found["free_cols"].mT).max(),
    )
    assert sines < 100 * 2**-53 / (cut**2 * gap)


@pytest.mark.parametrize("name", SPECTRA)
def test_squaring_is_given_up_only_where_it_costs_digits(name: str) -> None:
    weight = matrix(SPECTRA[name], N, 90)
    found = bases._by_gram(weight, RANK, free_long=True, kept_long=True)
    assert (found is None) == (name in ("too steep for squares", "rank 35", "rank 20", "zero"))
    # Without the long side's free vectors a matrix may lack free directions, but not kept ones.
    found = bases._by_gram(weight, RANK, free_long=False, kept_long=True)
    assert (found is None) == (name in ("too steep for squares", "rank 20", "zero"))


def test_at_the_floors_the_bases_are_still_right() -> None:
    """Just above the floors of the Gram way: the worst that it is trusted with."""
    weakest_kept, weakest = bases._KEPT_FLOOR**0.5 * 1.5, bases._FREE_FLOOR**0.5 * 1.5
    spectrum = torch.cat(
        [
            torch.logspace(0, torch.tensor(weakest_kept).log10().item(), N - RANK),
            torch.logspace(
                torch.tensor(weakest_kept / 2).log10().item(),
                torch.tensor(weakest).log10().item(),
                RANK,
            ),
        ]
    )
    for shape in SHAPES.values():
        weight = matrix(spectrum, *shape)
        flat = weight.mT if shape[0] > shape[1] else weight
        assert bases._by_gram(flat, RANK, free_long=True, kept_long=True) is not None
        found = matrix_bases(weight, RANK, EVERY)
        assert max(deviations(found)) < 1e-9
        alone = matrix_bases(weight, RANK, frozenset({"free_rows", "free_cols"}))
        assert all((alone[name] - found[name]).abs().max() < 1e-7 for name in alone)
        left, _, _ = torch.linalg.svd(weight, full_matrices=False)
        assert torch.linalg.svdvals(left[:, :-RANK].mT @ found["free_rows"]).max() < 1e-7


@pytest.mark.parametrize("shape", [(30, 30), (30, 70), (70, 30), (3, 30, 20)])
@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_float32_bases_are_orthonormal_to_1e_6(
    shape: tuple[int, ...], parameterization: str
) -> None:
    torch.manual_seed(0)
    split = split_weight(torch.randn(shape), 7, parameterization).to_tensors()
    for name, part in split.items():
        if name == "free_values":
            continue
        columns = part.double() if name.endswith("rows") else part.double().mT
        assert (columns.mT @ columns - torch.eye(columns.shape[-1])).abs().max() < 1e-6
    if parameterization == "factored":
        assert (split["kept_rows"].mT @ split["free_rows"]).abs().max() < 1e-6
        assert (split["kept_cols"] @ split["free_cols"].mT).abs().max() < 1e-6


@pytest.mark.parametrize("last", [1e-3, 1e-4, 1.5e-6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_free_vectors_alone_avoid_the_kept_ones(shape: tuple[int, int], last: float) -> None:
    """Also where they are not parted explicitly, down to the floor of that."""
    spectrum = torch.cat([torch.linspace(1, 0.2, N - RANK), torch.logspace(-1, -6, RANK)])
    spectrum[-RANK:] = spectrum[-RANK:].clamp_min(last)
    weight = matrix(spectrum, *shape)
    found = matrix_bases(weight, RANK, frozenset({"free_rows", "free_cols"}))
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    assert (left[:, :-RANK].mT @ found["free_rows"]).norm() < 1e-8
    assert (right[:-RANK] @ found["free_cols"].mT).norm() < 1e-8
    eye = torch.eye(RANK, dtype=torch.float64)
    assert (found["free_cols"] @ found["free_cols"].mT - eye).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_ways_agree_on_vectors_and_signs(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix(SPECTRA["even"], *shape)
    squared = matrix_bases(weight, RANK, EVERY)
    monkeypatch.setattr(bases, "_by_gram", lambda *_: None)
    decomposed = matrix_bases(weight, RANK, EVERY)
    for name in EVERY:
        assert (squared[name] - decomposed[name]).abs().max() < 1e-9, name
    short = squared["free_rows" if shape[0] <= shape[1] else "free_cols"]
    columns = short if shape[0] <= shape[1] else short.mT
    assert (columns.gather(0, columns.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_failed_eigen_decomposition_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = matrix_bases(matrix(SPECTRA["even"], N, N), RANK, EVERY)
    assert max(deviations(found)) < 1e-9


def test_singular_values_are_those_of_the_matrix() -> None:
    weight = matrix(SPECTRA["even"], 90, N).float()
    assert torch.allclose(singular_values(weight), SPECTRA["even"].double(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_on_cuda_the_matrix_is_split_as_well(spectrum: Tensor, shape: tuple[int, int]) -> None:
    weight = matrix(spectrum, *shape)
    parts = matrix_bases(weight.cuda(), RANK, EVERY)
    found = {name: part.cpu() for name, part in parts.items()}
    assert max(deviations(found)) < 1e-9
    size = max(float(weight.norm()), 1e-30)
    assert (found["kept_rows"].mT @ weight @ found["free_cols"].mT).norm() < 1e-9 * size
    assert (found["free_rows"].mT @ weight @ found["kept_cols"].mT).norm() < 1e-9 * size
