"""The loss on held-out data: the mean over its tokens, and nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import tiny
from osft_trainer import evaluation
from osft_trainer.blocks import enable_activation_checkpointing
from osft_trainer.data import prepare
from osft_trainer.evaluation import mean_loss
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.outcome import NoLossTokens
from osft_trainer.parallel import World, shard, start_world, stop_world
from osft_trainer.prepared import PreparedData, open_prepared
from osft_trainer.targets import plan_targets

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return tiny.model_folder(folder / "model", attention_dropout=0.3)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("data")
    return prepare(
        tiny.data_file(folder / "data.jsonl"),
        tiny.tokenizer(),
        max_seq_len=64,
        on_overlong="error",
        cache_root=folder,
    )


def osft_model(base: Path) -> OSFTModel:
    """Converted, moved away from the base, in training with recomputed blocks."""
    hf = load_model(base, torch.float32)
    enable_activation_checkpointing(hf)
    model = convert(hf, plan_targets(hf, 0.5, other_parameters="all"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainables().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.finish_step()
    return model


def plain_loss(base: Path, model: OSFTModel, prepared: PreparedData) -> float:
    """Sample by sample, by transformers, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.hf.get_submodule(name.removesuffix(".weight")).weight)
    plain.double().eval()
    total = 0.0
    for index in range(len(prepared)):
        ids, labels = prepared.sample(index)
        counted = int((labels != -100).sum())
        total += plain(input_ids=ids[None], labels=labels[None]).loss.item() * counted
    return total / int(prepared.loss_counts.sum())


@pytest.mark.parametrize("at_once", [4096, 5])
def test_it_is_the_mean_over_all_tokens(
    base: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(evaluation, "SAMPLES_AT_ONCE", at_once)
    model = osft_model(base)
    expected = plain_loss(base, model, prepared)
    for tokens in (64, 1000):
        found = mean_loss(model, prepared, max_tokens_per_gpu=tokens, world=ALONE)
        assert found == pytest.approx(expected, rel=1e-6)


def test_it_leaves_no_trace(base: Path, prepared: PreparedData) -> None:
    model = osft_model(base)
    frozen = model.hf.model.layers[1].eval()
    for parameter in model.trainables().values():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    mean_loss(model, prepared, max_tokens_per_gpu=96, world=ALONE)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert model.training
    assert not frozen.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])
    assert all(bool((p.grad == 1).all()) for p in model.trainables().values())


def test_modes_come_back_after_a_failure(base: Path, prepared: PreparedData) -> None:
    model = osft_model(base)
    with pytest.raises(ValueError, match="more than max_tokens_per_gpu 8"):
        mean_loss(model, prepared, max_tokens_per_gpu=8, world=ALONE)
    assert all(module.training for module in model.modules())


def test_data_without_a_token_that_counts_is_named(base: Path, prepared: PreparedData) -> None:
    none = prepared.whole().part(np.arange(0))
    with pytest.raises(NoLossTokens, match="no token counts: give samples"):
        mean_loss(osft_model(base), none, max_tokens_per_gpu=96, world=ALONE)


def measure(base: Path, data: Path, out: Path) -> None:
    """On one of several ranks: before, inside and after a training step's backward."""
    world = start_world("cpu")
    prepared = open_prepared(data)
    model = osft_model(base)
    shard(model, world)
    found = [mean_loss(model, prepared, max_tokens_per_gpu=96, world=world)]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    ids, labels = prepared.sample(0)
    positions = torch.arange(len(ids))[None]
    torch.manual_seed(world.rank)
    model(input_ids=ids[None], position_ids=positions, labels=labels[None]).backward()
    first = [p.grad.to_local().clone() for p in model.trainables().values()]
    found.append(mean_loss(model, prepared, max_tokens_per_gpu=96, world=world))
    for parameter, gradient in zip(model.trainables().values(), first, strict=True):
        assert torch.equal(parameter.grad.to_local(), gradient)
        parameter.grad = None
    torch.manual_seed(world.rank)
    model(input_ids=ids[None], position_ids=positions, labels=labels[None]).backward()
    for parameter, gradient in zip(model.trainables().values(), first, strict=True):
        assert torch.equal(parameter.grad.to_local(), gradient)
    (out / f"rank-{world.rank}.json").write_text(json.dumps(found))
    stop_world(world)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_measure_together_what_one_does_alone(
    base: Path, prepared: PreparedData, tmp_path: Path, ranks: int
) -> None:
    given = [(base, prepared.folder, tmp_path)] * ranks
    assert tiny.finish(tiny.start_ranks(measure, ranks, given)) == [0] * ranks
    alone = mean_loss(osft_model(base), prepared, max_tokens_per_gpu=96, world=ALONE)
    every = [json.loads(path.read_text()) for path in tmp_path.glob("rank-*.json")]
    assert len(every) == ranks
    assert {number for found in every for number in found} == {every[0][0]}
    assert every[0][0] == pytest.approx(alone, rel=1e-6)
