"""How much of the old each method keeps while it learns the new: `make bench-retention`.

A three-layer language model learns three skills from scratch. Then every method teaches it a new
one from samples of the new skill only, and answers held-out questions of both. First a screen with
one seed: every method at four learning rates and two ratios on the two tasks with a new word. Then
each method, at the setting that was best there, on every task with three seeds. The best setting is
the one that learns the new skill (99 %) and keeps most; the tasks of the second part are not looked
at when it is chosen. Last, what more room does on the tasks whose questions say nothing new: the
split by activations at larger ratios or rates, with and without weight decay, which pulls the
update back to nothing, beside the split by weights with it; the promising ones also on the
other tasks. These settings were found on these tasks with one seed. Two methods learn old text
again in every step, one sample for four new ones; and what reads text is also given text that lacks
one of the old skills. Every number is measured in the run; results go to a JSON file.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
for folder in ("examples/demo", "tests/bench"):
    sys.path.insert(0, str(ROOT / folder))

import machine  # noqa: E402
import retention_methods as methods  # noqa: E402
import torch  # noqa: E402
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
from retention_training import Bench, Job, run_all  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results" / "retention.json"


def main() -> None:
    """Prepare, measure, print and write the result."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.out == RESULTS and (arguments.methods, arguments.rates) != (methods.USUAL, RATES):
        parser.error("--methods and --rates need --out: the committed result is of all of them")
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
            held = json.loads(arguments.out.read_text())
            result = measure_missing(bench, held, arguments.processes)
        else:
            result = measure_all(bench, _scope(arguments), arguments.processes)
            result |= {
                "command": _command(arguments),
                "before": before,
                "seconds": round(time.monotonic() - began),
            }
    print("\nnew skill / old skills, share of exact answers; spread over seeds")
    print(final_table(result))
    print(room_table(result))
    print(gap_table(result))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {arguments.out} after {time.monotonic() - began:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a small screen")
    parser.add_argument("--add", action="store_true", help="only what --out lacks of the last part")
    parser.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, metavar="METHOD", default=methods.USUAL
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of the screen")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="needed with other methods, rates"
    )
    parser.add_argument("--base", type=Path, help="keep the base model here, or take it from here")
    return parser


def _scope(arguments: argparse.Namespace) -> Scope:
    scope = Scope(methods=arguments.methods, rates=arguments.rates)
    return scope.quick() if arguments.quick else scope


def _command(arguments: argparse.Namespace) -> str:
    """What measures the same again; where it is written does not count."""
    told = ["--quick"] if arguments.quick else []
    if arguments.methods != methods.USUAL:
        told += ["--methods", *arguments.methods]
    if arguments.rates != RATES:
        told += ["--rates", *(f"{rate:g}" for rate in arguments.rates)]
    return "make bench-retention" + (f' ARGS="{shlex.join(told)}"' if told else "")


def measure_all(bench: Bench, scope: Scope, processes: int) -> dict[str, Any]:
    """Screen, finals, room: what the result file holds."""
    print("screen", flush=True)
    screen = run_all(bench.folder, screen_jobs(scope), processes)
    best = best_settings(scope.methods, screen)
    print("finals", flush=True)
    finals = run_all(bench.folder, final_jobs(scope, best), processes)
    print("room", flush=True)
    room = run_all(bench.folder, room_jobs(scope), processes)
    print("text that lacks a skill", flush=True)
    gap = run_all(bench.folder, gap_jobs(scope, best), processes)
    return {
        "machine": {
            "cpu": machine.processor_name(),
            "cores": machine.cores(),
            "torch": torch.__version__,
        },
        "platform": platform.platform(),
        "steps": scope.steps,
        "best": {method: asdict(job) for method, job in best.items()},
        "screen": [asdict(outcome) for outcome in screen],
        "finals": [asdict(outcome) for outcome in finals],
        "room": [asdict(outcome) for outcome in room],
        "gap": [asdict(outcome) for outcome in gap],
    }


def measure_missing(bench: Bench, held: dict[str, Any], processes: int) -> dict[str, Any]:
    """A result with the settings of the last part that it lacks; the others are not run again.

    Raises:
        ValueError: if the base model answers otherwise than the result's.
    """
    if bench.before() != held["before"]:
        raise ValueError("--add: the result was measured with another base model, run all of it")
    began = time.monotonic()
    present = [Job(**outcome["job"]) for outcome in held["room"]]
    jobs = [job for job in room_jobs(Scope(steps=held["steps"])) if job not in present]
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


if __name__ == "__main__":
    main()
