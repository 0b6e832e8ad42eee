"""One training of the retention benchmark and what comes of it, and many of them side by side.

Used by `retention`, which puts the folders of these modules on the path, and by `retention_stages`,
which says which trainings there are.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import retention_methods as methods
import torch
from retention_bases import Base, answers_only
from retention_tasks import NEW, OLD, Task, old_beside
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import get_cosine_schedule_with_warmup

from osft_trainer.moments import SubspaceAdamW

STEPS, BATCH, WARMUP, EVALUATE_EVERY = 500, 16, 20, 25
LEARNED = 0.99


@dataclass(frozen=True)
class Job:
    """One training."""

    method: str
    task: str
    learning_rate: float
    ratio: float
    seed: int = 0
    steps: int = STEPS
    weight_decay: float = 0.0
    lacks: str | None = None
    """Old skill that the text does not hold; the text is not the model's own then."""


@dataclass(frozen=True)
class Outcome:
    """What came of it: shares of held-out questions that are answered exactly."""

    job: Job
    new: float
    old: float
    """At the end; of the old, the mean over the old skills."""
    learned_at: int | None
    """First measured step at which the new skill was learned."""
    old_then: float | None
    """The old skills at that step."""
    seconds: float
    lacking: float | None = None
    """The old skill that the text lacks; `old` is the mean of the others then."""

    @property
    def rank(self) -> tuple[bool, float]:
        """Of two settings the better: the one that learns, then the one that keeps more."""
        learned = self.new >= LEARNED
        return learned, self.old if learned else self.new


class Bench:
    """The base models, and what is made of them."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where `retention_bases.prepare` has left them."""
        self._folder = folder
        self._bases: dict[int, Base] = {}

    def base(self, seed: int) -> Base:
        """The base model of a seed."""
        if seed not in self._bases:
            self._bases[seed] = Base(self._folder, seed)
        return self._bases[seed]

    def run(self, job: Job) -> Outcome:
        """Train and measure."""
        began = time.monotonic()
        torch.manual_seed(job.seed)
        base, task = self.base(job.seed), NEW[job.task]
        own = job.method in methods.READ_OWN_TEXT and job.lacks is None
        text = base.own_text() if own else base.old_text(job.lacks)
        rows = [row for alike in text for row in methods.as_rows(alike)]
        made = methods.METHODS[job.method](base.model(), job.ratio, rows)
        replayed = Replayed(text, job.seed) if job.method in methods.REPLAYED else None
        alone = [p for p in made.parameters if p not in made.shared]
        optimizer = SubspaceAdamW(
            [{"params": group} for group in (alone, [*made.shared]) if group],
            made.shared,
            lr=job.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=job.weight_decay,
            foreach=True,  # many small matrices
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, job.steps)
        data = base.samples(task, job.steps * BATCH, f"train/{job.seed}")
        learned_at, old_then = None, None
        made.hf.train()
        for step, batch in enumerate(data.split(BATCH), start=1):
            batches = [batch] if replayed is None else [batch, *replayed.next()]
            mean_loss(made.hf, batches).backward()
            made.before_clipping()
            torch.nn.utils.clip_grad_norm_(made.parameters, 1.0)
            optimizer.step()
            made.after_step()
            optimizer.zero_grad()
            schedule.step()
            due = step % EVALUATE_EVERY == 0 and learned_at is None
            if due and base.score(made.hf, task) >= LEARNED:
                learned_at, old_then = step, _old(base, made.hf, task)
        lacking = [base.score(made.hf, task) for task in OLD if task.name == job.lacks]
        return Outcome(
            job, base.score(made.hf, task), _old(base, made.hf, task, job.lacks), learned_at,
            old_then, time.monotonic() - began, *lacking,
        )  # fmt: skip


def _old(base: Base, hf: nn.Module, new: Task, lacks: str | None = None) -> float:
    """Mean score of the old skills, but for one."""
    held = [task for task in old_beside(new) if task.name != lacks]
    return statistics.mean(base.score(hf, task) for task in held)


class Replayed:
    """Old text for every step: a sample for each four of the new skill."""

    COUNT = BATCH // 4

    def __init__(self, text: list[Tensor], seed: int) -> None:
        """`text`: [chats, T] for each length."""
        self._text = text
        self._all = [(at, row) for at, alike in enumerate(text) for row in range(len(alike))]
        self._left: list[tuple[int, int]] = []
        self._source = random.Random(seed)

    def next(self) -> list[Tensor]:
        """The next samples, those of one length together; all come once before any comes again."""
        if len(self._left) < self.COUNT:
            self._left += self._source.sample(self._all, len(self._all))
        taken, self._left = self._left[: self.COUNT], self._left[self.COUNT :]
        by_length: dict[int, list[int]] = {}
        for at, row in taken:
            by_length.setdefault(at, []).append(row)
        return [self._text[at][rows] for at, rows in sorted(by_length.items())]


def mean_loss(hf: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Mean over the answer tokens of all batches; of what the model wrote, over its last words.

    All go through the model at once: what stands behind a shorter one is seen by none of its
    tokens, and has no label.
    """
    longest = max(batch.shape[1] for batch in batches)
    pairs = [(batch, answers_only(batch)) for batch in batches]
    room = [(0, longest - batch.shape[1]) for batch in batches]
    tokens = [pad(batch, by) for (batch, _), by in zip(pairs, room, strict=True)]
    labels = [pad(of_batch, by, value=-100) for (_, of_batch), by in zip(pairs, room, strict=True)]
    loss: Tensor = hf(input_ids=torch.cat(tokens), labels=torch.cat(labels)).loss
    return loss


_bench: list[Bench] = []


def _start(folder: Path) -> None:
    torch.set_num_threads(1)
    _bench.append(Bench(folder))


def _run(job: Job) -> Outcome:
    return _bench[0].run(job)


TrainAll = Callable[[Sequence[Job]], Iterable[Outcome]]


class Trainings:
    """Runs the trainings of one stage after the other, each of them once.

    The same job gives the same outcome: what an earlier stage has trained is not trained again.
    """

    def __init__(self, train_all: TrainAll) -> None:
        """`train_all` may give outcomes in any order."""
        self._train_all = train_all
        self._found: dict[Job, Outcome] = {}

    def run_all(self, jobs: Sequence[Job]) -> list[Outcome]:
        """All jobs, in their order; prints a line now and then."""
        new = [job for job in dict.fromkeys(jobs) if job not in self._found]
        began = time.monotonic()
        for count, outcome in enumerate(self._train_all(new) if new else [], start=1):
            self._found[outcome.job] = outcome
            if count % 10 == 0 or count == len(new):
                print(f"  {count} of {len(new)}, {time.monotonic() - began:.0f} s", flush=True)
        return [self._found[job] for job in jobs]


def side_by_side(folder: Path, processes: int) -> TrainAll:
    """Trainings from the base models of a folder, a process each core."""

    def train_all(jobs: Sequence[Job]) -> Iterator[Outcome]:
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, _start, (folder,)) as pool:
            yield from pool.imap_unordered(_run, jobs)

    return train_all
