"""Converted models: forward, proofs over real optimizer steps, loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import tiny
from osft_trainer import forward, layout
from osft_trainer.attention import select
from osft_trainer.forward import loss_tokens, next_token_labels, packed_forward, packed_loss
from osft_trainer.liger import apply_liger, undone_afterwards
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.optimizer import build_optimizer
from osft_trainer.packing import collate
from osft_trainer.parallel import World, clip_gradients
from osft_trainer.targets import plan_targets
from tiny_models import FAMILIES, packed_batch, save_tiny_model, tiny_model

ALONE = World(0, 0, 1, torch.device("cpu"))
LENGTHS = [7, 1, 9, 5]


def train(model: OSFTModel, steps: int, learning_rate: float = 5e-3) -> list[float]:
    """Real AdamW steps with weight decay and clipping on the same few packs; mean losses."""
    trainables = model.trainables()
    told = tiny.training(
        Path("m"), Path("d"), Path("o"), learning_rate=learning_rate, weight_decay=0.1, beta2=0.999
    )
    optimizer = build_optimizer(trainables, told, shared=model.shared_moments())
    batches = [packed_batch([6, 8, 5], seed) for seed in range(3)]
    losses = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        tokens = loss_tokens(batch["labels"], batch["position_ids"])
        loss = model(**batch) / tokens
        loss.backward()
        losses.append(float(loss.detach()))
        model.project_gradients()
        clip_gradients(trainables.values(), 1.0, ALONE)
        optimizer.step()
        model.finish_step(step + 1)
        optimizer.zero_grad(set_to_none=True)
    return losses


def converted(family: str, ratio: float, parameterization: str = "exact", **kw: str) -> OSFTModel:
    """A tiny converted model."""
    model = tiny_model(family)
    return convert(model, plan_targets(model, ratio, parameterization, **kw))


@pytest.mark.parametrize(
    ("parameterization", "projected"), [("exact", True), ("core", False), ("factored", True)]
)
def test_gradients_are_projected_where_factors_may_leave_the_set(
    parameterization: str, projected: bool
) -> None:
    model = converted("llama", 0.5, parameterization)
    model(**packed_batch([6, 8])).backward()
    before = {name: p.grad.clone() for name, p in model.trainables().items()}
    model.project_gradients()
    same = [torch.equal(p.grad, before[name]) for name, p in model.trainables().items()]
    assert all(same) is not projected


def _alone(model: PreTrainedModel, ids: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([model(input_ids=part).logits[0] for part in ids.split(lengths, dim=1)])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_samples_do_not_see_one_another(family: str) -> None:
    model = tiny_model(family).eval()
    batch = packed_batch(LENGTHS)
    ids, positions = batch["input_ids"], batch["position_ids"]
    alone = _alone(model, ids, LENGTHS)
    packed = packed_forward(model, ids, positions)[0]
    assert (packed - alone).abs().max() < 1e-5
    # The test can see contamination: without restarting positions the logits do differ.
    leaky = packed_forward(model, ids, torch.arange(ids.shape[1])[None])[0]
    assert (leaky - alone).abs().max() > 1e-3
    targets = next_token_labels(batch["labels"], positions)[0]
    wanted = cross_entropy(alone.float(), targets, reduction="sum")
    assert torch.allclose(packed_loss(model, **batch), wanted, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_padded_fallback_equals_each_sample_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).eval()
    batch = packed_batch(LENGTHS)
    expected = packed_loss(model, **batch)
    monkeypatch.setattr(layout, "PACKED_FAMILIES", frozenset())
    logits = packed_forward(model, batch["input_ids"], batch["position_ids"])[0]
    assert (logits - _alone(model, batch["input_ids"], LENGTHS)).abs().max() < 1e-5
    assert torch.allclose(packed_loss(model, **batch), expected, rtol=1e-5)


def test_no_label_crosses_samples_even_if_the_data_says_so() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    labels = torch.tensor([[5, 6, 7, 8, 9]])
    assert next_token_labels(labels, positions).tolist() == [[6, 7, -100, 9, -100]]
    assert loss_tokens(labels, positions) == 3


def test_a_pack_without_labels_has_zero_loss_and_zero_gradients() -> None:
    model = converted("llama", 0.5, other_parameters="all")
    batch = packed_batch([5, 5])
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(not p.grad.any() for p in model.trainables().values() if p.grad is not None)


def test_chunked_loss_equals_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("gemma2", 0.5)
    batch = packed_batch(LENGTHS)
    whole = model(**batch)
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.trainables().items()}
    model.zero_grad()
    monkeypatch.setattr(forward, "_CHUNK_TOKENS", 4)
    parts = model(**batch)
    parts.backward()
    assert torch.allclose(parts, whole)
    for name, p in model.trainables().items():
        assert torch.allclose(p.grad, wanted[name], rtol=1e-4, atol=1e-5), name


class Watching(TorchDispatchMode):
    """Notes what a device would be waited for to learn its size, before and after the decoder."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.waits: list[str] = []
        hf.base_model.register_forward_hook(lambda *_: self.waits.append("decoder"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            self.waits.append("nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known", [True, False])
def test_no_device_is_waited_for_behind_the_decoder(known: bool) -> None:
    samples = [(torch.arange(3, 9), torch.tensor([-100, 4, -100, 6, 7, -100]))] * 2
    micro = collate(samples)
    model = tiny_model("llama")
    select(model)  # a dense mask is made differently
    told = micro.inputs(torch.device("cpu"))
    if not known:
        told.pop("places")
    with Watching(model) as watching:
        loss = packed_loss(model, **told)
    assert watching.waits == (["decoder"] if known else ["nonzero", "decoder"])
    assert micro.loss_tokens == 6
    told.pop("places", None)
    assert torch.equal(packed_loss(model, **told), loss)


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_step_zero_equals_the_base(parameterization: str) -> None:
    batch = packed_batch(LENGTHS)
    ids, positions = batch["input_ids"], batch["position_ids"]
    base = packed_forward(tiny_model("llama"), ids, positions)
    model = converted("llama", 0.25, parameterization)
    assert torch.equal(packed_forward(model.hf, ids, positions), base)
    model.finish_step()
    if parameterization == "factored":  # projecting U and V rounds them
        assert torch.allclose(packed_forward(model.hf, ids, positions), base, atol=1e-4)
    else:
        assert torch.equal(packed_forward(model.hf, ids, positions), base)


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_kept_directions_stay_over_200_real_steps(parameterization: str) -> None:
    model = converted("llama", 0.25, parameterization)
    base = tiny_model("llama")
    losses = train(model, 200)
    assert losses[-1] < 0.9 * losses[0]
    assert model.leak() <= 1e-5
    for target, (_, subspace) in zip(model.plan.targets, model.subspaces(), strict=True):
        weight = base.get_parameter(target.parameter).detach().double()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        # From the weight that the forward uses, so its own rounding is in the figure.
        delta = subspace.dense().double() - weight
        kept = target.kept_rank
        assert delta.norm() > 1e-2
        assert (left[:, :kept].T @ delta).norm() <= 1e-5 * delta.norm(), target.name
        assert (delta @ right[:kept].T).norm() <= 1e-5 * delta.norm(), target.name


def test_ratio_one_is_full_fine_tuning() -> None:
    full = train(converted("llama", 1.0, "dense"), 200, 1e-3)
    free = train(converted("llama", 1.0, "exact"), 200, 1e-3)
    assert full[-1] < 0.9 * full[0]
    assert abs(free[-1] - full[-1]) <= 0.02 * full[-1]


def test_ratio_zero_changes_no_target() -> None:
    model = converted("llama", 0.0, other_parameters="norms")
    base = tiny_model("llama").state_dict()
    losses = train(model, 5)
    assert losses[0] != losses[3]
    for target in model.plan.targets:
        assert torch.equal(model.hf.get_parameter(target.parameter), base[target.parameter])


@pytest.mark.parametrize("parameterization", ["exact", "factored"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_step(family: str, parameterization: str) -> None:
    model = converted(family, 0.3, parameterization, other_parameters="norms")
    before = {name: p.detach().clone() for name, p in model.trainables().items()}
    losses = train(model, 2)
    assert losses[0] > 0
    after = model.trainables()
    moved = [name for name, p in before.items() if not torch.equal(after[name], p)]
    assert len(moved) == len(before)
    assert model.leak() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "mixtral"])
def test_low_precision_models_train_float32_parameters(family: str) -> None:
    model = tiny_model(family).bfloat16()
    plan = plan_targets(model, 0.3, other_parameters="all")
    osft = convert(model, plan)
    losses = train(osft, 12)
    assert {p.dtype for p in osft.trainables().values()} == {torch.float32}
    assert plan.trainable == sum(p.numel() for p in osft.trainables().values())
    assert losses[-1] < losses[0]


def test_a_tied_head_is_trained_as_one_parameter() -> None:
    model = tiny_model("gemma").bfloat16()
    osft = convert(model, plan_targets(model, 0.3, other_parameters="all"))
    assert sum("embed_tokens" in name for name in osft.trainables()) == 1
    assert torch.equal(osft.hf.lm_head.weight, osft.hf.model.embed_tokens.weight)


def test_loading_refuses_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        load_model(tmp_path, torch.float32)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def _lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _grow(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 48', '"intermediate_size": 56'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "is damaged"),
        (_lose_a_weight, r"1 weights .*mlp\.up_proj\.weight"),
        (_grow, r"6 weights .*mlp\.down_proj\.weight"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Transformers fills in random numbers, other ones on every rank."""
    damage(save_tiny_model(tmp_path))
    with pytest.raises(ValueError, match=f"model_path: .*{words}"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_loading_reads_weights_in_the_compute_dtype(tmp_path: Path, family: str) -> None:
    model = load_model(save_tiny_model(tmp_path, family), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.training


def test_a_weight_with_nan_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        convert(model, plan_targets(model, 0.25))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_liger_on_cuda_gives_the_same_loss() -> None:
    batch = {name: value.cuda() for name, value in packed_batch(LENGTHS).items()}
    plain = tiny_model("llama").cuda()
    expected = packed_loss(plain, **batch)
    # Liger's rotation is bound for every model of the family in this process.
    with undone_afterwards():
        model = tiny_model("llama").cuda()
        assert apply_liger(model, True, torch.device("cuda")) is None
        fused = convert(model, plan_targets(model, 0.3), fused_loss=True)
        loss = fused(**batch)
        loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert all(p.grad is not None for p in fused.trainables().values())
