"""What a run would do, on paper: targets, energy, memory, steps, data.

Lives here: the report of `osft plan` as values and as text, and the refusal of what cannot fit.
Called by `inspect`. Prepares the run's data, as the run itself would (its cache then serves the
run). Must never: start a process group, train, or write anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from osft_trainer.assembly import compute_dtype, plan_of, prepare_data
from osft_trainer.base_model import local_folder
from osft_trainer.bases import singular_values
from osft_trainer.config import TrainingParameters
from osft_trainer.memory import Memory, converted, empty_model, memory_of
from osft_trainer.model import load_model
from osft_trainer.packing import batches_per_epoch, epoch_order, pack
from osft_trainer.parallel import World
from osft_trainer.prepared import DataCounts, PreparedData
from osft_trainer.report import RunFolder
from osft_trainer.retention import prepare_retention
from osft_trainer.schedule import learning_rates, total_steps
from osft_trainer.targets import Plan, Target

GIB = 2**30

_PROBED_BATCHES = 20
"""Optimizer steps that are packed to learn how many passes a step has."""


@dataclass(frozen=True)
class Report:
    """All that `osft plan` knows."""

    model_path: str
    device: str
    compute_dtype: str
    processes: int
    plan: Plan
    energy_kept: dict[str, float] | None
    """By target: share of the sum of squared singular values that is kept; None if not asked."""
    memory: Memory
    steps: int | None
    steps_per_epoch: int
    passes_per_step: int
    """Forward passes of a rank in one optimizer step, the most of the steps looked at."""
    counts: DataCounts
    adaptive: bool
    """The run will shift ranks between blocks; here every block has the mean."""

    def to_json(self) -> str:
        """One JSON object, sizes in bytes."""
        targets = [
            {**asdict(target), "energy_kept": (self.energy_kept or {}).get(target.name)}
            for target in self.plan.targets
        ]
        document = {
            "model_path": self.model_path,
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "processes": self.processes,
            **self.plan.to_json(),
            "targets": targets,
            "trainable_share": self.plan.trainable / self.plan.total,
            "memory_per_rank": self.memory.to_json(),
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "passes_per_step": self.passes_per_step,
            "data": asdict(self.counts),
            "adaptive": self.adaptive,
        }
        return json.dumps(document, indent=1)

    def to_text(self) -> str:
        """Tables for people."""
        return "\n".join(
            [*self._target_lines(), "", *self._memory_lines(), "", *self._data_lines()]
        )

    def refusal(self, memory_gib: float) -> str | None:
        """Why the run cannot fit into so much memory per rank; None if it may.

        Only what is certain counts: the rest is an estimate.
        """
        needed = {"what lies there all the time": self.memory.static}
        if self.device == "cpu":
            needed["the model while it loads"] = self.memory.startup
        worst = max(needed, key=needed.__getitem__)
        if needed[worst] <= memory_gib * GIB:
            return None
        return (
            f"--memory-gib: {memory_gib:g} GiB a process cannot hold this run: {worst} needs "
            f"{size_words(needed[worst])}. Give it more processes (nnodes, nprocPerNode), a "
            "lower unfreezeRankRatio, or a smaller model"
        )

    def warning(self, memory_gib: float) -> str | None:
        """Why the run may not fit; None if the estimate says that it does."""
        if self.memory.total <= memory_gib * GIB:
            return None
        return (
            f"{memory_gib:g} GiB a process may be too little: by estimate "
            f"{size_words(self.memory.total)} are needed. Lower maxTokensPerGpu, or set "
            "activationCheckpointing"
        )

    def _target_lines(self) -> Iterator[str]:
        plan = self.plan
        how = "activations" if plan.split_by == "activations" else plan.parameterization
        yield f"{self.model_path}: {how}, ratio {plan.unfreeze_rank_ratio:g}"
        if self.adaptive:
            yield "ranks are means: rank_allocation adaptive shifts them between the blocks"
        yield (
            f"{plan.trainable:,} of {plan.total:,} numbers are trained "
            f"({plan.trainable / plan.total:.1%})"
        )
        yield f"{'targets':<52}{'count':>6}{'shape':>18}{'kept':>7}{'free':>7}{'energy kept':>14}"
        for group in _groups(plan):
            first, name = group[0], pattern_of(group[0].name)
            shape = " x ".join(map(str, first.shape))
            energy = _energy_words(group, self.energy_kept)
            yield (
                f"{name:<52}{len(group):>6}{shape:>18}{first.kept_rank:>7}{first.free_rank:>7}"
                f"{energy:>14}"
            )
        for title, names in (
            ("trained without protection", plan.trained_others),
            ("no target, frozen", plan.uncovered),
        ):
            if names:
                yield f"{title}: {', '.join(sorted({pattern_of(name) for name in names}))}"

    def _memory_lines(self) -> Iterator[str]:
        memory = self.memory
        yield (
            f"memory of each of {self.processes} processes ({self.device}, {self.compute_dtype}; "
            f"at most {self.passes_per_step} passes a step)"
        )
        for title, size in (
            ("effective weights of the targets", memory.effective),
            ("base weights of the targets", memory.base),
            ("bases", memory.bases),
            ("other weights", memory.frozen),
            ("trained factors", memory.factors),
            ("gradients", memory.gradients),
            ("Adam", memory.adam),
            ("static, all of the above", memory.static),
            ("gathered for a moment (estimate)", memory.gathered),
            ("activations (estimate)", memory.activations),
            ("together (estimate)", memory.total),
            ("host memory while loading", memory.startup),
        ):
            yield f"  {title:<36}{size_words(size):>12}"

    def _data_lines(self) -> Iterator[str]:
        counts = self.counts
        steps = "without end" if self.steps is None else f"{self.steps:,}"
        yield f"optimizer steps: {steps} ({self.steps_per_epoch:,} an epoch)"
        yield (
            f"samples: {counts.samples:,} of {counts.rows:,} rows, "
            f"{counts.tokens:,} tokens, {counts.loss_tokens:,} of them with loss"
        )
        yield (
            f"dropped: {counts.dropped_overlong:,} too long, {counts.dropped_empty:,} without loss "
            f"tokens, {counts.skipped_bad:,} bad; cut: {counts.truncated:,}"
        )


def make_report(
    training: TrainingParameters, *, processes: int, device: str, energy: bool
) -> Report:
    """Everything about the run that can be known before it.

    Args:
        training: the parameters, with paths of this machine.
        processes: of the whole run.
        device: cuda or cpu, where the run will be; nothing is computed there.
        energy: read the weights and compute their singular values; takes about as long as the
            run's own decomposition.

    Raises:
        ValueError: the run would refuse its input, too; or energies are asked for where not the
            strong directions of the matrix are kept.
    """
    if energy and training.split_by == "activations":
        raise ValueError(
            "--energy has no meaning with split_by activations, which keeps directions of the "
            "inputs, not of the matrix: leave it out; the run notes usedShare in plan.json"
        )
    world = World(0, 0, 1, torch.device("cpu"))
    base = local_folder(training.model_path)
    training = training.model_copy(update={"model_path": str(base)})
    dtype = compute_dtype(training.compute_dtype, torch.device(device))
    hf = empty_model(base, dtype, training.trust_remote_code)
    plan = plan_of(hf, training)
    folder = RunFolder(Path(training.ckpt_output_dir))
    prepared, _ = prepare_data(training, folder, world)
    if training.retention_data_path is not None:
        prepare_retention(training, folder, world, hf, base_digest="")
    steps = total_steps(training, prepared)
    learning_rates(training, steps)
    passes = _passes_per_step(prepared, training, processes)
    memory = memory_of(
        converted(hf, plan),
        processes=processes,
        tokens=training.max_tokens_per_gpu,
        activation_checkpointing=training.activation_checkpointing,
        accumulates=passes > 1,
    )
    return Report(
        model_path=str(base),
        device=device,
        compute_dtype=str(dtype).removeprefix("torch."),
        processes=processes,
        plan=plan,
        energy_kept=_energy_kept(base, plan, training) if energy else None,
        memory=memory,
        steps=steps,
        steps_per_epoch=batches_per_epoch(len(prepared), training.effective_batch_size),
        passes_per_step=passes,
        counts=prepared.counts,
        adaptive=training.rank_allocation == "adaptive",
    )


def _passes_per_step(prepared: PreparedData, training: TrainingParameters, processes: int) -> int:
    order = epoch_order(len(prepared), training.seed, 0)
    size, limit = training.effective_batch_size, training.max_tokens_per_gpu
    starts = range(0, min(len(order), _PROBED_BATCHES * size), size)
    batches = [prepared.lengths[order[start : start + size]] for start in starts]
    return max(len(pack(lengths, processes, limit)) for lengths in batches)


def _energy_kept(base: Path, plan: Plan, training: TrainingParameters) -> dict[str, float]:
    hf = load_model(base, torch.float32, training.trust_remote_code)
    return {
        target.name: energy_kept(hf.get_parameter(target.parameter), target.free_rank)
        for target in plan.targets
    }


@torch.no_grad()
def energy_kept(weight: torch.Tensor, rank: int) -> float:
    """Share of the squared singular values of [batch x] rows x cols in the kept directions."""
    kept = total = 0.0
    for matrix in weight.detach().reshape(-1, *weight.shape[-2:]):
        squares = singular_values(matrix) ** 2
        total += float(squares.sum())
        kept += float(squares[: len(squares) - rank].sum())
    return kept / total if total else 1.0


def size_words(size: int) -> str:
    """Bytes as people read them: in GiB, small ones in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def pattern_of(name: str) -> str:
    """A module path with its numbers left out, to print equal layers once."""
    return re.sub(r"\.\d+(?=\.|\Z)", ".*", name)


def _groups(plan: Plan) -> list[list[Target]]:
    """Targets that differ in nothing but the numbers of their paths."""
    groups: dict[tuple[object, ...], list[Target]] = {}
    for target in plan.targets:
        key = (pattern_of(target.name), target.shape, target.free_rank)
        groups.setdefault(key, []).append(target)
    return list(groups.values())


def _energy_words(group: list[Target], energy: dict[str, float] | None) -> str:
    if energy is None:
        return "-"
    found = [energy[target.name] for target in group]
    low, high = min(found), max(found)
    return f"{low:.1%}" if high - low < 5e-4 else f"{low:.1%}-{high:.1%}"
