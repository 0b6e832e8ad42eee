"""One training of the retention benchmark and what comes of it, and many of them side by side.

Used by `retention`, which puts the folders of these modules on the path, and by `retention_stages`,
which says which trainings there are. Every process opens the same base model and the same texts.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
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

    def text(self, method: str) -> list[methods.Row]:
        """What a method may read: the old skills' text, or what the model wrote itself."""
        if method == methods.OWN_TEXT:
            chats = [json.loads(line) for line in (self.folder / "own.jsonl").open()]
            # What the model writes is not always as long as what it learned.
            by_length: dict[int, list[dict]] = {}
            for chat in chats:
                by_length.setdefault(self.tokens([chat]).shape[1], []).append(chat)
            alike = [by_length[length] for length in sorted(by_length)]
            return [row for chats in alike for row in methods.as_rows(self.tokens(chats))]
        each = TEXT_SAMPLES // len(OLD)
        chats = [chat for task in OLD for chat in task.samples(each, "retention")]
        return methods.as_rows(self.tokens(chats))

    def run(self, job: Job) -> Outcome:
        """Train and measure."""
        began = time.monotonic()
        torch.manual_seed(job.seed)
        task = NEW[job.task]
        made = methods.METHODS[job.method](
            copy.deepcopy(self.base), job.ratio, self.text(job.method)
        )
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
            loss = made.hf(input_ids=batch, labels=answers_only(batch)).loss
            loss.backward()
            made.before_clipping()
            torch.nn.utils.clip_grad_norm_(made.parameters, 1.0)
            optimizer.step()
            made.after_step()
            optimizer.zero_grad()
            schedule.step()
            due = step % EVALUATE_EVERY == 0 and learned_at is None
            if due and self.score(made.hf, task) >= LEARNED:
                learned_at, old_then = step, self.old(made.hf, task)
        return Outcome(
            job, self.score(made.hf, task), self.old(made.hf, task), learned_at, old_then,
            time.monotonic() - began,
        )  # fmt: skip

    def before(self) -> dict[str, float]:
        """What the base model answers of everything, old and new."""
        return {task.name: self.score(self.base, task) for task in [*OLD, *NEW.values()]}

    def old(self, hf: nn.Module, new: Task) -> float:
        """Mean score of the old skills."""
        return statistics.mean(self.score(hf, task) for task in old_beside(new))

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
