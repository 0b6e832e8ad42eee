"""What `osft plan` says: equal to what the run then does, byte for byte where it claims so."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from osft_trainer.base_weights import read_header
from osft_trainer.config import TrainingParameters
from osft_trainer.export import base_digest
from osft_trainer.memory import converted, empty_model, memory_of
from osft_trainer.model import OSFTModel, convert, load_model
from osft_trainer.optimizer import build_optimizer
from osft_trainer.parallel import shard, start_world, stop_world
from osft_trainer.plan_report import Report
from osft_trainer.planning import energy_kept, make_report
from osft_trainer.report import RunFolder
from osft_trainer.shards import HostCopy
from osft_trainer.targets import plan_targets
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def report_of(base: Path, out: Path, processes: int = 1, energy: bool = False, **kw: Any) -> Report:
    told = tiny.training(base, base.parent / "data.jsonl", out, **kw)
    return make_report(told, processes=processes, device="cpu", energy=energy)


def held_bytes(base: Path, training: TrainingParameters) -> dict[str, int]:
    """Bytes that this rank really holds after a step; the largest of all ranks is what counts."""
    world = start_world("cpu")
    hf = load_model(base, getattr(torch, training.compute_dtype))
    plan = plan_targets(
        hf, training.unfreeze_rank_ratio, training.parameterization, None, training.other_parameters
    )
    model = convert(hf, plan)
    written = sum(t.numel() * t.element_size() for t in written_at_start(model))
    shard(model, world)
    trainables = model.trainables()
    optimizer = build_optimizer(trainables, training, shared=model.shared_moments())
    for parameter in trainables.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def size(tensors: list[torch.Tensor]) -> int:
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    state = [v for entry in optimizer.state.values() for k, v in entry.items() if k != "step"]
    found = {
        "weights": size([p for p in model.parameters() if not p.requires_grad]),
        "buffers": size(list(model.buffers())),
        "factors": size(list(trainables.values())),
        "gradients": size([p.grad for p in trainables.values()]),
        "adam": size(state),
        "saving": size(list(HostCopy().take(trainables, optimizer).tensors.values())),
        "startup": written,
    }
    stop_world(world)
    return found


def written_at_start(model: OSFTModel) -> list[torch.Tensor]:
    """Every tensor whose numbers a rank writes into memory of its own before it is sharded."""
    unwritten = [
        tensor
        for _, subspace in model.subspaces()
        for name, tensor in [*subspace.named_buffers(), *subspace.named_parameters()]
        if name not in ("base", "effective") and not (tensor.requires_grad and tensor.any())
    ]
    ids = {id(tensor) for tensor in unwritten}
    return [t for t in [*model.parameters(), *model.buffers()] if id(t) not in ids]


def planned_bytes(base: Path, training: TrainingParameters, processes: int) -> dict[str, int]:
    hf = empty_model(base, getattr(torch, training.compute_dtype))
    plan = plan_targets(
        hf, training.unfreeze_rank_ratio, training.parameterization, None, training.other_parameters
    )
    memory = memory_of(
        converted(hf, plan),
        processes=processes,
        tokens=64,
        activation_checkpointing=True,
        accumulates=False,
    )
    return {
        "weights and buffers": memory.effective + memory.base + memory.bases + memory.frozen,
        "factors": memory.factors,
        "gradients": memory.gradients,
        "adam": memory.adam,
        "saving": memory.saving,
        "startup": memory.startup,
    }


def check_rank(base: Path, training: TrainingParameters, planned: dict[str, int]) -> None:
    """One of two real ranks; the first one holds most rows."""
    held = held_bytes(base, training)
    held["weights and buffers"] = held.pop("weights") + held.pop("buffers")
    assert all(held[name] <= planned[name] for name in planned), (held, planned)
    if os.environ["RANK"] == "0":
        assert held == planned


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "changes",
    [
        {"parameterization": "exact", "compute_dtype": "float32"},
        {"parameterization": "factored", "compute_dtype": "float32", "other_parameters": "all"},
        {"parameterization": "exact", "compute_dtype": "bfloat16", "other_parameters": "norms"},
    ],
    ids=["exact", "factored", "bfloat16"],
)
def test_bytes_are_those_of_the_real_model(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny_model(tmp_path / "base", family)
    told = tiny.training(folder, tmp_path / "data", tmp_path / "out", **changes)
    held = held_bytes(folder, told)
    held["weights and buffers"] = held.pop("weights") + held.pop("buffers")
    assert planned_bytes(folder, told, 1) == held


def test_bytes_are_those_of_a_real_rank(base: Path, tmp_path: Path) -> None:
    told = tiny.training(base, base, tmp_path, compute_dtype="float32")
    planned = planned_bytes(base, told, 2)
    ranks = tiny.start_ranks(check_rank, 2, [(base, told, planned)] * 2)
    assert tiny.finish(ranks) == [0, 0]


def test_a_pinned_copy_takes_powers_of_two(base: Path) -> None:
    """CachingHostAllocator.h rounds every block up; nothing that is pinned can be measured here."""
    hf = empty_model(base, torch.float32)
    model = converted(hf, plan_targets(hf, 0.3))
    told: dict[str, Any] = {
        "processes": 1, "tokens": 64, "activation_checkpointing": True, "accumulates": False
    }  # fmt: skip
    shared = model.shared_moments()
    seconds = {
        n: shared[n].shape(p.shape) if n in shared else p.shape
        for n, p in model.trainables().items()
    }
    sizes = [
        4 * size
        for n, p in model.trainables().items()
        for size in (p.numel(), p.numel(), math.prod(seconds[n]))
    ]
    assert memory_of(model, **told).saving == sum(sizes)
    rounded = [2 ** math.ceil(math.log2(size)) for size in sizes]
    assert memory_of(model, pinned=True, **told).saving == sum(rounded) > sum(sizes)


def test_gradients_are_whole_between_the_passes_of_a_step(base: Path) -> None:
    hf = empty_model(base, torch.float32)
    model = converted(hf, plan_targets(hf, 0.5))
    told: dict[str, Any] = {"tokens": 64, "activation_checkpointing": True}
    once = memory_of(model, processes=2, accumulates=False, **told)
    often = memory_of(model, processes=2, accumulates=True, **told)
    assert often.gradients == 2 * once.gradients
    assert often.factors == once.factors
    alone = memory_of(model, processes=1, accumulates=True, **told)
    assert alone.gradients == often.gradients
    assert alone.gathered < once.gathered


def test_the_activation_estimate_follows_its_settings(tmp_path: Path) -> None:
    base = tiny.model_folder(tmp_path / "model", num_hidden_layers=4)
    hf = empty_model(base, torch.float32)
    model = converted(hf, plan_targets(hf, 0.5))

    def activations(tokens: int, checkpointing: bool, selective: bool = False) -> int:
        return memory_of(
            model,
            processes=1,
            tokens=tokens,
            activation_checkpointing=checkpointing,
            selective=selective,
            accumulates=False,
        ).activations

    assert activations(512, True) < activations(512, True, True) < activations(512, False)
    assert activations(512, False) == 2 * activations(256, False)


def test_the_report_is_what_the_run_does(base: Path, tmp_path: Path) -> None:
    report = report_of(base, tmp_path, energy=True)
    told = tiny.training(base, base.parent / "data.jsonl", tmp_path)
    result = tiny.run(told)
    assert result.steps == report.steps == 6
    written = json.loads(RunFolder(tmp_path).plan.read_text())
    found = json.loads(report.to_json())
    for name in ("trainable", "total", "frozen", "covered", "uncovered", "steps"):
        assert found[name] == written[name], name
    assert found["data"].items() <= written["data"].items()
    assert found["passes_per_step"] == 4
    keep = [{k: v for k, v in t.items() if k != "energy_kept"} for t in found["targets"]]
    assert keep == written["targets"]
    # The run has found the data that the plan prepared.
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1


def test_energies_are_those_of_the_singular_values(base: Path, tmp_path: Path) -> None:
    report = report_of(base, tmp_path, energy=True, unfreeze_rank_ratio=0.25)
    hf = load_model(base, torch.float32)
    assert report.energy_kept is not None
    for target in report.plan.targets:
        weight = hf.get_parameter(target.parameter).detach().double()
        squares = torch.linalg.svdvals(weight) ** 2
        expected = squares[: target.kept_rank].sum() / squares.sum()
        assert report.energy_kept[target.name] == pytest.approx(float(expected), abs=1e-7)
    experts = torch.randn(3, 8, 6)
    squares = torch.linalg.svdvals(experts.double()) ** 2
    assert energy_kept(experts, 2) == pytest.approx(float(squares[:, :4].sum() / squares.sum()))
    assert energy_kept(torch.zeros(4, 4), 2) == 1.0


def test_a_split_by_activations_is_planned_without_reading(base: Path, tmp_path: Path) -> None:
    told = {"split_by": "activations", "unfreeze_rank_ratio": 0.25, "retention_tokens": 1024}
    report = report_of(base, tmp_path, **told)
    tiny.run(tiny.training(base, base.parent / "data.jsonl", tmp_path, **told))
    written = json.loads(RunFolder(tmp_path).plan.read_text())
    assert report.plan.trainable == written["trainable"]
    folder = next((tmp_path / "cache" / "decomposition").iterdir())
    lies = sum(
        tensor.numel() * 4
        for path in folder.glob("*.safetensors")
        for tensor in load_file(path).values()
    )
    assert report.memory.bases == lies > 0
    with pytest.raises(ValueError, match="--energy has no meaning with split_by activations"):
        report_of(base, tmp_path, energy=True, **told)


def test_retention_text_is_checked_and_adaptive_ranks_said(base: Path, tmp_path: Path) -> None:
    text = str(base.parent / "data.jsonl")
    report = report_of(base, tmp_path, rank_allocation="adaptive", retention_data_path=text)
    assert "ranks are means" in report.to_text()
    (tmp_path / "few.jsonl").write_text((base.parent / "data.jsonl").read_text().split("\n")[0])
    with pytest.raises(ValueError, match="at least 10 are needed"):
        report_of(base, tmp_path, retention_data_path=str(tmp_path / "few.jsonl"))


def test_too_little_memory_is_refused_and_doubtful_is_said(base: Path, tmp_path: Path) -> None:
    report = report_of(base, tmp_path)
    gib = 2**30
    memory = report.memory
    assert memory.startup < memory.static < memory.total < report.total
    assert report.total == memory.total + memory.saving
    assert json.loads(report.to_json())["memory_per_rank"]["total"] == report.total
    certain = memory.static + memory.saving
    refused = report.refusal(certain * 0.99 / gib)
    assert refused is not None
    assert "--memory-gib" in refused
    assert "more processes" in refused
    assert "with the copy of a save" in refused
    assert report.refusal(certain * 1.01 / gib) is None
    doubtful = report.warning(report.total * 0.99 / gib)
    assert doubtful is not None
    assert "maxTokensPerGpu" in doubtful
    assert report.warning(report.total * 1.01 / gib) is None
    # A GPU has the copy beside it, in the pod's memory.
    on_gpu = replace(report, device="cuda")
    assert on_gpu.total == memory.total
    assert on_gpu.refusal(memory.static * 1.01 / gib) is None
    need = max(memory.startup, memory.saving)
    assert on_gpu.host_refusal(need / gib) is None
    assert on_gpu.host_refusal((need - 1) / gib) is not None


def test_loading_needs_the_whole_model_on_the_cpu(base: Path, tmp_path: Path) -> None:
    report = report_of(base, tmp_path, processes=8)
    assert report.memory.startup > report.memory.static
    refused = report.refusal((report.memory.startup - 1) / 2**30)
    assert refused is not None
    assert "while it loads" in refused


def test_mapped_bases_do_not_count_against_a_pods_limit(base: Path, tmp_path: Path) -> None:
    memory = report_of(base, tmp_path).memory
    lasting = memory.static - memory.bases + memory.saving
    assert memory.startup < lasting < memory.static + memory.saving
    assert report_of(base, tmp_path).host_refusal(lasting / 2**30) is None
    refused = report_of(base, tmp_path).host_refusal((lasting - 1) / 2**30)
    assert refused is not None
    assert "spec.resources.limits.memory" in refused
    assert "without the bases" in refused


def test_the_table_names_everything(base: Path, tmp_path: Path) -> None:
    text = report_of(base, tmp_path, on_overlong="drop", max_seq_len=24, energy=True).to_text()
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert any(
        line.startswith("model.layers.*.mlp.down_proj 2 32 x 48 16 16 ") and line.endswith("%")
        for line in lines
    )
    assert "no target, frozen: " in text
    assert "optimizer steps: " in text
    assert "estimate" in text
    dropped = next(line for line in lines if line.startswith("dropped: "))
    assert dropped != "dropped: 0 too long, 0 without loss tokens; cut: 0"


def test_the_base_is_not_read_for_a_plan(base: Path, tmp_path: Path) -> None:
    """Without energies what the files hold is enough: weights of any size are planned at once."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    weights = bare / "model.safetensors"
    with weights.open("r+b") as file:
        size = weights.stat().st_size
        file.truncate(len(read_header(weights).raw))
        file.truncate(size)  # a hole instead of numbers
    told = tiny.training(bare, base.parent / "data.jsonl", tmp_path / "out")
    assert make_report(told, processes=1, device="cuda", energy=False).compute_dtype == "bfloat16"
    assert base_digest(bare) != base_digest(base)
