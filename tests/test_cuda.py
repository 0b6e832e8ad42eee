"""The path on CUDA: bfloat16, Liger kernels, the fused optimizer, FSDP2 over NCCL.

What needs no CUDA to be tried runs on the CPU, too, so that the tests themselves are tested.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import tiny
from osft_trainer import worker
from osft_trainer.blocks import enable_activation_checkpointing
from osft_trainer.exchange import full
from osft_trainer.liger import apply_liger, undone_afterwards
from osft_trainer.model import OSFTModel, convert
from osft_trainer.optimizer import build_optimizer
from osft_trainer.parallel import World, clip_gradients, shard, split_over_ranks, start_world
from osft_trainer.targets import plan_targets
from tiny_models import packed_batch, tiny_model

LENGTHS = [9, 16, 5]
STEPS = 4
PLACES = [
    pytest.param("cpu", torch.float32, id="cpu"),
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param(
        "cuda",
        torch.bfloat16,
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def own_code_afterwards() -> Iterator[None]:
    """Liger's rotation is bound for every model of a family in this process, those on the CPU, too.

    What a test measures by comes first, then what it patches.
    """
    with undone_afterwards():
        yield


def build(
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    liger: bool,
    selective: bool = False,
    others: str = "norms",
) -> OSFTModel:
    """As `assembly.build_model` puts it together, up to sharding."""
    # Rounded in any case: other weights would have other subspaces.
    hf = tiny_model(family).to(torch.bfloat16).to(dtype)
    hf.train()
    plan = plan_targets(hf, 0.5, other_parameters=others)
    off = apply_liger(hf, liger, device, selective)
    assert (off is None) == (liger and device.type == "cuda")
    enable_activation_checkpointing(hf, selective)
    return convert(hf, plan, fused_loss=off is None)


def train(model: OSFTModel, world: World) -> tuple[list[float], dict[str, Tensor]]:
    """A few real steps; losses, and the gradients of the first step."""
    told = tiny.training(Path("m"), Path("d"), Path("o"))
    optimizer = build_optimizer(
        model.trainables(), told, model.plan.trained_others, model.shared_moments()
    )
    batch = {name: value.to(world.device) for name, value in packed_batch(LENGTHS).items()}
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = model(**batch) / sum(LENGTHS)
        loss.backward()
        model.project_gradients()
        first = first or {
            name.removesuffix("_trained.value"): full(p.grad).cpu().clone()
            for name, p in model.trainables().items()
        }
        clip_gradients(model.trainables().values(), 1.0, world)
        optimizer.step()
        model.finish_step(step + 1)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses, first


def plain(family: str, others: str = "norms") -> tuple[list[float], dict[str, Tensor]]:
    """The same on the CPU in float32."""
    alone = World(0, 0, 1, torch.device("cpu"))
    return train(build(family, torch.float32, alone.device, liger=False, others=others), alone)


def assert_close(
    found: tuple[list[float], dict[str, Tensor]],
    expected: tuple[list[float], dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    losses, gradients = found
    wanted_losses, wanted = expected
    assert losses == pytest.approx(wanted_losses, rel=1e-4 if dtype == torch.float32 else 0.03)
    assert gradients.keys() == wanted.keys()
    bound = 0.999999 if dtype == torch.float32 else 0.98
    # Each of these by itself: in a mean over all, a wrong rotation would hide.
    rotated = [name for name in wanted if "q_proj" in name or "k_proj" in name]
    assert rotated
    for names in [[*wanted], *([name] for name in rotated)]:
        found_ones, wanted_ones = (
            torch.cat([one[name].double().flatten() for name in names])
            for one in (gradients, wanted)
        )
        alike = float(torch.cosine_similarity(found_ones, wanted_ones, dim=0))
        assert alike > bound, (names[:2], alike)


@pytest.mark.parametrize(("kind", "dtype"), PLACES)
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "mixtral"])
def test_steps_agree_with_float32_without_kernels(
    family: str, selective: bool, kind: str, dtype: torch.dtype
) -> None:
    """On CUDA with every Liger kernel of the family, its fused loss, and the fused AdamW."""
    world = World(0, 0, 1, torch.device(kind))
    expected = plain(family)
    model = build(family, dtype, world.device, liger=True, selective=selective)
    shard(model, world)
    assert {p.dtype for p in model.trainables().values()} == {torch.float32}
    assert_close(train(model, world), expected, dtype)
    assert model.leak() < 1e-5


@pytest.mark.parametrize(("kind", "dtype"), PLACES)
def test_steps_of_a_trained_head_agree(kind: str, dtype: torch.dtype) -> None:
    """Its gradient is the fused loss's own."""
    world = World(0, 0, 1, torch.device(kind))
    expected = plain("llama", "all")
    assert any("lm_head" in name for name in expected[1])
    model = build("llama", dtype, world.device, liger=True, others="all")
    shard(model, world)
    assert_close(train(model, world), expected, dtype)


def test_after_the_kernels_nothing_on_the_cpu_can_be_measured_by() -> None:
    """Why `own_code_afterwards` is here; patching runs nothing, so any machine can do it."""
    with undone_afterwards():
        build("llama", torch.bfloat16, torch.device("cuda"), liger=True)
        with pytest.raises((RuntimeError, ValueError)):
            plain("llama")
    assert plain("llama")[0]


def train_sharded(out: Path, kind: str, dtype: torch.dtype, selective: bool) -> None:
    """The only rank of a world that is split all the same."""
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None
    )
    world = World(0, 0, 1, device)
    model = build("llama", dtype, device, liger=True, selective=selective)
    split_over_ranks(model, world)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    losses, gradients = train(model, world)
    torch.save({"losses": losses, "gradients": gradients, "leak": model.leak()}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "dtype"), PLACES)
@pytest.mark.parametrize("selective", [False, True])
def test_one_rank_under_fsdp_agrees(
    tmp_path: Path, selective: bool, kind: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "found.pt"
    assert tiny.finish(tiny.start_ranks(train_sharded, 1, [(out, kind, dtype, selective)])) == [0]
    found = torch.load(out, weights_only=True)
    assert_close((found["losses"], found["gradients"]), plain("llama"), dtype)
    assert found["leak"] < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_whole_run_on_cuda(tmp_path: Path) -> None:
    """From arguments to a folder that transformers loads, stopped once and resumed."""
    data = tiny.data_file(tmp_path / "data.jsonl")
    base = tiny.model_folder(tmp_path / "model")
    for steps in (3, 6):
        told = tiny.arguments(
            base, data, tmp_path / "run", training_mode="step", max_steps=steps,
            lr_scheduler="constant", checkpoint_every_steps=3, save_final_checkpoint=steps == 6,
        )  # fmt: skip
        result = worker.run(told, start_world("cuda"), stop=threading.Event(), environ={})
    rows = tiny.rows(told.training)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert result.final_dir is not None
    AutoModelForCausalLM.from_pretrained(result.final_dir)
    assert json.loads((result.final_dir / "osft.json").read_text())["leak"] < 1e-5


@pytest.mark.parametrize(("kind", "dtype"), PLACES)
def test_a_whole_run_by_activations(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """What an update may touch is read on the device, and losses are measured between steps."""
    data = tiny.data_file(tmp_path / "data.jsonl", conversations=40)
    old = tiny.data_file(tmp_path / "old.jsonl", conversations=40, task="repeat", seed=1)
    told = tiny.arguments(
        tiny.model_folder(tmp_path / "model"), data, tmp_path / "run",
        compute_dtype=str(dtype).removeprefix("torch."), split_by="activations",
        rank_allocation="adaptive", retention_data_path=str(old), replay_ratio=0.25,
        validation_split=0.2, selective_activation_checkpointing=True,
        activation_checkpointing=True, checkpoint_every_steps=2,
    )  # fmt: skip
    result = worker.run(told, start_world(kind), stop=threading.Event(), environ={})
    rows = tiny.rows(told.training)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert result.validation_loss is not None
    assert result.retention is not None
    assert result.retention.loss_after is not None
    assert result.leak is not None
    assert result.leak < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_ranks_over_nccl(tmp_path: Path) -> None:
    data = tiny.data_file(tmp_path / "data.jsonl")
    base = tiny.model_folder(tmp_path / "model")
    losses = []
    for ranks in (1, 2):
        told = tiny.arguments(base, data, tmp_path / str(ranks), compute_dtype="float32")
        assert tiny.finish(tiny.start_ranks(run_on_cuda, ranks, [(told,)] * ranks)) == [0] * ranks
        losses.append([row["loss"] for row in tiny.rows(told.training)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def run_on_cuda(told: worker.TrainerArguments) -> None:
    """One rank of a run over NCCL."""
    worker.run(told, start_world("cuda"), stop=threading.Event(), environ={})
