"""Several tensors in one collective, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import tiny
from osft_trainer import exchange
from osft_trainer.exchange import full_all, in_chunks, local, sum_all
from osft_trainer.model import convert
from osft_trainer.parallel import World, shard, start_world, stop_world
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch, tiny_model

SHAPES = [(5, 3), (1, 2), (7,), (4, 2, 3), (2, 1)]
"""With three ranks some hold fewer rows, or none."""


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [*found, torch.randn(5, 2, generator=generator).double()]


def gather_and_sum() -> None:
    """One rank."""
    world = start_world("cpu", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (world.size,))
    whole = _tensors()
    parts = [distribute_tensor(t, mesh, [Shard(0)]) for t in whole]
    plain = torch.ones(3)
    *found, same = full_all([*parts, plain])
    assert same is plain
    for tensor, expected, part in zip(found, whole, parts, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
        assert torch.equal(part.full_tensor(), expected)
    mine = [torch.full((2, 2), float(world.rank)), torch.ones(3)]
    squares, ones = sum_all(mine, mesh.get_group())
    assert torch.equal(squares, torch.full((2, 2), float(sum(range(world.size)))))
    assert torch.equal(ones, torch.full((3,), float(world.size)))
    stop_world(world)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gathering_and_adding_together(ranks: int) -> None:
    assert tiny.finish(tiny.start_ranks(gather_and_sum, ranks, [()] * ranks)) == [0] * ranks


def _step(world: World, layers: int) -> tuple[list[Tensor], int]:
    """This rank's effective weights after a step, and how often the ranks met for it."""
    model = tiny_model("llama", num_hidden_layers=layers)
    osft = convert(model, plan_targets(model, 0.3, "factored"))
    shard(osft, world)
    optimizer = torch.optim.AdamW(osft.trainables().values(), lr=1e-2)
    osft(**packed_batch([5, 6])).backward()
    meetings = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **rest: object) -> object:
            nonlocal meetings
            meetings += 1
            return real(*args, **rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        osft.project_gradients()
        optimizer.step()
        osft.finish_step()
    return [local(subspace.effective.data).clone() for _, subspace in osft.subspaces()], meetings


def step_with_chunks_of_any_size() -> None:
    """One rank."""
    world = start_world("cpu", timeout=timedelta(seconds=60))
    expected, few = _step(world, layers=2)
    assert _step(world, layers=1)[1] == few == 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CHUNK_BYTES", 1)
        found, many = _step(world, layers=2)
    assert many == few * len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    stop_world(world)


def test_ranks_meet_equally_often_for_any_number_of_targets() -> None:
    assert tiny.finish(tiny.start_ranks(step_with_chunks_of_any_size, 2, [()] * 2)) == [0, 0]


def test_chunks_keep_the_order_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CHUNK_BYTES", 10)
    found = list(in_chunks([4, 6, 1, 30, 10, 0], lambda size: size))
    assert found == [[4, 6], [1], [30], [10, 0]]
    assert list(in_chunks([], lambda size: 1)) == []
