"""The parameterisations: gradients, projections, effective weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from osft_trainer.linear import SubspaceLinear, SubspaceWeight
from osft_trainer.projection import project_gradients, project_values, refresh
from osft_trainer.subspace import Split, split_weight

SHAPES = {"square": (6, 6), "tall": (9, 5), "wide": (5, 9)}
CASES = [(p, s) for p in ("exact", "core", "factored") for s in SHAPES]


def _subspace(
    parameterization: str, shape: tuple[int, ...], rank: int = 2, dtype: torch.dtype = torch.float64
) -> SubspaceWeight:
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=dtype)
    split = split_weight(weight, rank, parameterization)
    return SubspaceWeight(weight, split, rank, parameterization)


def _factors(subspace: SubspaceWeight) -> list[nn.Parameter]:
    return [p for p in subspace.parameters() if p.requires_grad]


def _move(subspace: SubspaceWeight) -> None:
    """Leave the starting point, where some gradients would be zero."""
    with torch.no_grad():
        for factor in _factors(subspace):
            factor.add_(torch.randn_like(factor), alpha=0.3)
    project_values([subspace])
    refresh([subspace])


def _effective_by_autograd(subspace: SubspaceWeight) -> Tensor:
    """W + dW written out with ordinary differentiable operations."""
    if subspace.form == "factored":
        low = (subspace.left * subspace.values[..., None, :]) @ subspace.right
        start = (subspace.free_rows * subspace.free_values[..., None, :]) @ subspace.free_cols
        return subspace.base + low - start
    delta: Tensor = subspace.factor
    if subspace.free_rows is not None:
        delta = subspace.free_rows @ delta
    if subspace.free_cols is not None:
        delta = delta @ subspace.free_cols
    return subspace.base + delta


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("parameterization", "shape"), CASES)
def test_gradients_equal_autograd_through_the_written_out_weight(
    parameterization: str, shape: str, conv1d: bool
) -> None:
    subspace = _subspace(parameterization, SHAPES[shape])
    _move(subspace)
    bias = nn.Parameter(torch.randn(SHAPES[shape][1 if conv1d else 0], dtype=torch.float64))
    module = SubspaceLinear(subspace, bias, conv1d)
    x = torch.randn(2, 3, module.in_features, dtype=torch.float64, requires_grad=True)
    leaves = [x, bias, *_factors(subspace)]
    found = torch.autograd.grad(module(x).sin().sum(), leaves)
    weight = _effective_by_autograd(subspace)
    reference = torch.autograd.grad(
        linear(x, weight.T if conv1d else weight, bias).sin().sum(), leaves
    )
    for got, wanted in zip(found, reference, strict=True):
        assert torch.allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 6, 6), (3, 9, 5), (3, 5, 9)])
@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_expert_gradients_equal_autograd(parameterization: str, shape: tuple[int, ...]) -> None:
    subspace = _subspace(parameterization, shape)
    _move(subspace)
    x = torch.randn(3, 4, shape[-1], dtype=torch.float64)
    found = torch.autograd.grad((x @ subspace.weight().mT).sin().sum(), _factors(subspace))
    reference = torch.autograd.grad(
        (x @ _effective_by_autograd(subspace).mT).sin().sum(), _factors(subspace)
    )
    for got, wanted in zip(found, reference, strict=True):
        assert torch.allclose(got, wanted, atol=1e-10)


def _by_inputs(form: str, rows: int = 9, cols: int = 5) -> SubspaceWeight:
    """Split by directions of the inputs: columns of a linear layer, rows of a transposed one."""
    torch.manual_seed(1)
    weight = torch.randn(rows, cols, dtype=torch.float64)
    width = cols if form == "right" else rows
    basis = torch.linalg.qr(torch.randn(width, 2, dtype=torch.float64)).Q
    split = Split(free_cols=basis.T) if form == "right" else Split(free_rows=basis)
    return SubspaceWeight(weight, split, 2, "exact")


@pytest.mark.parametrize("form", ["right", "left"])
def test_a_split_by_inputs_trains_every_output_of_the_free_inputs(form: str) -> None:
    subspace = _by_inputs(form)
    assert subspace.form == form
    assert subspace.projected() == []
    assert subspace.factor.shape == ((9, 2) if form == "right" else (2, 5))
    _move(subspace)
    assert subspace.leak() < 1e-12
    module = SubspaceLinear(subspace, None, conv1d=form == "left")
    x = torch.randn(7, module.in_features, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(module(x).sin().sum(), [x, subspace.factor])
    weight = _effective_by_autograd(subspace)
    reference = torch.autograd.grad(
        linear(x, weight.T if form == "left" else weight).sin().sum(), [x, subspace.factor]
    )
    for got, wanted in zip(found, reference, strict=True):
        assert torch.allclose(got, wanted, atol=1e-10)
    free = subspace.free_cols.T if form == "right" else subspace.free_rows
    kept = x - (x @ free) @ free.T
    base = SubspaceLinear(_by_inputs(form), None, conv1d=form == "left")
    assert torch.allclose(module(kept), base(kept), atol=1e-12)
    assert not torch.allclose(module(x), base(x), atol=1e-2)


def test_all_directions_free_is_an_ordinary_matrix() -> None:
    subspace = _subspace("exact", (6, 4), rank=4)
    assert subspace.form == "dense"
    assert subspace.factor.shape == (6, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    module = SubspaceLinear(subspace, None, conv1d=False)
    (found,) = torch.autograd.grad(module(x).sin().sum(), [subspace.factor])
    weight = subspace.base.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(linear(x, weight).sin().sum(), [weight])
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize(("parameterization", "shape"), CASES)
@pytest.mark.parametrize("experts", [False, True])
def test_updates_stay_out_of_the_kept_directions(
    parameterization: str, shape: str, experts: bool
) -> None:
    full_shape = (2, *SHAPES[shape]) if experts else SHAPES[shape]
    subspace = _subspace(parameterization, full_shape, dtype=torch.float32)
    optimizer = torch.optim.AdamW(_factors(subspace), lr=0.05, weight_decay=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (subspace.weight() - 1.0).pow(2).sum().backward()
        project_gradients([subspace])
        optimizer.step()
        project_values([subspace])
        refresh([subspace])
    left, _, right = torch.linalg.svd(subspace.base.double(), full_matrices=False)
    kept = min(SHAPES[shape]) - 2
    delta = subspace.dense().double() - subspace.base.double()
    assert delta.norm() > 0.1
    assert (left[..., :kept].mT @ delta).norm() / delta.norm() < 2e-6
    assert (delta @ right[..., :kept, :].mT).norm() / delta.norm() < 2e-6
    assert subspace.leak() < 2e-6


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_leak_sees_a_value_that_was_not_projected(shape: str) -> None:
    subspace = _subspace("exact", SHAPES[shape])
    assert subspace.leak() == 0.0
    with torch.no_grad():
        subspace.factor.normal_()
    assert subspace.leak() > 0.1
    project_values([subspace])
    assert subspace.leak() < 1e-12


class Widest(TorchDispatchMode):
    """The size of the largest float64 tensor that comes into being."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("exported", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 9, 5), (4, 5, 9)])
@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_the_leak_of_experts_is_measured_one_matrix_at_a_time(
    parameterization: str, shape: tuple[int, ...], exported: torch.dtype | None
) -> None:
    subspace = _subspace(parameterization, shape, dtype=torch.float32)
    with torch.no_grad():
        for factor in _factors(subspace):
            factor.normal_()  # leaks: nothing projects it
    refresh([subspace])
    if exported is None:
        delta = _effective_by_autograd(exact := copy.deepcopy(subspace).double()) - exact.base
    else:
        delta = subspace.dense().to(exported).double() - subspace.base.double()
    rows = _kept_part_of_all(subspace.kept_rows, subspace.free_rows, delta)
    flipped = [None if p is None else p.mT for p in (subspace.kept_cols, subspace.free_cols)]
    cols = _kept_part_of_all(*flipped, delta.mT)
    expected = float((torch.maximum(rows.norm(), cols.norm()) / delta.norm()).detach())
    with Widest() as widest:
        found = subspace.leak(exported)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < widest.numbers <= shape[1] * shape[2]


def _kept_part_of_all(kept: Tensor | None, free: Tensor | None, delta: Tensor) -> Tensor:
    """Of all experts at once, as `SubspaceWeight.leak` defines it."""
    if kept is not None:
        return kept.double().mT @ delta
    assert free is not None
    return delta - free.double() @ (free.double().mT @ delta)


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_projected_gradient_is_the_nearest_allowed_one(shape: str) -> None:
    subspace = _subspace("exact", SHAPES[shape])
    subspace.factor.grad = torch.randn_like(subspace.factor)
    raw = subspace.factor.grad.clone()
    project_gradients([subspace])
    projected = subspace.factor.grad
    assert projected.norm() < raw.norm()
    assert torch.allclose(
        (raw - projected).flatten() @ projected.flatten(), torch.zeros(1).double()
    )
    again = projected.clone()
    project_gradients([subspace])
    assert torch.allclose(subspace.factor.grad, again)


def test_exact_spans_every_allowed_update() -> None:
    for shape in SHAPES.values():
        subspace = _subspace("exact", shape)
        left, _, right = torch.linalg.svd(subspace.base, full_matrices=False)
        kept_left, kept_right = left[:, : min(shape) - 2], right[: min(shape) - 2]
        wanted = torch.randn(shape, dtype=torch.float64)
        wanted = wanted - kept_left @ (kept_left.T @ wanted)
        wanted = wanted - (wanted @ kept_right.T) @ kept_right
        with torch.no_grad():
            factor = wanted if subspace.free_rows is None else subspace.free_rows.T @ wanted
            factor = factor if subspace.free_cols is None else factor @ subspace.free_cols.T
            subspace.factor.copy_(factor)
        assert torch.allclose(subspace.dense() - subspace.base, wanted, atol=1e-10)


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_step_zero_is_the_base_bit_for_bit(parameterization: str) -> None:
    subspace = _subspace(parameterization, (9, 5), dtype=torch.bfloat16)
    assert torch.equal(subspace.effective, subspace.base)
    refresh([subspace])
    assert torch.equal(subspace.effective, subspace.base)
    assert {factor.dtype for factor in _factors(subspace)} == {torch.float32}


def test_weight_decay_shrinks_the_update_and_not_the_base() -> None:
    subspace = _subspace("exact", (6, 6))
    _move(subspace)
    before = subspace.dense() - subspace.base
    optimizer = torch.optim.AdamW(_factors(subspace), lr=0.1, weight_decay=0.5)
    subspace.factor.grad = torch.zeros_like(subspace.factor)
    optimizer.step()
    refresh([subspace])
    assert torch.allclose(subspace.dense() - subspace.base, before * 0.95)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7), (2, 2, 3, 7)])
def test_what_a_layer_gives_may_be_changed_in_place(
    parameterization: str, shape: tuple[int, ...], conv1d: bool
) -> None:
    """As models do with the output of a linear layer, of one with a bias too."""
    subspace = _subspace(parameterization, (7, 9) if conv1d else (9, 7))
    for bias in (None, nn.Parameter(torch.randn(9, dtype=torch.float64))):
        module = SubspaceLinear(subspace, bias, conv1d)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        leaves = [x, *_factors(subspace)]
        y = module(x)
        y += 1.0
        y[..., 0].mul_(3.0)
        weight = _effective_by_autograd(subspace)
        plain = linear(x, weight.T if conv1d else weight, bias) + 1.0
        scaled = torch.cat([3.0 * plain[..., :1], plain[..., 1:]], dim=-1)
        assert torch.allclose(y, scaled)
        found, wanted = (torch.autograd.grad(out.sin().sum(), leaves) for out in (y, scaled))
        for got, reference in zip(found, wanted, strict=True):
            assert torch.allclose(got, reference, atol=1e-10)


def test_no_dense_weight_gradient_is_formed() -> None:
    subspace = _subspace("exact", (64, 64), dtype=torch.float32)
    module = SubspaceLinear(subspace, None, conv1d=False)
    module(torch.randn(4, 64)).sum().backward()
    assert subspace.effective.grad is None
    assert subspace.factor.grad is not None
    assert subspace.factor.grad.shape == (2, 2)


def test_micro_batches_accumulate() -> None:
    subspace = _subspace("exact", (9, 5))
    module = SubspaceLinear(subspace, None, conv1d=False)
    x = torch.randn(8, 5, dtype=torch.float64)
    module(x).sin().sum().backward()
    whole = subspace.factor.grad.clone()
    subspace.factor.grad = None
    for part in x.split(3):
        module(part).sin().sum().backward()
    assert torch.allclose(subspace.factor.grad, whole)


def test_bfloat16_compute_gives_float32_gradients_close_to_exact_ones() -> None:
    exact = _subspace("exact", (48, 32), rank=8)
    low = SubspaceWeight(
        exact.base.bfloat16(), split_weight(exact.base.float(), 8, "exact"), 8, "exact"
    )
    x = torch.randn(64, 32)
    SubspaceLinear(exact, None, conv1d=False)(x.double()).sum().backward()
    SubspaceLinear(low, None, conv1d=False)(x.bfloat16()).float().sum().backward()
    assert low.factor.grad.dtype == torch.float32
    error = (low.factor.grad.double() - exact.factor.grad).norm() / exact.factor.grad.norm()
    assert error < 0.02
