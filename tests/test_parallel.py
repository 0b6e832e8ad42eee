"""Two and three real processes give what one gives."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from osft_trainer.export import export_hf
from osft_trainer.forward import loss_tokens
from osft_trainer.model import convert
from osft_trainer.optimizer import build_optimizer
from osft_trainer.parallel import (
    World,
    clip_gradients,
    set_gradient_sync,
    shard,
    start_world,
    stop_world,
    sum_over_ranks,
)
from osft_trainer.targets import decoder_blocks, plan_targets
from tiny_models import packed_batch, save_tiny_model, tiny_model

STEPS = 6
CASES = [
    ("llama", "exact", "norms"),
    ("llama", "factored", "frozen"),
    ("gpt2", "exact", "all"),
    ("mixtral", "exact", "frozen"),
    ("llama", "dense", "all"),  # nothing is frozen
]
SIZES: dict[str, dict[str, object]] = {
    "llama": {"hidden_size": 40, "intermediate_size": 51, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 40, "n_layer": 1},
    "mixtral": {"num_hidden_layers": 1},  # 4 experts; grouped products ask for rows of 16 bytes
}
ALONE = World(0, 0, 1, torch.device("cpu"))


def _train(
    world: World, folder: Path, family: str, parameterization: str, other: str
) -> dict[str, Any]:
    """Train on the same 3 packs a step, dealt out to the ranks; losses, norms and leak.

    A rank that is dealt fewer packs than the first runs a stand-in without loss: FSDP's collectives
    pair up only when all ranks run forward and backward equally often.
    Sizes are uneven on purpose: 40, 51 and the ranks from ratio 0.3 do not all divide by 2 or by
    3, so shards differ in size.
    """
    model = tiny_model(family, **SIZES[family])
    osft = convert(model, plan_targets(model, 0.3, parameterization, other_parameters=other))
    shard(osft, world)
    trainables = osft.trainables()
    told = tiny.training(folder, folder, folder, learning_rate=5e-3, beta2=0.999)
    optimizer = build_optimizer(trainables, told, shared=osft.shared_moments())
    losses, norms = [], []
    for step in range(STEPS):
        batches = [packed_batch([5, 6, 4], seed=100 * step + i) for i in range(3)]
        tokens = sum(loss_tokens(b["labels"], b["position_ids"]) for b in batches)
        mine = batches[world.rank :: world.size]
        mine += [_without_loss(batches[0])] * (len(batches[:: world.size]) - len(mine))
        total = 0.0
        for i, batch in enumerate(mine):
            set_gradient_sync(osft, world, i == len(mine) - 1)
            loss = osft(**batch) / tokens
            loss.backward()
            total += float(loss.detach())
        osft.project_gradients()
        norms.append(clip_gradients(trainables.values(), 0.5, world))
        optimizer.step()
        osft.finish_step(step + 1)
        optimizer.zero_grad(set_to_none=True)
        losses.append(sum_over_ranks(total, world))
    sharded = all(isinstance(p, DTensor) for p in osft.parameters())
    result = {"losses": losses, "norms": norms, "leak": osft.leak(), "sharded": sharded}
    if family == "llama" and parameterization == "exact":
        export_hf(osft, folder / "base", folder / f"out-{world.size}", world)
    return result


def _without_loss(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def train_all(folder: Path) -> None:
    """One rank of a world; the first writes what it found."""
    # Short: ranks that wait for each other shall fail, not hang.
    world = start_world("cpu", timeout=timedelta(seconds=60))
    found = [_train(world, folder, *case) for case in CASES]
    if world.rank == 0:
        (folder / f"{world.size}.json").write_text(json.dumps(found))
    stop_world(world)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "base", **SIZES["llama"])
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What every case gave, by number of ranks."""
    found = {1: [_train(ALONE, folder, *case) for case in CASES]}
    for size in (2, 3):
        assert tiny.finish(tiny.start_ranks(train_all, size, [(folder,)] * size)) == [0] * size
        found[size] = json.loads((folder / f"{size}.json").read_text())
    return found


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one_process(
    results: dict[int, list[dict[str, Any]]], size: int, case: int
) -> None:
    one, many = results[1][case], results[size][case]
    assert one["losses"] == pytest.approx(many["losses"], abs=1e-4)
    assert one["norms"] == pytest.approx(many["norms"], abs=1e-4)
    assert many["sharded"]
    assert not one["sharded"]
    assert many["leak"] < 1e-5


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_export_equals_the_export_of_one(
    results: dict[int, list[dict[str, Any]]], folder: Path, size: int
) -> None:
    one = load_file(folder / "out-1" / "model.safetensors")
    many = load_file(folder / f"out-{size}" / "model.safetensors")
    assert set(one) == set(many)
    for name, tensor in one.items():
        assert torch.allclose(many[name], tensor, atol=1e-4), name
    assert not list(folder.glob(f".out-{size}.*")), "nothing half written"


def gather_plain() -> None:
    """One of two ranks that train every weight of a bfloat16 model."""
    world = start_world("cpu", timeout=timedelta(seconds=60))
    hf = tiny_model("llama").to(torch.bfloat16)
    model = convert(hf, plan_targets(hf, 0.3, "dense", other_parameters="all"))
    shard(model, world)
    gathered: set[torch.dtype] = set()
    _, blocks = decoder_blocks(model.hf)
    blocks[0].register_forward_pre_hook(
        lambda block, _: gathered.update(p.dtype for p in block.parameters())
    )
    model(**packed_batch([5, 6, 4])).backward()
    assert gathered == {torch.bfloat16}, gathered
    kept = [tensor.dtype for p in model.trainables().values() for tensor in (p, p.grad)]
    assert set(kept) == {torch.float32}
    stop_world(world)


def test_float32_masters_travel_in_the_type_of_the_arithmetic() -> None:
    """Also where nothing is frozen whose type could tell."""
    assert tiny.finish(tiny.start_ranks(gather_plain, 2, [()] * 2)) == [0, 0]


def test_one_process_uses_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = start_world("cpu")
    assert world == ALONE
    assert not torch.distributed.is_initialized()
    stop_world(world)


def test_clipping_scales_to_the_norm_and_leaves_small_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0, ALONE) == pytest.approx(5.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8])
    assert clip_gradients([parameter], 2.0, ALONE) == pytest.approx(1.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8])


class Counted(TorchDispatchMode):
    """Counts the operations inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_clipping_takes_as_many_operations_for_many_gradients_as_for_few() -> None:
    """A GPU waits for the host to start each of them."""

    def operations(count: int) -> int:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        with Counted() as mode:
            clip_gradients(parameters, 1.0, ALONE)
        return mode.count

    assert operations(40) == operations(4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_reports_a_broken_norm_and_touches_nothing(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, bad])
    assert not clip_gradients([parameter], 1.0, ALONE) <= 1e30
    assert float(parameter.grad[0]) == 1.0
