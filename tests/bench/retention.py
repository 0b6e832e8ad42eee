"""How much of the old each method keeps while it learns the new: `make bench-retention`.

A three-layer language model learns three skills from scratch. Then every method teaches it a new
one from samples of the new skill only, and answers held-out questions of both. First a screen with
one seed: every method at four learning rates and two ratios on the two tasks with a new word. Then
each method, at the setting that was best there, on every task with three seeds. The best setting is
the one that learns the new skill (99 %) and keeps most; the tasks of the second part are not looked
at when it is chosen. Last, what more room does on the tasks whose questions say nothing new: the
split by activations at larger ratios or rates, with and without weight decay, which pulls the
update back to nothing, beside the split by weights with it; the promising ones also on the
other tasks. These settings were found on these tasks with one seed. Every number is measured in the
run; results go to a JSON file.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in ("examples/demo", "tests/bench"):
    sys.path.insert(0, str(ROOT / folder))

import pretrain  # noqa: E402
import retention_methods as methods  # noqa: E402
import skills  # noqa: E402
import torch  # noqa: E402
from retention_report import final_table, room_table  # noqa: E402
from retention_tasks import NEW, OLD, Task, old_beside  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

from osft_trainer.self_sampling import sample_conversations  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results" / "retention.json"
STEPS, BATCH, WARMUP, EVALUATE_EVERY, HELD_OUT = 500, 16, 20, 25, 128
RATES = [1e-4, 3e-4, 1e-3, 3e-3]
RATIOS = [0.25, 0.5]
SEEDS = [0, 1, 2]
SCREENED = ["easy, new word", "conflicting, new word"]
PROMISING = [
    (methods.OWN_TEXT, 0.25, 3e-2, 0.3),
    (methods.OWN_TEXT, 0.5, 1e-2, 1.0),
    (methods.OWN_TEXT, 0.5, 1e-2, 2.0),
    (methods.OWN_TEXT, 0.5, 2e-2, 2.0),
]
"""Tried on the tasks with new words, too."""
ROOM = [
    (methods.OWN_TEXT, 0.5, 1e-3, 0.0),
    (methods.OWN_TEXT, 0.5, 3e-3, 0.0),
    (methods.OWN_TEXT, 0.75, 1e-3, 0.0),
    (methods.OWN_TEXT, 0.75, 3e-3, 0.0),
    *PROMISING,
    (methods.OWN_TEXT, 0.25, 3e-2, 0.0),
    (methods.BY_WEIGHTS, 0.25, 3e-3, 1.0),
    (methods.BY_WEIGHTS, 0.25, 1e-2, 1.0),
]
"""Method, ratio, learning rate, weight decay."""
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


def screen_jobs(names: Sequence[str], steps: int, quick: bool) -> list[Job]:
    """These methods at every setting, on the screened tasks."""
    rates, ratios = (RATES[1:3], RATIOS[1:]) if quick else (RATES, RATIOS)
    return [
        Job(method, task, rate, ratio, steps=steps)
        for method in names
        for task in SCREENED
        for rate in rates
        for ratio in (ratios[:1] if method in methods.WITHOUT_RATIO else ratios)
    ]


def best_settings(outcomes: Sequence[Outcome]) -> dict[str, Job]:
    """Per method the setting with the best result summed over the screened tasks."""
    best: dict[str, Job] = {}
    for method in dict.fromkeys(o.job.method for o in in_order(outcomes)):
        mine = [o for o in outcomes if o.job.method == method]
        settings = {(o.job.learning_rate, o.job.ratio) for o in mine}

        def merit(setting: tuple[float, float], mine: list[Outcome] = mine) -> tuple[int, float]:
            ranks = [o.rank for o in mine if (o.job.learning_rate, o.job.ratio) == setting]
            return sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)

        rate, ratio = max(sorted(settings), key=merit)
        best[method] = replace(mine[0].job, learning_rate=rate, ratio=ratio)
    return best


def in_order(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By method, in the order of the tables."""
    names = list(methods.METHODS)
    return sorted(outcomes, key=lambda outcome: names.index(outcome.job.method))


def final_jobs(best: dict[str, Job], quick: bool) -> list[Job]:
    """Each method at its best on every task and seed."""
    seeds = SEEDS[:1] if quick else SEEDS
    return [
        replace(job, task=task, seed=seed)
        for job in best.values()
        for task in NEW
        for seed in seeds
    ]


def room_jobs(steps: int, quick: bool) -> list[Job]:
    """The split by activations with more room, where old and new inputs are made of the same words.

    At the setting that is best for new words it cannot learn these: the free directions hold so
    little of their inputs. What helps here must not harm the tasks with new words.
    """
    seeds = SEEDS[:1] if quick else SEEDS
    return [
        Job(method, task, rate, ratio, seed, steps, decay)
        for method, ratio, rate, decay in ROOM
        for task in NEW
        if task not in SCREENED or (method, ratio, rate, decay) in PROMISING
        for seed in seeds
    ]


def measure_all(bench: Bench, names: Sequence[str], quick: bool, processes: int) -> dict[str, Any]:
    """Screen, finals, room of these methods: what the result file holds."""
    steps = 250 if quick else STEPS
    print("screen", flush=True)
    screen = run_all(bench.folder, screen_jobs(names, steps, quick), processes)
    best = best_settings(screen)
    print("finals", flush=True)
    finals = run_all(bench.folder, final_jobs(best, quick), processes)
    print("room", flush=True)
    roomy = [job for job in room_jobs(steps, quick) if job.method in names]
    room = run_all(bench.folder, roomy, processes)
    return {
        "command": command_of(names, quick),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__},
        "platform": platform.platform(),
        "steps": steps,
        "best": {method: asdict(job) for method, job in best.items()},
        "screen": [asdict(outcome) for outcome in screen],
        "finals": [asdict(outcome) for outcome in finals],
        "room": [asdict(outcome) for outcome in room],
    }


def command_of(names: Sequence[str], quick: bool) -> str:
    """What measures these methods again."""
    chosen = "" if list(names) == list(methods.METHODS) else "--methods"
    chosen += "".join(f" '{name}'" for name in names if chosen)
    arguments = " ".join(part for part in ("--quick" if quick else "", chosen) if part)
    return "make bench-retention" + (f' ARGS="{arguments}"' if arguments else "")


def measure_missing(bench: Bench, held: dict[str, Any], processes: int) -> dict[str, Any]:
    """A result with the settings of the last part that it lacks; the others are not run again.

    Raises:
        ValueError: if the base model answers otherwise than the result's.
    """
    if bench.before() != held["before"]:
        raise ValueError("--add: the result was measured with another base model, run all of it")
    began = time.monotonic()
    present = [Job(**outcome["job"]) for outcome in held["room"]]
    jobs = [job for job in room_jobs(held["steps"], quick=False) if job not in present]
    added = [asdict(outcome) for outcome in run_all(bench.folder, jobs, processes)]
    room = [
        {**outcome, "job": asdict(job)} for outcome, job in zip(held["room"], present, strict=True)
    ]
    note = {
        "command": "make bench-retention ARGS=--add",
        "trainings": len(jobs),
        "seconds": round(time.monotonic() - began),
    }
    return {**held, "room": [*room, *added], "added": [*held.get("added", []), note]}


def main() -> None:
    """Prepare, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a small screen")
    parser.add_argument("--add", action="store_true", help="only what --out lacks of the last part")
    parser.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS),
        metavar="METHOD", help="some of them; give --out, too",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--base", type=Path, help="keep the base model here, or take it from here")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.base or Path(temporary) / "base"
        if not (folder / "own.jsonl").is_file():
            print("a model learns rev, sort, inc from scratch", flush=True)
            Bench.prepare(folder, steps=700)
        bench = Bench(folder)
        before = bench.before()
        print("before:", before, flush=True)
        if arguments.add:
            result = measure_missing(
                bench, json.loads(arguments.out.read_text()), arguments.processes
            )
        else:
            result = measure_all(bench, arguments.methods, arguments.quick, arguments.processes)
            result |= {"before": before, "seconds": round(time.monotonic() - began)}
    print("\nnew skill / old skills, share of exact answers; spread over seeds")
    print(final_table(result))
    print(room_table(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {arguments.out} after {time.monotonic() - began:.0f} s")


def cpu_name() -> str:
    """As the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
