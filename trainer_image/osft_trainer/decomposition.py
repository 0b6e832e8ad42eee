"""The targets' bases: computed once per run, shared out over the ranks, kept on disk.

Lives here: the cache `<run>/cache/decomposition/<digest>/`, one safetensors file a target, and who
computes which. Called by `assembly` on every rank, and by `export_checkpoint`. The bases are
always read from the files, so that every rank, attempt and resumed run works in the same subspaces
bit for bit. Matrices with one input that are split by activations have one basis: their files are
hard links to one, and one parameter holds it in memory.
Must never: decide ranks (`targets` does), or write a file itself (`basis_files` does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer.activations import (
    InputGroup,
    in_passes,
    input_groups,
    least_used,
    on_device,
    second_moments,
    used_share,
)
from osft_trainer.agreement import barrier, from_first_rank, raise_together
from osft_trainer.basis_files import facts_of, holds, link, save
from osft_trainer.durable import sync, told
from osft_trainer.parallel import World
from osft_trainer.report import COMPLETE, RunFolder
from osft_trainer.retention import RetentionText, rows
from osft_trainer.subspace import Split, needed_parts, split_weight
from osft_trainer.targets import Plan, Target

FORMAT_VERSION = 3
"""Part of the digest: raise it when the numbers or the files change."""

_PROBE_TOKENS = 16
"""Enough to see which matrices share an input: every input of the pass is held at one time."""
_USED_SHARE = "usedShare"
_INPUTS = "inputs"
_GROUP = "sharedBasis"
"""Equal in the files that hold the same."""


@dataclass(frozen=True)
class Decompositions:
    """Where the bases of a plan's targets lie."""

    folder: Path
    digest: str
    """What decides the bases: base model, ranks, parameterisation. Recorded in checkpoints."""
    plan: Plan
    _shared: dict[str, Split] = field(default_factory=dict, repr=False, compare=False)
    """What was read of files that hold the same, by what they say of themselves."""

    def decompose(self, target: Target, weight: Tensor) -> Split:
        """The target's bases, read from its file. What `model.convert` calls.

        On the CPU they are mapped, not copied: the ranks of a node share one copy in the page
        cache until each has taken its rows, so none ever holds the whole factored model.
        Targets whose files say that they hold the same get the same parameter. The files say it,
        not their inodes: all ranks must agree, and what a node sees of links may be old.
        """
        if not _parts(target, self.plan):
            return Split()
        path = self.path(target)
        group = facts_of(path).get(_GROUP)
        if group in self._shared:
            return self._shared[group]
        parts = load_file(path, device=str(weight.device))
        if group is None:
            return Split.from_tensors(parts)
        found = {name: nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
        return self._shared.setdefault(group, Split.from_tensors(found))

    def used_share(self, target: Target) -> float | None:
        """Share of the old inputs' energy in the free directions; see `activations.used_share`.

        None where the split is not by activations, or nothing had to be split.
        """
        if self.plan.split_by != "activations" or not _parts(target, self.plan):
            return None
        return float(facts_of(self.path(target))[_USED_SHARE])

    def inputs_read(self) -> int | None:
        """Inputs that the free directions were read off, of the target that saw fewest.

        None where none were, or an earlier version did not count them.
        """
        if self.plan.split_by != "activations":
            return None
        split = [target for target in self.plan.targets if _parts(target, self.plan)]
        counts = [facts_of(self.path(target)).get(_INPUTS) for target in split]
        known = [int(count) for count in counts if count is not None]
        return min(known) if known and len(known) == len(counts) else None

    def path(self, target: Target) -> Path:
        """The target's file: by number, since names may be long."""
        return self.folder / f"{self.plan.targets.index(target):05d}.safetensors"


def prepare(
    model: PreTrainedModel,
    plan: Plan,
    *,
    cache: Path,
    base_digest: str,
    world: World,
    retention: RetentionText | None = None,
) -> Decompositions:
    """Compute what is missing, each rank its share; return when all of it is there. Collective.

    Args:
        model: the loaded model before `convert`, whole on every rank.
        plan: its targets and ranks.
        cache: the run's cache folder, shared by all ranks.
        base_digest: digest of the base model's content.
        world: this process's place.
        retention: text of the old skills; needed where the plan splits by activations.

    Raises:
        ValueError: on every rank, if a weight or an input holds NaN or infinity.
        OSError: on every rank, if one cannot write.
    """
    digest = digest_of(model, plan, base_digest, retention)
    found = Decompositions(cache / "decomposition" / digest, digest, plan)
    # The first rank looks, so that all share out the same list while files appear.
    missing = json.loads(from_first_rank(world, lambda: json.dumps(_missing(found))))
    if missing:
        targets = [plan.targets[number] for number in missing]
        if plan.split_by == "activations":
            assert retention is not None, "a split by activations has a text"
            failure = _read_all(model, found, targets, world, retention)
        else:
            shares = shares_by_cost([_cost(target) for target in targets], world.size)
            mine = [targets[position] for position in shares[world.rank]]
            failure = _compute_all(model, found, mine, world)
        raise_together(failure, world, "model_path: another rank could not split its matrices")
    barrier(world)
    from_first_rank(world, lambda: _mark_complete(found.folder))
    return found


def digest_of(
    model: PreTrainedModel, plan: Plan, base_digest: str, retention: RetentionText | None
) -> str:
    """What decides the bases, as 32 hex digits; nothing is computed. Arguments as of `prepare`."""
    content = {
        "format": FORMAT_VERSION,
        "base": base_digest,
        "parameterization": plan.parameterization,
        "targets": [
            (t.parameter, t.shape, t.free_rank, str(model.get_parameter(t.parameter).dtype))
            for t in plan.targets
        ],
    }
    if plan.split_by == "activations":
        assert retention is not None, "a split by activations has a text"
        content |= {"split_by": plan.split_by, "text": retention.digest}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def stored(plan: Plan, cache: Path, digest: str) -> Decompositions | None:
    """The bases of this digest, if all of them lie in the cache; nothing is computed."""
    found = Decompositions(cache / "decomposition" / digest, digest, plan)
    return found if RunFolder.is_complete(found.folder) else None


def part_shapes(target: Target, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the bases that the target needs, by their names in `Split`."""
    *batch, rows, cols = target.shape
    kept, free = target.kept_rank, target.free_rank
    every = {
        "free_rows": (rows, free),
        "free_cols": (free, cols),
        "kept_rows": (rows, kept),
        "kept_cols": (kept, cols),
        "free_values": (free,),
    }
    return {name: (*batch, *every[name]) for name in sorted(_parts(target, plan))}


def shares_by_cost(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Positions per rank: the dearest first, each to the rank that has least to do."""
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for position in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += costs[position]
    return shares


def _parts(target: Target, plan: Plan) -> frozenset[str]:
    height, width = target.shape[-2:]
    if plan.split_by == "activations":
        bases = frozenset({"free_rows" if target.kind == "conv1d" else "free_cols"})
        return bases if target.kept_rank and target.free_rank else frozenset()
    return needed_parts(height, width, target.free_rank, plan.parameterization)


def _cost(target: Target) -> float:
    """About proportional to the time of `bases.matrix_bases`.

    The Gram matrix and the partners of the kept vectors are products with the long side; the
    eigenvectors take as long as some eleven multiplications by a vector for each of their entries
    (measured on a CPU: 0.05, 0.04 and 0.27 s at 1024 x 1024).
    """
    short, long = sorted(target.shape[-2:])
    return float(prod(target.shape[:-2])) * short**2 * (3.5 * long + 11 * short)


def _missing(found: Decompositions) -> list[int]:
    """Numbers of the targets whose file is not there or cannot be read."""
    if RunFolder.is_complete(found.folder):
        return []
    found.folder.mkdir(parents=True, exist_ok=True)
    return [
        number
        for number, target in enumerate(found.plan.targets)
        if (parts := _parts(target, found.plan)) and not holds(found.path(target), parts)
    ]


def _compute_all(
    model: PreTrainedModel, found: Decompositions, targets: Sequence[Target], world: World
) -> ValueError | OSError | None:
    """Write the targets' files; None, or why it stopped."""
    for target in targets:
        try:
            _compute(model, found, target, world)
        except ValueError as error:
            return ValueError(f"model_path: {target.parameter}: {error}")
        except (OSError, SafetensorError) as error:
            return OSError(f"{found.path(target)}: {told(error)}")
    return None


def _compute(model: PreTrainedModel, found: Decompositions, target: Target, world: World) -> None:
    """Write one target's file."""
    weight = model.get_parameter(target.parameter).detach().to(world.device)
    split = split_weight(weight, target.free_rank, found.plan.parameterization)
    save(found.path(target), split.to_tensors(), world)
    if world.device.type == "cuda":
        # The next matrix may have another shape; cached blocks of this one would add up.
        torch.cuda.empty_cache()


def _read_all(
    model: PreTrainedModel,
    found: Decompositions,
    targets: Sequence[Target],
    world: World,
    retention: RetentionText,
) -> ValueError | OSError | None:
    """Write the targets' files from what the model sees on the text; None, or why it stopped.

    Every rank reads the whole text for its share of the matrices: nothing has to be added up over
    ranks, so any number of them leaves the same files.
    """
    try:
        with on_device(model, world):
            text = list(rows(retention.read, retention.row_tokens))
            short = (text[0][0][:, :_PROBE_TOKENS], text[0][1][:, :_PROBE_TOKENS])
            groups = [g for g in input_groups(model, found.plan, short) if _any_of(g, targets)]
            shares = shares_by_cost([float(g.width) ** 3 for g in groups], world.size)
            checked = list(rows(retention.checked, retention.row_tokens))
            for batch in in_passes([groups[position] for position in sorted(shares[world.rank])]):
                _read(model, found, batch, text, checked, world)
    except ValueError as error:
        return error
    except (OSError, SafetensorError) as error:
        return OSError(f"{found.folder}: {told(error)}")
    return None


def _any_of(group: InputGroup, targets: Sequence[Target]) -> bool:
    return any(target in targets for target in group.targets)


def _read(
    model: PreTrainedModel,
    found: Decompositions,
    groups: Sequence[InputGroup],
    text: Sequence[tuple[Tensor, Tensor]],
    checked: Sequence[tuple[Tensor, Tensor]],
    world: World,
) -> None:
    """Write the files of some groups' targets, each with what it says about the old inputs."""
    moments = second_moments(model, groups, text)
    bases = [least_used(moment.total, g.rank) for g, moment in zip(groups, moments, strict=True)]
    shares = used_share(model, groups, bases, checked)
    for group, moment, basis, share in zip(groups, moments, bases, shares, strict=True):
        written: dict[str, Path] = {}
        for target in group.targets:
            (name,) = _parts(target, found.plan)
            path = found.path(target)
            if name in written and link(written[name], path, world):
                continue
            part = basis.mT.contiguous() if name == "free_rows" else basis
            facts = {
                _USED_SHARE: repr(share),
                _INPUTS: str(moment.inputs),
                _GROUP: written.get(name, path).name,
            }
            save(path, {name: part}, world, facts)
            written.setdefault(name, path)


def _mark_complete(folder: Path) -> str:
    if RunFolder.is_complete(folder):
        return ""  # it may lie on a read-only file system by now
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder)
    (folder / COMPLETE).touch()
    return ""
