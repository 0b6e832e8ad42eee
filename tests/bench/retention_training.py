"""One training of the retention benchmark and what comes of it, and many of them side by side.

Used by `retention`, which puts the folders of these modules on the path, and by `retention_stages`,
which says which trainings there are. Every process opens the same base model and the same texts.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretrain
import retention_methods as methods
import skills
import torch
from retention_tasks import NEW, OLD, Task, old_beside
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from osft_trainer.self_sampling import sample_conversations

STEPS, BATCH, WARMUP, EVALUATE_EVERY, HELD_OUT = 500, 16, 20, 25, 128
LEARNED = 0.99
TEXT_SAMPLES = 12 * 96
"""Samples of old text that a method may read: twelve batches of the pre-training."""


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
    """The base model and the texts, as every process of the benchmark has them."""

    def __init__(self, folder: Path) -> None:
        """Open what `prepare` has left in the folder."""
        self.folder = folder
        self.base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @staticmethod
    def prepare(folder: Path, steps: int, say: Any = print) -> None:
        """Train the base model, and let it write its own text."""

        def progress(step: int, loss: float) -> None:
            if step % 200 == 0:
                say(f"  step {step}, loss {loss:.4f}", flush=True)

        pretrain.pretrain(
            folder, [task.name for task in OLD], steps=steps, progress=progress, whole_text=True
        )
        bench = Bench(folder)
        lines = sample_conversations(
            bench.base, bench.tokenizer, tokens=TEXT_SAMPLES * 17, max_seq_len=40, seed=0
        )
        (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def tokens(self, chats: Iterable[dict]) -> Tensor:
        """[chats, T] token numbers; chats of one task have one length."""
        return pretrain.encode(self.tokenizer, list(chats))

    def text(self, job: Job) -> list[Tensor]:
        """What a method may read, [chats, T] for each length.

        The old skills' text, or what the model wrote itself.
        """
        if job.method not in methods.READ_OWN_TEXT or job.lacks is not None:
            held = [task for task in OLD if task.name != job.lacks]
            each = TEXT_SAMPLES // len(held)
            return [
                self.tokens([chat for task in held for chat in task.samples(each, "retention")])
            ]
        chats = [json.loads(line) for line in (self.folder / "own.jsonl").open()]
        # What the model writes is not always as long as what it learned.
        by_length: dict[int, list[dict]] = {}
        for chat in chats:
            by_length.setdefault(self.tokens([chat]).shape[1], []).append(chat)
        return [self.tokens(by_length[length]) for length in sorted(by_length)]

    def run(self, job: Job) -> Outcome:
        """Train and measure."""
        began = time.monotonic()
        torch.manual_seed(job.seed)
        task = NEW[job.task]
        text = self.text(job)
        rows = [row for alike in text for row in methods.as_rows(alike)]
        made = methods.METHODS[job.method](copy.deepcopy(self.base), job.ratio, rows)
        replayed = Replayed(text, job.seed) if job.method in methods.REPLAYED else None
        optimizer = torch.optim.AdamW(
            made.parameters,
            lr=job.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=job.weight_decay,
            foreach=True,  # many small matrices
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, job.steps)
        data = self.tokens(task.samples(job.steps * BATCH, f"train/{job.seed}"))
        learned_at, old_then = None, None
        for step, batch in enumerate(data.split(BATCH), start=1):
            made.hf.train()
            batches = [batch] if replayed is None else [batch, *replayed.next()]
            mean_loss(made.hf, batches).backward()
            made.before_clipping()
            torch.nn.utils.clip_grad_norm_(made.parameters, 1.0)
            optimizer.step()
            made.after_step()
            optimizer.zero_grad()
            schedule.step()
            due = step % EVALUATE_EVERY == 0 and learned_at is None
            if due and self.score(made.hf, task) >= LEARNED:
                learned_at, old_then = step, self.old(made.hf, task)
        lacking = [self.score(made.hf, task) for task in OLD if task.name == job.lacks]
        return Outcome(
            job, self.score(made.hf, task), self.old(made.hf, task, job.lacks), learned_at,
            old_then, time.monotonic() - began, *lacking,
        )  # fmt: skip

    def before(self) -> dict[str, float]:
        """What the base model answers of everything, old and new."""
        return {task.name: self.score(self.base, task) for task in [*OLD, *NEW.values()]}

    def old(self, hf: nn.Module, new: Task, lacks: str | None = None) -> float:
        """Mean score of the old skills, but for one."""
        held = [task for task in old_beside(new) if task.name != lacks]
        return statistics.mean(self.score(hf, task) for task in held)

    @torch.no_grad()
    def score(self, hf: nn.Module, task: Task) -> float:
        """Share of held-out questions whose every answer token is the most likely one.

        Given the right beginning, each token of the answer must come first: that is the same as
        answering exactly when decoding greedily.
        """
        hf.eval()
        tokens = self.tokens(task.samples(HELD_OUT, "held out"))
        wanted = answers_only(tokens)[:, 1:]
        found = hf(input_ids=tokens).logits[:, :-1].argmax(-1)
        return float(((found == wanted) | (wanted == -100)).all(1).float().mean())


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
    """Mean over the answer tokens of all batches; of what the model wrote, over its last words."""
    labels = [answers_only(batch) for batch in batches]
    counts = [int((of_batch[:, 1:] != -100).sum()) for of_batch in labels]
    sums = [
        hf(input_ids=batch, labels=of_batch).loss * count
        for batch, of_batch, count in zip(batches, labels, counts, strict=True)
    ]
    return torch.stack(sums).sum() / sum(counts)


def answers_only(tokens: Tensor) -> Tensor:
    """Labels of the answer and its end."""
    labels = tokens.clone()
    labels[:, : -(skills.LENGTH + 1)] = -100
    return labels


_bench: list[Bench] = []


def _start(folder: Path) -> None:
    torch.set_num_threads(1)
    _bench.append(Bench(folder))


def _run(job: Job) -> Outcome:
    return _bench[0].run(job)


def run_all(folder: Path, jobs: Sequence[Job], processes: int) -> list[Outcome]:
    """All jobs, a process each core; prints a line now and then."""
    context = multiprocessing.get_context("spawn")
    found = []
    began = time.monotonic()
    with context.Pool(processes, _start, (folder,)) as pool:
        for outcome in pool.imap_unordered(_run, jobs):
            found.append(outcome)
            if len(found) % 10 == 0 or len(found) == len(jobs):
                print(
                    f"  {len(found)} of {len(jobs)}, {time.monotonic() - began:.0f} s", flush=True
                )
    return found
