"""`make demo`: a small model that has learned three skills is taught a fourth, and keeps the three.

Makes the model and the data in .demo/ (no hub), trains examples/quickstart.yaml through `osft run`,
then plain fine-tuning and OSFT split by the weights, each at three learning rates, scores every
model on held-out samples and prints the table. Every number is measured in this run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import pretrain  # noqa: E402
import score  # noqa: E402
import skills  # noqa: E402

DEMO = ROOT / ".demo"
VOLUMES = DEMO / "volumes"
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
BASE = VOLUMES / "models" / "skills"
OLD = ["rev", "sort", "inc"]
NEW = "rot"
LEARNED = 0.99
"""A model counts as having learned the new skill from this share of right answers."""
QUICKSTART_METHOD = "OSFT by activations"
METHODS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "plain fine-tuning": (
        {"splitBy": "weights", "unfreezeRankRatio": 1.0, "otherParameters": "all"},
        [1e-4, 2e-4, 4e-4],
    ),
    "OSFT by weights": (
        {"splitBy": "weights", "unfreezeRankRatio": 0.25},
        [1e-3, 2e-3, 4e-3],
    ),
    QUICKSTART_METHOD: ({}, [1e-3, 2e-3, 4e-3]),
}
"""What each changes in the quickstart, and three learning rates."""


@dataclass(frozen=True)
class Run:
    """One training of the table, and its scores."""

    method: str
    learning_rate: float
    name: str
    new: float = 0.0
    old: float = 0.0

    @property
    def rank(self) -> tuple[bool, float]:
        """The better of two: the one that has learned, then the one that has kept more."""
        return (self.new >= LEARNED, self.old if self.new >= LEARNED else self.new)


def main() -> None:
    """Make the model, train, score, print."""
    began = time.monotonic()
    print(f"1. a model learns {', '.join(OLD)} from scratch", flush=True)
    if not (BASE / "config.json").exists():
        pretrain.pretrain(BASE, OLD, progress=_show_pretraining, whole_text=True)
    skills.write_jsonl(VOLUMES / "datasets" / f"{NEW}.jsonl", NEW, 4000, seed=2)
    print(f"2. it is taught {NEW}: osft run examples/quickstart.yaml and variants", flush=True)
    runs = [
        Run(method, rate, _name(method, rate))
        for method, (_, rates) in METHODS.items()
        for rate in rates
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:  # one core each
        list(pool.map(_train, runs))
    print("3. every model answers 200 held-out questions of each skill", flush=True)
    before = score.scores(BASE, [*OLD, NEW])
    runs = [_scored(run) for run in runs]
    print()
    print(_table(before, runs))
    print(f"\nmeasured in {time.monotonic() - began:.0f} s; models and metrics are in {DEMO}")


def _show_pretraining(step: int, loss: float) -> None:
    if step % 100 == 0:
        print(f"   step {step}, loss {loss:.4f}", flush=True)


def _quickstart() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    return job


def _name(method: str, rate: float) -> str:
    """`quickstart` for the example as it stands, else the method and the learning rate."""
    quickstart_rate = _quickstart()["spec"]["training"]["learningRate"]
    if (method, rate) == (QUICKSTART_METHOD, quickstart_rate):
        return "quickstart"
    return f"{method.split()[-1].lower()}-{rate:g}".replace(".", "-")


def _file(run: Run) -> Path:
    """The example itself, or a variant of it written to .demo/jobs/."""
    if run.name == "quickstart":
        return QUICKSTART
    file = DEMO / "jobs" / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(job_of(run), sort_keys=False), encoding="utf-8")
    return file


def job_of(run: Run) -> dict[str, Any]:
    """The quickstart's OSFTJob with this run's name, learning rate and method."""
    job = _quickstart()
    job["metadata"]["name"] = run.name
    job["spec"]["training"]["learningRate"] = run.learning_rate
    changes, _ = METHODS[run.method]
    job["spec"]["training"] |= changes
    return job


def _train(run: Run) -> None:
    file = _file(run)
    command = [str(Path(sys.executable).with_name("osft")), "run", str(file), "--quiet"]
    done = subprocess.run(
        [*command, "--volumes", str(VOLUMES)],
        # two runs at a time: with a thread more each, they would wait for one another
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    print("   " + done.stdout.splitlines()[0], flush=True)


def _scored(run: Run) -> Run:
    found = score.scores(VOLUMES / f"{run.name}-checkpoints" / run.name / "final", [*OLD, NEW])
    old = sum(found[name] for name in OLD) / len(OLD)
    return Run(run.method, run.learning_rate, run.name, new=found[NEW], old=old)


def _table(before: dict[str, float], runs: list[Run]) -> str:
    old = sum(before[name] for name in OLD) / len(OLD)
    rows = [("before", "", before[NEW], old, "")]
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        best = max(mine, key=lambda run: run.rank)
        rows += [
            (method, f"{run.learning_rate:g}", run.new, run.old, "<- better" * (run is best))
            for run in mine
        ]
    head = f"{'':<20}{'learning rate':>14}{'new skill':>12}{'old skills':>12}"
    lines = [f"{a:<20}{b:>14}{c:>11.1%} {d:>11.1%}   {e}".rstrip() for a, b, c, d, e in rows]
    return "\n".join([head, *lines])


if __name__ == "__main__":
    main()
