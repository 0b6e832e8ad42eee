"""The cache of bases: who computes what, what is read back, and what a crash leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import tiny
from osft_trainer import basis_files, decomposition
from osft_trainer.decomposition import Decompositions, prepare, shares_by_cost
from osft_trainer.model import load_model
from osft_trainer.parallel import World
from osft_trainer.subspace import split_weight
from osft_trainer.targets import Plan, Target, plan_targets

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(tiny.model_folder(tmp_path_factory.mktemp("base")), torch.float32)


def plan_of(model: nn.Module, parameterization: str = "exact", ratio: float = 0.5) -> Plan:
    return plan_targets(model, ratio, parameterization)


def prepared(model: nn.Module, plan: Plan, cache: Path, base: str = "base") -> Decompositions:
    return prepare(model, plan, cache=cache, base_digest=base, world=ALONE)


@pytest.mark.parametrize("parameterization", ["exact", "core", "factored"])
def test_what_is_read_is_what_would_be_computed(
    model: nn.Module, tmp_path: Path, parameterization: str
) -> None:
    plan = plan_of(model, parameterization)
    found = prepared(model, plan, tmp_path)
    for target in plan.targets:
        weight = model.get_parameter(target.parameter).detach()
        expected = split_weight(weight, target.free_rank, parameterization).to_tensors()
        read = found.decompose(target, weight).to_tensors()
        assert read.keys() == expected.keys()
        assert expected
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_target_without_bases_has_no_file(model: nn.Module, tmp_path: Path) -> None:
    plan = plan_of(model, ratio=1.0)
    found = prepared(model, plan, tmp_path)
    target = plan.targets[0]
    assert found.decompose(target, model.get_parameter(target.parameter)).to_tensors() == {}
    assert [path.name for path in found.folder.iterdir()] == ["COMPLETE"]


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_bases_are_mapped_not_copied(model: nn.Module, tmp_path: Path) -> None:
    """The ranks of a node share them, so that none holds the whole factored model."""
    plan = plan_of(model)
    found = prepared(model, plan, tmp_path)
    target = plan.targets[0]
    size = 64 * 2**20
    save_file({"free_rows": torch.ones(size // 4)}, found.path(target))
    before = anonymous_bytes()
    read = found.decompose(target, model.get_parameter(target.parameter)).free_rows
    assert read is not None
    assert float(read.sum()) == size // 4
    assert anonymous_bytes() - before < size // 4


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that are really decomposed."""
    shapes: list[tuple[int, ...]] = []

    def counted(weight: torch.Tensor, *rest: Any) -> Any:
        shapes.append(tuple(weight.shape))
        return split_weight(weight, *rest)

    monkeypatch.setattr(decomposition, "split_weight", counted)
    return shapes


def test_bases_are_computed_once(
    model: nn.Module, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    plan = plan_of(model)
    first = prepared(model, plan, tmp_path)
    assert len(computed) == len(plan.targets) == 14
    assert prepared(model, plan, tmp_path) == first
    assert len(computed) == 14


def test_after_a_crash_only_what_is_missing_is_computed(
    model: nn.Module, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    plan = plan_of(model)
    found = prepared(model, plan, tmp_path)
    kept = found.path(plan.targets[0]).read_bytes()
    (found.folder / "COMPLETE").unlink()
    found.path(plan.targets[3]).unlink()
    # As a file system may leave it that has lost power.
    found.path(plan.targets[5]).write_bytes(found.path(plan.targets[5]).read_bytes()[:40])
    computed.clear()
    prepared(model, plan, tmp_path)
    assert sorted(computed) == sorted([plan.targets[3].shape, plan.targets[5].shape])
    assert found.path(plan.targets[0]).read_bytes() == kept
    assert not list(found.folder.glob(".*"))


def test_the_digest_names_all_that_decides_the_bases(model: nn.Module, tmp_path: Path) -> None:
    digests = {
        prepared(model, plan, tmp_path, base).digest
        for plan, base in (
            (plan_of(model), "base"),
            (plan_of(model), "other base"),
            (plan_of(model, ratio=0.25), "base"),
            (plan_of(model, "factored"), "base"),
        )
    }
    assert len(digests) == 4
    assert {path.name for path in (tmp_path / "decomposition").iterdir()} == digests


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    broken = load_model(tiny.model_folder(tmp_path / "base"), torch.float32)
    plan = plan_of(broken)
    name = plan.targets[2].parameter
    with torch.no_grad():
        broken.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"model_path: {name}: weight holds NaN"):
        prepared(broken, plan, tmp_path)


def test_a_full_disk_is_worth_another_try(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(basis_files, "save_file", no_space)
    with pytest.raises(OSError, match=r"\d\.safetensors: .*No space left.*add space"):
        prepared(model, plan_of(model), tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_shares_are_disjoint_complete_and_even(ranks: int) -> None:
    costs = [100.0, 90.0, 40.0, 30.0, 30.0, 10.0, 10.0]
    shares = shares_by_cost(costs, ranks)
    assert sorted(position for share in shares for position in share) == list(range(len(costs)))
    loads = [sum(costs[position] for position in share) for share in shares]
    # Largest first is never worse than 4/3 of the best division (Graham 1969).
    assert max(loads) <= max(max(costs), 4 / 3 * sum(costs) / min(ranks, len(costs)))


def test_ranks_share_the_work_and_read_the_same(tmp_path: Path) -> None:
    """Two real ranks leave the same bases as one."""
    base = tiny.model_folder(tmp_path / "base")
    data = tiny.data_file(tmp_path / "data.jsonl")
    for ranks in (1, 2):
        told = tiny.training(base, data, tmp_path / str(ranks), num_epochs=1)
        tiny.complete(told, ranks)
    one, two = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / ranks).glob("cache/decomposition/*/*")
        }
        for ranks in ("1", "2")
    )
    assert len(one) == 15
    assert one == two


def test_a_batch_of_experts_costs_as_many_matrices() -> None:
    one = Target("m", "m", "m.weight", "linear", (8, 4), 2, 2, 0)
    experts = Target("e", "e", "e.w", "experts", (6, 8, 4), 2, 2, 0)
    assert decomposition._cost(experts) == 6 * decomposition._cost(one)
