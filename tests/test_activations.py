"""Directions read off activations: shared inputs, moments, bases, and what they protect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from osft_trainer import activations
from osft_trainer.activations import (
    InputGroup,
    Row,
    in_passes,
    input_groups,
    least_used,
    on_device,
    second_moments,
    used_share,
)
from osft_trainer.decomposition import prepare
from osft_trainer.forward import evaluating, packed_forward
from osft_trainer.importance import block_importance
from osft_trainer.model import OSFTModel, convert
from osft_trainer.parallel import World
from osft_trainer.prepared import GrowingArray, PreparedData
from osft_trainer.projection import refresh
from osft_trainer.retention import RetentionText
from osft_trainer.retention import parts as retention_parts
from osft_trainer.targets import Plan, adaptive_ratios, plan_targets
from tiny_models import packed_batch, tiny_model

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
MLP = "model.layers.0.mlp"
ATTENTION = "model.layers.0.self_attn"


def plan_of(model: PreTrainedModel, ratio: float = 0.5) -> Plan:
    return plan_targets(model, ratio, split_by="activations")


def row(lengths: list[int], seed: int = 0) -> Row:
    batch = packed_batch(lengths, seed)
    return batch["input_ids"], batch["position_ids"]


def inputs_of(model: PreTrainedModel, module: str, text: list[Row]) -> Tensor:
    """What a module is given, by a hook of the test's own; [tokens, width] float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(
        lambda _, given, __: seen.append(given[0].detach().flatten(0, -2).double())
    )
    with torch.no_grad():
        for ids, positions in text:
            packed_forward(model.eval(), ids, positions)
    handle.remove()
    return torch.cat(seen)


def test_targets_that_are_fed_by_one_tensor_share_their_directions() -> None:
    model = tiny_model("llama")
    groups = input_groups(model, plan_of(model), row([5]))
    assert [[t.module for t in group.targets] for group in groups[:4]] == [
        [f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj"],
        [f"{ATTENTION}.o_proj"],
        [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
        [f"{MLP}.down_proj"],
    ]
    assert [group.width for group in groups[:4]] == [32, 32, 32, 48]
    assert [group.rank for group in groups[:4]] == [16, 16, 16, 24]
    assert len(groups) == 8


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_moments_are_those_of_the_inputs_however_the_text_is_packed(family: str) -> None:
    model = tiny_model(family)
    groups = input_groups(model, plan_of(model), row([5]))
    text = [row([7, 4], seed=1), row([6], seed=2)]
    found = second_moments(model, groups, text)
    for group, moment in zip(groups, found, strict=True):
        x = inputs_of(model, group.module, text)
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-9, atol=1e-9)
    apart = [part for ids, places in text for part in _samples(ids, places)]
    for one, other in zip(found, second_moments(model, groups, apart), strict=True):
        torch.testing.assert_close(one.total, other.total, rtol=1e-3, atol=1e-3)


def _samples(ids: Tensor, places: Tensor) -> list[Row]:
    starts = (places[0] == 0).nonzero().flatten().tolist()[1:]
    pieces = zip(ids[0].tensor_split(starts), places[0].tensor_split(starts), strict=True)
    return [(a[None], b[None]) for a, b in pieces]


def test_moments_of_some_groups_stop_the_pass_early_and_are_the_same() -> None:
    model = tiny_model("llama")
    groups = input_groups(model, plan_of(model), row([5]))
    whole = second_moments(model, groups, [row([9])])
    some = second_moments(model, groups[1:3], [row([9])])
    assert all(torch.equal(a.total, b.total) for a, b in zip(whole[1:3], some, strict=True))
    reached: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: reached.append(1))
    second_moments(model, groups[:1], [row([9])])
    handle.remove()
    assert not reached


def test_moments_that_do_not_fit_together_are_summed_in_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    groups = input_groups(model, plan_of(model), row([5]))
    monkeypatch.setattr(activations, "MOMENT_BYTES", 8 * (32**2 + 48**2))
    passes = list(in_passes(groups))
    assert [group for part in passes for group in part] == groups
    assert len(passes) == 4
    assert all(sum(8 * g.width**2 for g in part) <= 8 * (32**2 + 48**2) for part in passes)


def test_reading_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = input_groups(model, plan_of(model), row([5]))
    second_moments(model, groups, [row([9])])
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_least_used_directions_have_the_smallest_energy_there_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(0, 3, 12, dtype=torch.float64)
    moment = x.T @ x
    basis = least_used(moment, 5)
    assert (basis.dtype, basis.shape) == (torch.float32, (5, 12))
    exact = basis.double()
    assert (exact @ exact.T - torch.eye(5)).abs().max() < 1e-6
    energy = (x @ exact.T).square().sum()
    smallest = torch.linalg.eigvalsh(moment)[:5].sum()
    # float32 entries move the basis by 1e-7 towards directions of 1e6 times the energy.
    assert energy / smallest == pytest.approx(1.0, rel=1e-3)
    assert torch.equal(basis, least_used(moment.clone(), 5))


SPECTRA = {
    "power": torch.arange(1, 161).double() ** -2.0 * 1e3,
    "steep": torch.logspace(4, -8, 160).double(),
    "rank-deficient": torch.cat([torch.logspace(3, 0, 80), torch.zeros(80)]).double(),
    "flat": torch.linspace(1, 0.5, 160).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_wide_inputs_leave_hardly_more_energy_free_than_they_must(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    values = SPECTRA[spectrum]
    vectors = torch.linalg.qr(torch.randn(160, 160, dtype=torch.float64)).Q
    moment = (vectors * values) @ vectors.T
    moment = (moment + moment.T) / 2
    monkeypatch.setattr(activations, "EIGEN_WIDTH", 100)
    basis = least_used(moment, 40)
    exact = basis.double()
    assert (exact @ exact.T - torch.eye(40)).abs().max() < 1e-6
    energy = float(((exact @ moment) * exact).sum() / values.sum())
    smallest = float(values.sort().values[:40].sum() / values.sum())
    # What is stored as float32 has 1e-14 of the energy of everything in it.
    assert energy <= 1.2 * smallest + 1e-13
    assert torch.equal(basis, least_used(moment, 40))


def test_an_input_without_finite_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity on the retention text"):
        least_used(torch.full((3, 3), float("nan"), dtype=torch.float64), 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
def test_no_update_changes_what_the_model_says_on_text_that_leaves_room(
    family: str, tmp_path: Path
) -> None:
    """Twelve tokens use at most twelve of 32 directions: with half of them free nothing moves."""
    model = tiny_model(family)
    plan = plan_of(model)
    text = row([7, 5], seed=3)
    with torch.no_grad():
        wanted = packed_forward(model.eval(), *text)
        other = packed_forward(model, *row([9], seed=4))
    converted = _converted(model, plan, text, tmp_path)
    with torch.no_grad():
        for trained in converted.trainables().values():
            trained.normal_(std=0.1)
        refresh([subspace for _, subspace in converted.subspaces()])
        told = packed_forward(converted.hf, *text)
        moved = packed_forward(converted.hf, *row([9], seed=4))
    scale = float(wanted.abs().max())
    assert float((told - wanted).abs().max()) < 2e-4 * scale
    assert float((moved - other).abs().max()) > 0.05 * scale
    assert converted.leak() < 1e-5


def _converted(model: PreTrainedModel, plan: Plan, text: Row, folder: Path) -> OSFTModel:
    bases = prepare(
        model,
        plan,
        cache=folder,
        base_digest="base",
        world=ALONE,
        retention=_retention(text, folder),
    )
    return convert(model, plan, decompose=bases.decompose)


def _retention(text: Row, folder: Path) -> RetentionText:
    """A text whose read part is just these samples, and the others, too."""
    samples = _samples(*text)
    whole = _prepared(samples, folder / "text").whole()
    return RetentionText(whole, whole, whole, "digest", sampled=False)


def _prepared(samples: list[Row], folder: Path) -> PreparedData:
    folder.mkdir()
    offsets = [0]
    with (
        GrowingArray(folder / "input_ids.npy", "<i4") as ids,
        GrowingArray(folder / "loss_mask.npy", "|b1") as mask,
        GrowingArray(folder / "loss_counts.npy", "<i4") as counts,
        GrowingArray(folder / "offsets.npy", "<i8") as ends,
    ):
        for tokens, _ in samples:
            ids.append(tokens[0].numpy())
            mask.append([False] + [True] * (tokens.shape[1] - 1))
            counts.append([tokens.shape[1] - 1])
            offsets.append(offsets[-1] + tokens.shape[1])
        ends.append(offsets)
    (folder / "meta.json").write_text('{"digest": "d", "counts": {}, "largest_id": 0}')
    return PreparedData(folder)


def test_bases_carry_how_much_of_the_old_inputs_they_hold(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = plan_of(model, ratio=0.25)
    text = row([9, 9, 9], seed=5)
    bases = prepare(
        model, plan, cache=tmp_path, base_digest="base", world=ALONE,
        retention=_retention(text, tmp_path),
    )  # fmt: skip
    target = plan.targets[0]
    basis = bases.decompose(target, torch.empty(0)).free_cols
    assert basis is not None
    x = inputs_of(model, target.module, [text])
    wanted = (x @ basis.double().T).square().sum() / x.square().sum()
    assert bases.used_share(target) == pytest.approx(float(wanted), rel=1e-6)
    groups = input_groups(model, plan, text)
    (share,) = used_share(model, groups[:1], [basis], [text])
    assert share == pytest.approx(float(wanted), rel=1e-6)


def test_another_text_gives_other_bases_in_another_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = plan_of(model)
    found = []
    for digest in ("one", "two"):
        folder = tmp_path / digest
        folder.mkdir()
        text = _retention(row([9, 9], seed=len(digest)), folder)
        text = RetentionText(text.read, text.checked, text.judged, digest, sampled=False)
        found.append(
            prepare(model, plan, cache=tmp_path, base_digest="b", world=ALONE, retention=text)
        )
    assert found[0].folder != found[1].folder
    assert found[0].used_share(plan.targets[0]) is not None


def test_ranks_follow_the_input_also_of_wide_and_transposed_matrices() -> None:
    llama = {t.module: t for t in plan_of(tiny_model("llama"), 0.25).targets}
    down, gate = llama[f"{MLP}.down_proj"], llama[f"{MLP}.gate_proj"]
    assert (down.shape, down.free_rank, down.kept_rank, down.trainable) == ((32, 48), 12, 36, 384)
    assert (gate.shape, gate.free_rank, gate.kept_rank, gate.trainable) == ((48, 32), 8, 24, 384)
    gpt2 = {t.module: t for t in plan_of(tiny_model("gpt2"), 0.25).targets}
    fc = gpt2["transformer.h.0.mlp.c_fc"]
    assert (fc.shape, fc.free_rank, fc.trainable) == ((32, 128), 8, 8 * 128)


def test_ratio_one_frees_every_direction(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = plan_of(model, 1.0)
    converted = _converted(model, plan, row([5]), tmp_path)
    forms = {subspace.form for _, subspace in converted.subspaces()}
    assert forms == {"dense"}


def test_experts_hide_their_inputs() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match=r"split_by.*experts.*target_patterns"):
        plan_of(model)
    plan = plan_targets(model, 0.5, target_patterns=[r"self_attn\."], split_by="activations")
    assert [g.width for g in input_groups(model, plan, row([4]))] == [32] * 4


def test_a_target_that_takes_no_part_is_named() -> None:
    model = tiny_model("llama")
    plan = plan_of(model)
    model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"never saw an input of model\.layers\.1\.mlp"):
        input_groups(model, plan, row([4]))


def test_parts_share_no_sample_and_respect_the_budget(tmp_path: Path) -> None:
    data = _prepared([row([4 + i % 5], seed=i) for i in range(200)], tmp_path / "text").whole()
    text = retention_parts(data, tokens=300, digest="d", sampled=False)
    members = [set(part._indices.tolist()) for part in (text.read, text.checked, text.judged)]
    assert len(members[0] | members[1] | members[2]) == sum(map(len, members))
    assert 300 <= int(text.read.lengths.sum()) < 310
    assert all(20 <= int(part.lengths.sum()) < 40 for part in (text.checked, text.judged))
    again = retention_parts(data, tokens=300, digest="d", sampled=False)
    assert again.read._indices.tolist() == text.read._indices.tolist()
    assert text.digest == again.digest
    more = retention_parts(data, tokens=400, digest="d", sampled=False)
    assert text.digest != more.digest


def test_groups_without_kept_or_free_directions_need_no_bases() -> None:
    model = tiny_model("llama")
    assert input_groups(model, plan_of(model, 1.0), row([4])) == []
    assert input_groups(model, plan_of(model, 0.0), row([4])) == []
    assert isinstance(input_groups(model, plan_of(model), row([4]))[0], InputGroup)


def test_importance_is_the_share_that_a_block_passes_on() -> None:
    model = tiny_model("llama")
    text = [row([7, 4], seed=1), row([6], seed=2)]
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _, given, out, n=number: seen[n].append(
                torch.cosine_similarity(given[0][0].double(), out[0].double(), dim=-1)
            )
        )
    with torch.no_grad():
        for ids, positions in text:
            packed_forward(model.eval(), ids, positions)
    means = [float(torch.cat(seen[n]).mean()) for n in (0, 1)]
    wanted = [2 * m / sum(means) for m in means]
    assert block_importance(model, text) == pytest.approx(wanted, rel=1e-6)


def test_what_matters_more_is_kept_more() -> None:
    assert adaptive_ratios(0.5, [1.0, 1.0]) == pytest.approx([0.5, 0.5])
    low, high = adaptive_ratios(0.5, [0.5, 1.5])
    assert (low, high) == pytest.approx((0.7, 0.3))
    assert adaptive_ratios(0.25, [0.2, 1.8]) == pytest.approx([0.77, 0.0])
    plan = plan_targets(tiny_model("llama"), 0.5, importance=[0.5, 1.5])
    ranks = {t.module: t.free_rank for t in plan.targets}
    assert ranks[f"{ATTENTION}.q_proj"] == 22
    assert ranks["model.layers.1.self_attn.q_proj"] == 10


def test_inputs_that_are_no_numbers_are_refused_also_where_they_are_only_checked() -> None:
    model = tiny_model("llama")
    text = row([8])
    groups = input_groups(model, plan_of(model), text)
    basis = torch.eye(groups[0].width)[: groups[0].rank]
    with torch.no_grad():
        model.get_input_embeddings().weight[text[0][0, -1]] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        used_share(model, groups[:1], [basis], [text])


def test_every_module_has_its_own_mode_again() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert set(modes) == {True, False}
    second_moments(model, input_groups(model, plan_of(model), row([5])), [row([5])])
    assert [module.training for module in model.modules()] == modes
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_a_model_comes_back_into_the_memory_that_it_had() -> None:
    """Weights that are mapped from files are one copy for all ranks of a node."""
    model = tiny_model("llama", tie_word_embeddings=True)
    model.model.register_buffer("ours", torch.ones(3))

    def places() -> dict[str, int]:
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        return {name: tensor.data_ptr() for name, tensor in held}

    before = places()
    meta = World(rank=0, local_rank=0, size=1, device=torch.device("meta"))
    with on_device(model, meta):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert places() == before
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
