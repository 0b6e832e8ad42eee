"""Matrices with one input that are split by activations share one basis, on disk and in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import tiny
from osft_trainer.assembly import plan_of
from osft_trainer.blocks import keep_free_parts
from osft_trainer.config import TrainingParameters
from osft_trainer.decomposition import stored
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.parallel import World, shard, start_world, stop_world
from osft_trainer.report import RunFolder
from tiny_models import packed_batch, shared_bases

ALONE = World(0, 0, 1, torch.device("cpu"))


def trained(base: Path, out: Path) -> TrainingParameters:
    """A finished run of two steps."""
    data = tiny.data_file(base / "data.jsonl")
    told = tiny.training(
        base, data, out, training_mode="step", max_steps=2, split_by="activations",
        retention_data_path=str(data), save_final_checkpoint=False,
    )  # fmt: skip
    tiny.run(told)
    return told


def converted(told: TrainingParameters) -> OSFTModel:
    """The run's model, from its files."""
    hf = load_model(told.model_path, torch.float32)
    cache = RunFolder(Path(told.ckpt_output_dir)).cache
    (folder,) = (cache / "decomposition").iterdir()
    bases = stored(plan_of(hf, told), cache, folder.name)
    assert bases is not None
    return convert(hf, bases.plan, decompose=bases.decompose)


def bases_by_name(model: OSFTModel) -> dict[str, nn.Parameter]:
    """Of the first block, by the last part of the matrix's name."""
    found = {}
    for name, subspace in model.subspaces():
        if ".layers.0." in name:
            assert isinstance(subspace.free_cols, nn.Parameter)
            found[name.split(".")[-2]] = subspace.free_cols
    return found


def test_one_input_has_one_file_and_one_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.model_folder(tmp_path / "model")
    told = trained(base, tmp_path / "linked")
    model = converted(told)
    found = bases_by_name(model)
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(basis) for basis in found.values()}) == 4
    files = list(RunFolder(tmp_path / "linked").cache.glob("decomposition/*/*.safetensors"))
    assert (len(files), len({file.stat().st_ino for file in files})) == (14, 8)

    def no_links(*names: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    other = trained(base, tmp_path / "copied")
    copies = bases_by_name(converted(other))
    assert len({id(basis) for basis in copies.values()}) == 4
    assert all(torch.equal(copies[name], found[name]) for name in found)
    assert tiny.rows(other) == tiny.rows(told)


def shared() -> OSFTModel:
    """Ranks do not divide its widths evenly."""
    return shared_bases("llama", 0.3, hidden_size=40, intermediate_size=51)


def steps(model: OSFTModel, world: World) -> list[float]:
    """Losses of a few steps on the same samples."""
    shard(model, world)
    optimizer = torch.optim.AdamW(model.trainables().values(), lr=1e-3)
    losses = []
    for _ in range(3):
        # FSDP adds the ranks' gradients up.
        loss = model(**packed_batch([7, 5])) / world.size
        loss.backward()
        model.project_gradients()
        optimizer.step()
        model.finish_step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()) * world.size)
    return losses


def on_two_ranks(out: Path) -> None:
    world = start_world("cpu")
    model = shared()
    keep_free_parts(model)
    assert all(subspace.keeps_free_part for _, subspace in model.subspaces())
    losses = steps(model, world)
    basis = next(model.subspaces())[1].free_cols
    assert isinstance(basis, DTensor)
    leak = model.leak()
    if world.rank == 0:
        torch.save({"losses": losses, "leak": leak}, out)
    stop_world(world)


def test_a_shared_basis_is_split_over_ranks(tmp_path: Path) -> None:
    out = tmp_path / "found.pt"
    assert tiny.finish(tiny.start_ranks(on_two_ranks, 2, [(out,)] * 2)) == [0, 0]
    found = torch.load(out, weights_only=True)
    expected = steps(shared(), ALONE)
    assert found["losses"] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    assert found["leak"] < 1e-5
