"""How much of the old each method keeps while it learns the new: `make bench-retention`.

A three-layer language model learns three skills from scratch, one for each seed. Then every method
teaches it a new one from samples of the new skill only, and answers held-out questions of both.
First a screen with one seed: every method at four learning rates and two ratios on the two tasks
with a new word. Then each method, at the setting that was best there, on every task with three
seeds. The best setting is the one that learns the new skill (99 %) and keeps most; the tasks of the
second part are not looked at when it is chosen. Last, what more room does on the tasks whose
questions say nothing new: the split by activations at larger ratios or rates, with and without
weight decay, which pulls the update back to nothing, beside the split by weights with it; the
promising ones also on the other tasks. These settings were found on these tasks with one seed or
two. Two methods learn old text again in every step, one sample for four new ones; and what reads
text is also given text that lacks one of the old skills. Every number is measured in the run;
results go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in ("examples/demo", "tests/bench"):
    sys.path.insert(0, str(ROOT / folder))

import machine  # noqa: E402
import retention_methods as methods  # noqa: E402
import torch  # noqa: E402
from retention_bases import Base, prepare  # noqa: E402
from retention_report import final_table, gap_table, room_table  # noqa: E402
from retention_stages import (  # noqa: E402
    RATES,
    Scope,
    best_settings,
    final_jobs,
    gap_jobs,
    room_jobs,
    screen_jobs,
)
from retention_training import Trainings, side_by_side  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results" / "retention.json"


def main() -> None:
    """Prepare, measure, print and write the result."""
    parser = _parser()
    arguments = parser.parse_args()
    is_whole = (arguments.methods, arguments.rates) == (methods.USUAL, RATES)
    if arguments.out is None and not is_whole and not arguments.quick:
        parser.error("--methods and --rates need --out: the committed result is of all of them")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.base or Path(temporary)
        scope = _scope(arguments)
        print("a model for each seed learns rev, sort, inc from scratch", flush=True)
        prepare(folder, scope.seeds, arguments.processes)
        before = _before(folder, scope.seeds)
        print("before:", before, flush=True)
        result = measure_all(folder, scope, arguments.processes)
    result |= {
        "command": _command(arguments),
        "before": before,
        "seconds": round(time.monotonic() - began),
    }
    print("\nnew skill / old skills, share of exact answers; spread over seeds")
    print(final_table(result))
    print(room_table(result))
    print(gap_table(result))
    if arguments.out is not None or not arguments.quick:
        out = arguments.out or RESULTS
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {out}")
    print(f"\nafter {time.monotonic() - began:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed and rate, few steps; writes no result"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, metavar="METHOD", default=methods.USUAL
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of the screen")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=machine.path, help="needed with other methods, rates")
    parser.add_argument(
        "--base", type=machine.path, help="keep the base models here, or take them from here"
    )
    return parser


def _scope(arguments: argparse.Namespace) -> Scope:
    scope = Scope(methods=arguments.methods, rates=arguments.rates)
    return scope.quick() if arguments.quick else scope


def _command(arguments: argparse.Namespace) -> str:
    """What measures the same again; where the whole is written does not count."""
    told = ["--quick"] if arguments.quick else []
    if arguments.methods != methods.USUAL:
        told += ["--methods", *arguments.methods]
    if arguments.rates != RATES:
        told += ["--rates", *(f"{rate:g}" for rate in arguments.rates)]
    if told and arguments.out is not None:
        told += ["--out", str(arguments.out)]
    return "make bench-retention" + (f' ARGS="{shlex.join(told)}"' if told else "")


def _before(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """What the base model of each seed answers; keys as JSON has them."""
    return {str(seed): Base(folder, seed).before() for seed in seeds}


def measure_all(folder: Path, scope: Scope, processes: int) -> dict[str, Any]:
    """Screen, finals, room: what the result file holds."""
    trainings = Trainings(side_by_side(folder, processes))
    print("screen", flush=True)
    screen = trainings.run_all(screen_jobs(scope))
    best = best_settings(scope.methods, screen)
    print("finals, room, text that lacks a skill", flush=True)
    finals, room, gap = final_jobs(scope, best), room_jobs(scope), gap_jobs(scope, best)
    trainings.run_all([*finals, *room, *gap])  # at once: no core waits for another stage's last
    return {
        "machine": {
            "cpu": machine.processor_name(),
            "cores": machine.cores(),
            "torch": torch.__version__,
        },
        "platform": platform.platform(),
        "shared_moments": True,
        "steps": scope.steps,
        "best": {method: asdict(job) for method, job in best.items()},
        "screen": [asdict(outcome) for outcome in screen],
        "finals": [asdict(outcome) for outcome in trainings.run_all(finals)],
        "room": [asdict(outcome) for outcome in trainings.run_all(room)],
        "gap": [asdict(outcome) for outcome in trainings.run_all(gap)],
    }


if __name__ == "__main__":
    main()
