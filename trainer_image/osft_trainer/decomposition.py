"""The targets' bases: computed once per run, shared out over the ranks, kept on disk.

Lives here: the cache `<run>/cache/decomposition/<digest>/`, one safetensors file a target, and who
computes which. Called by `train` before `model.convert`, on every rank. The bases are always read
from the files, so that every rank, attempt and resumed run works in the same subspaces bit for bit.
Must never: decide ranks (`targets` does), or leave a file under its name that is not whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from osft_trainer.agreement import barrier, from_first_rank, raise_together
from osft_trainer.parallel import World
from osft_trainer.subspace import Split, needed_parts, split_weight
from osft_trainer.targets import Plan, Target

FORMAT_VERSION = 1
"""Part of the digest: raise it when the numbers or the files change."""


@dataclass(frozen=True)
class Decompositions:
    """Where the bases of a plan's targets lie."""

    folder: Path
    digest: str
    """What decides the bases: base model, ranks, parameterisation. Recorded in checkpoints."""
    plan: Plan

    def decompose(self, target: Target, weight: Tensor) -> Split:
        """The target's bases, read from its file. What `model.convert` calls."""
        if not _parts(target, self.plan):
            return Split()
        return Split.from_tensors(load_file(self.path(target), device=str(weight.device)))

    def path(self, target: Target) -> Path:
        """The target's file: by number, since names may be long."""
        return self.folder / f"{self.plan.targets.index(target):05d}.safetensors"


def prepare(
    model: nn.Module, plan: Plan, *, cache: Path, base_digest: str, world: World
) -> Decompositions:
    """Compute what is missing, each rank its share; return when all of it is there. Collective.

    Args:
        model: the loaded model before `convert`, whole on every rank.
        plan: its targets and ranks.
        cache: the run's cache folder, shared by all ranks.
        base_digest: digest of the base model's content.
        world: this process's place.

    Raises:
        ValueError: on every rank, if a weight holds NaN or infinity.
        OSError: on every rank, if one cannot write.
    """
    digest = _digest(model, plan, base_digest)
    found = Decompositions(cache / "decomposition" / digest, digest, plan)
    # The first rank looks, so that all share out the same list while files appear.
    missing = json.loads(from_first_rank(world, lambda: json.dumps(_missing(found))))
    if missing:
        shares = shares_by_cost([_cost(plan.targets[i]) for i in missing], world.size)
        mine = [plan.targets[missing[position]] for position in shares[world.rank]]
        failure = _compute_all(model, found, mine, world)
        raise_together(failure, world, "model_path: another rank could not split its matrices")
    barrier(world)
    from_first_rank(world, lambda: _mark_complete(found.folder))
    return found


def shares_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Positions per rank: the dearest first, each to the rank that has least to do."""
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return shares


def _digest(model: nn.Module, plan: Plan, base_digest: str) -> str:
    content = {
        "format": FORMAT_VERSION,
        "base": base_digest,
        "parameterization": plan.parameterization,
        "targets": [
            (t.parameter, t.shape, t.free_rank, str(model.get_parameter(t.parameter).dtype))
            for t in plan.targets
        ],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _parts(target: Target, plan: Plan) -> frozenset[str]:
    rows, cols = target.shape[-2:]
    return needed_parts(rows, cols, target.free_rank, plan.parameterization)


def _cost(target: Target) -> float:
    """Proportional to the work of a singular value decomposition."""
    return float(prod(target.shape)) * min(target.shape[-2:])


def _missing(found: Decompositions) -> list[int]:
    """Numbers of the targets whose file is not there or cannot be read."""
    if (found.folder / "COMPLETE").is_file():
        return []
    found.folder.mkdir(parents=True, exist_ok=True)
    return [
        number
        for number, target in enumerate(found.plan.targets)
        if (parts := _parts(target, found.plan)) and not _holds(found.path(target), parts)
    ]


def _holds(path: Path, parts: frozenset[str]) -> bool:
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == parts
    except SafetensorError:
        return False


def _compute_all(
    model: nn.Module, found: Decompositions, targets: Sequence[Target], world: World
) -> ValueError | OSError | None:
    """Write the targets' files; None, or why it stopped."""
    for target in targets:
        try:
            _compute(model, found, target, world)
        except ValueError as error:
            return ValueError(f"model_path: {target.parameter}: {error}")
        except (OSError, SafetensorError) as error:
            return OSError(f"{found.path(target)}: {error}")
    return None


def _compute(model: nn.Module, found: Decompositions, target: Target, world: World) -> None:
    """Write one target's file."""
    weight = model.get_parameter(target.parameter).detach().to(world.device)
    split = split_weight(weight, target.free_rank, found.plan.parameterization)
    path = found.path(target)
    temporary = path.with_name(f".{path.name}.{world.rank}")
    save_file({name: part.cpu() for name, part in split.to_tensors().items()}, temporary)
    _sync(temporary)
    os.replace(temporary, path)
    if world.device.type == "cuda":
        # The next matrix may have another shape; cached blocks of this one would add up.
        torch.cuda.empty_cache()


def _mark_complete(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    _sync(folder)
    (folder / "COMPLETE").touch()
    return ""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
