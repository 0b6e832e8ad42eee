"""What `osft plan` says: the report of a run as values, as JSON, as tables, and its refusal.

Made by `planning`, printed by `inspect`; `spectrum` prints names of layers likewise. Pure: values
in, text out. Must never: read a model or data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from osft_trainer.data_files import DataFiles
from osft_trainer.memory import Memory
from osft_trainer.prepared import DataCounts
from osft_trainer.targets import Plan, Target
from osft_trainer.unused_weights import NotLoaded

GIB = 2**30

_LOADING = "the model while it loads"
_WITH_COPY = "with the copy of a save,"


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
    files: DataFiles
    """Which files the data are read from, and which are passed over."""
    adaptive: bool
    """The run will shift ranks between blocks; here every block has the mean."""
    not_loaded: tuple[NotLoaded, ...] = ()
    """What the base's files hold beside the language model."""

    @property
    def total(self) -> int:
        """What a process needs where it computes, by estimate: on CPU with the copy of a save."""
        return self.memory.total + (self.memory.saving if self.device == "cpu" else 0)

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
            "memory_per_rank": {**self.memory.to_json(), "total": self.total},
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "passes_per_step": self.passes_per_step,
            "data": asdict(self.counts),
            "dataFiles": self.files.to_json(),
            "adaptive": self.adaptive,
            "not_loaded": [part.to_json() for part in self.not_loaded],
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
            needed[_LOADING] = self.memory.startup
            # Every run saves: at its end, if not before.
            needed[f"what lies there all the time, {_WITH_COPY}"] = (
                self.memory.static + self.memory.saving
            )
        found = _too_much(needed, memory_gib)
        if found is None:
            return None
        return (
            f"--memory-gib: {memory_gib:g} GiB a process cannot hold this run: {found}. Give it "
            "more processes (nnodes, nprocPerNode), a lower unfreezeRankRatio, or a smaller model"
        )

    def host_refusal(self, memory_gib: float) -> str | None:
        """Why the pod's own memory limit, so much for each rank, cannot be enough; None if it may.

        On CPU the bases do not count: they are mapped, and the kernel may drop their pages.
        """
        needed = {_LOADING: self.memory.startup, "the copy of a save": self.memory.saving}
        if self.device == "cpu":
            lasting = self.memory.static - self.memory.bases + self.memory.saving
            needed[f"what lies there all the time, without the bases, {_WITH_COPY}"] = lasting
        found = _too_much(needed, memory_gib)
        if found is None:
            return None
        return (
            f"spec.resources.limits.memory: {memory_gib:.3g} GiB for each process of a pod cannot "
            f"hold this run: {found}. Raise the limit, give a pod fewer processes (nprocPerNode), "
            "or take a smaller model"
        )

    def warning(self, memory_gib: float) -> str | None:
        """Why the run may not fit; None if the estimate says that it does."""
        if self.total <= memory_gib * GIB:
            return None
        return (
            f"{memory_gib:g} GiB a process may be too little: by estimate "
            f"{size_words(self.total)} are needed. Lower maxTokensPerGpu, or set "
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
        if self.not_loaded:
            sizes = (f"{part.name} ({size_words(part.bytes)})" for part in self.not_loaded)
            yield f"no part of the language model, copied as it is: {', '.join(sizes)}"

    def _memory_lines(self) -> Iterator[str]:
        memory = self.memory
        together = "together, with that copy" if self.device == "cpu" else "together, on the GPU"
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
            ("host memory while loading", memory.startup),
            ("host memory of a save's copy", memory.saving),
            (f"{together} (estimate)", self.total),
        ):
            yield f"  {title:<36}{size_words(size):>12}"

    def _data_lines(self) -> Iterator[str]:
        counts = self.counts
        steps = "without end" if self.steps is None else f"{self.steps:,}"
        yield f"optimizer steps: {steps} ({self.steps_per_epoch:,} an epoch)"
        yield from self.files.to_lines()
        yield (
            f"samples: {counts.samples:,} of {counts.rows:,} rows, "
            f"{counts.tokens:,} tokens, {counts.loss_tokens:,} of them with loss"
        )
        yield (
            f"dropped: {counts.dropped_overlong:,} too long, {counts.dropped_empty:,} without loss "
            f"tokens, {counts.skipped_bad:,} bad; cut: {counts.truncated:,}"
        )


def _too_much(needed: dict[str, int], memory_gib: float) -> str | None:
    """The largest need and its size, where it is more than there is."""
    worst = max(needed, key=needed.__getitem__)
    if needed[worst] <= memory_gib * GIB:
        return None
    return f"{worst} needs {size_words(needed[worst])}"


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
