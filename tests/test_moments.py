"""The step that commutes with the projection: its formula, its end, and states of it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from osft_trainer import checkpoint
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.linear import SubspaceWeight
from osft_trainer.moments import SharedMoment, SubspaceAdamW
from osft_trainer.parallel import World
from osft_trainer.projection import project_gradients, project_momentum, project_values
from osft_trainer.report import RunFolder
from osft_trainer.saving import Saver
from osft_trainer.shards import Rows, open_shard, read_rows, write_rows
from osft_trainer.subspace import split_weight

SHAPES = {
    "tall": (48, 16),
    "wide": (16, 48),
    "tall experts": (2, 48, 16),
    "wide experts": (2, 16, 48),
}
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def subspace_of(shape: str, dtype: torch.dtype = torch.float64) -> SubspaceWeight:
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape], dtype=torch.float64)
    split = split_weight(weight, 4, "exact")
    made = SubspaceWeight(weight, split, 4, "exact")
    return made.to(dtype)


def optimizer_of(subspace: SubspaceWeight, **options: object) -> SubspaceAdamW:
    moment = subspace.shared_moment
    assert moment is not None
    told = {**OPTIONS, **options}
    return SubspaceAdamW([{"params": [subspace.factor]}], {subspace.factor: moment}, **told)


def kept_part(subspace: SubspaceWeight, values: Tensor) -> float:
    """Share of some values in the kept directions, which `projected` names."""
    ((_, side, kept),) = subspace.projected()
    found = kept.mT @ values if side == "rows" else values @ kept.mT
    return float(found.norm() / values.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_formula_in_free_coordinates(shape: str) -> None:
    """AdamW in any orthonormal coordinates of the free space, one divisor for each line of them."""
    subspace = subspace_of(shape)
    ((factor, side, kept),) = subspace.projected()
    basis = kept if side == "rows" else kept.mT
    whole = torch.linalg.qr(basis, mode="complete").Q
    free = whole[..., basis.shape[-1] :]
    flip = (lambda t: t) if side == "rows" else (lambda t: t.mT)
    coordinates = torch.zeros_like(free.mT @ flip(factor.data))
    mean, second = torch.zeros_like(coordinates), torch.zeros_like(coordinates[..., :1, :])
    optimizer = optimizer_of(subspace)
    for step in range(1, 8):
        factor.grad = torch.randn_like(factor)
        gradient = free.mT @ flip(factor.grad)
        project_gradients([subspace])
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square().mean(-2, keepdim=True)
        divisor = (second / (1 - 0.95**step)).sqrt() + 1e-8
        coordinates = coordinates * (1 - 0.02 * 0.1) - 0.02 * mean / (1 - 0.9**step) / divisor
        assert torch.allclose(free @ coordinates, flip(factor.data), atol=1e-12)
        # Without one projection of values.
        assert kept_part(subspace, factor.data) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_projection_after_the_step_equals_one_before_it(shape: str) -> None:
    before, after = subspace_of(shape), subspace_of(shape)
    raw = torch.randn_like(before.factor)
    for subspace in (before, after):
        subspace.factor.grad = raw.clone()
    project_gradients([before])
    one, other = optimizer_of(before), optimizer_of(after)
    one.step()
    other.step()
    project_values([after])
    # Whole gradients are longer along each line, which is all that differs.
    moment = before.shared_moment
    assert moment is not None
    ratio = before.factor.data / after.factor.data
    assert torch.allclose(ratio, ratio.narrow(moment.axis, 0, 1).expand_as(ratio))


def attained(shape: str, shared: bool, dtype: torch.dtype, kept: float = 10.0) -> float:
    """Share of the attainable fall of a loss; its residual is so many times longer where kept."""
    subspace = subspace_of(shape, dtype)
    factor = subspace.factor
    residual = torch.randn_like(factor)
    inside = residual.clone()
    factor.grad = inside
    project_gradients([subspace])
    outside = residual - inside
    target = inside + outside * (kept * inside.norm() / outside.norm())
    told = {**OPTIONS, "weight_decay": 0.0}
    optimizer = (
        optimizer_of(subspace, weight_decay=0.0) if shared else torch.optim.AdamW([factor], **told)  # type: ignore[arg-type]
    )
    steps = 400
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / steps))
        factor.grad = (factor.data - target).clone()
        if shared:
            project_gradients([subspace])
        optimizer.step()
        if not shared or (step + 1) % 16 == 0:
            project_values([subspace])
    assert kept_part(subspace, factor.data) < (1e-12 if dtype == torch.float64 else 1e-6)
    missed = (factor.data - inside).square().sum() / inside.square().sum()
    return 1 - float(missed.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_ends_at_the_best_allowed_point(shape: str, dtype: torch.dtype) -> None:
    assert attained(shape, shared=True, dtype=dtype) >= 0.995


def test_values_projected_alone_do_not_end_there() -> None:
    assert attained("tall", shared=False, dtype=torch.float64) < 0.9


def test_other_parameters_take_the_steps_of_adamw_bit_for_bit() -> None:
    torch.manual_seed(0)
    subspace = subspace_of("tall", torch.float32)
    ours, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    moment = subspace.shared_moment
    assert moment is not None
    groups = [{"params": [ours]}, {"params": [subspace.factor]}]
    mine = SubspaceAdamW(groups, {subspace.factor: moment}, **OPTIONS)
    plain = torch.optim.AdamW([theirs], **OPTIONS)  # type: ignore[arg-type]
    for _ in range(3):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        subspace.factor.grad = torch.randn_like(subspace.factor)
        mine.step()
        plain.step()
    assert torch.equal(ours, theirs)
    sizes = {name: mine.state[subspace.factor][name].numel() for name in ("exp_avg", "exp_avg_sq")}
    assert sizes == {"exp_avg": 48 * 4, "exp_avg_sq": 4}


def test_a_factor_without_gradient_stays() -> None:
    subspace = subspace_of("wide")
    optimizer = optimizer_of(subspace)
    optimizer.step()
    assert not subspace.factor.any()
    assert not optimizer.state[subspace.factor]


def earlier_state(subspace: SubspaceWeight) -> torch.optim.AdamW:
    """What the version before this optimizer had in memory: whole gradients, every number alone."""
    optimizer = torch.optim.AdamW([subspace.factor], **OPTIONS)  # type: ignore[arg-type]
    for _ in range(5):
        subspace.factor.grad = torch.randn_like(subspace.factor)
        optimizer.step()
        project_values([subspace])
    return optimizer


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_the_version_before_go_on(tmp_path: Path, shape: str, ranks: int) -> None:
    """Second moments become the mean, first ones are projected: steps stay in the set."""
    saved = subspace_of(shape, torch.float32)
    before = earlier_state(saved).state[saved.factor]
    whole = {"value/f": saved.factor.data}
    whole |= {f"{name}/f": before[name] for name in ("exp_avg", "exp_avg_sq")}
    borders = [len(saved.factor) * rank // ranks for rank in range(ranks + 1)]
    for rank, rows in enumerate(pairwise(borders)):
        mine = {name: tensor[slice(*rows)].contiguous() for name, tensor in whole.items()}
        copied = Rows(mine, {"f": rows}, {"f": list(saved.factor.shape)}, {"f": 5.0})
        write_rows(tmp_path, rank, copied)
    loaded = subspace_of(shape, torch.float32)
    optimizer = optimizer_of(loaded)
    shards = [shard for rank in range(ranks) if (shard := open_shard(tmp_path, rank))]
    read_rows(shards, {"f": loaded.factor}, optimizer, is_elementwise=True)
    project_momentum([loaded], optimizer)
    state, moment = optimizer.state[loaded.factor], loaded.shared_moment
    assert moment is not None
    assert torch.equal(loaded.factor, saved.factor)
    assert state["step"] == 5
    mean = before["exp_avg_sq"].sum(moment.axis, keepdim=True) / moment.free
    assert torch.allclose(state["exp_avg_sq"], mean)
    assert kept_part(loaded, before["exp_avg"]) > 0.1
    assert kept_part(loaded, state["exp_avg"]) < 1e-6
    loaded.factor.grad = torch.randn_like(loaded.factor)
    project_gradients([loaded])
    optimizer.step()
    assert kept_part(loaded, loaded.factor.data) < 1e-6


def test_a_state_of_the_format_before_is_taken_and_projected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    world = World(0, 0, 1, torch.device("cpu"))
    states = Checkpoints(RunFolder(tmp_path), world, 1, 2, lambda: None, token="t")
    saved = subspace_of("tall", torch.float32)
    state = State({"f": saved.factor}, earlier_state(saved), "d")
    Saver(states, tiny.training(Path("m"), Path("d"), Path("o")), 0).finish_with(
        state, Position(step=5)
    )
    path = RunFolder(tmp_path).checkpoint(5) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": checkpoint.ELEMENTWISE}))
    loaded = subspace_of("tall", torch.float32)
    optimizer = optimizer_of(loaded)
    projected: list[bool] = []
    now = State({"f": loaded.factor}, optimizer, "d", lambda: projected.append(True))
    assert states.load(now) == Position(step=5)
    assert projected == [True]
    assert torch.equal(loaded.factor, saved.factor)
    assert optimizer.state[loaded.factor]["exp_avg_sq"].shape == (1, 4)


def test_the_axis_and_the_directions_follow_from_the_form() -> None:
    assert subspace_of("tall").shared_moment == SharedMoment(-2, 36)
    assert subspace_of("wide").shared_moment == SharedMoment(-1, 36)
    square = torch.randn(6, 6)
    split = split_weight(square, 2, "exact")
    assert SubspaceWeight(square, split, 2, "exact").shared_moment is None
