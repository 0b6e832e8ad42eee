"""Turns of the benchmark's methods in processes of their own, what is known kept.

Called by `train_step`: on CUDA for everything, on CPU for the memory that a step takes. A GPU is
lent for minutes, and some methods need hours to split a large model: so a turn has a time limit, a
method that fails or does not end is named and the others go on, and numbers are handed on as soon
as they are known, before what may still fail.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.methods import METHODS, Method, Setting

Numbers = dict[str, Any]
Keep = Callable[[dict[str, Numbers], dict[str, str]], object]
"""Takes what is known of each method so far, and what went wrong with some."""

_ROOM = 2**30
"""Bytes of disk that stay free beside a state or an export."""


def one_by_one(names: list[str], arguments: argparse.Namespace, folder: Path, keep: Keep) -> None:
    """Let the methods take turns; each turn leaves its numbers with `keep`."""
    turns: dict[str, list[Numbers]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    ends = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for turn in range(arguments.rounds):
        for number, name in enumerate(names):
            left = _seconds_left(arguments, ends)
            if name in failed or left <= 0:
                continue
            print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr)
            work = folder / str(number)
            found, failure = turn_of(name, arguments, work, turn, left)
            if failure is not None:
                failed[name] = failure
                print(f"bench: {name} {failure}", file=sys.stderr)
            if found is not None:
                turns[name].append(found)
            if failure is not None or turn + 1 == arguments.rounds:
                shutil.rmtree(work, ignore_errors=True)
            keep({name: together(parts) for name, parts in turns.items() if parts}, failed)


def _seconds_left(arguments: argparse.Namespace, ends: float | None) -> float:
    """How long a turn that begins now may take."""
    turn = math.inf if arguments.turn_minutes is None else 60 * arguments.turn_minutes
    return turn if ends is None else min(turn, ends - time.monotonic())


def together(parts: list[Numbers]) -> Numbers:
    """One method's turns: all else was measured in the first, seconds of its steps in each."""
    if len(parts) == 1:
        return parts[0]
    return {**parts[0], "step_seconds": [statistics.median(p["step_seconds"]) for p in parts]}


def turn_of(
    name: str, arguments: argparse.Namespace, work: Path, turn: int, left: float = math.inf
) -> tuple[Numbers | None, str | None]:
    """What the process said last, and what went wrong with it. The first turn's is 0."""
    work.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "bench.train_step", f"--only={name}", f"--work={work}"]
    command += [f"--device={arguments.device}", f"--shape={arguments.shape}"]
    command += [f"--base={arguments.base}", f"--steps={arguments.steps}"]
    command += [f"--tokens={arguments.tokens}", f"--ratio={arguments.ratio}"]
    command += [f"--rounds={arguments.rounds}", f"--threads={arguments.threads}", f"--turn={turn}"]
    command += ["--random-bases"] if arguments.random_bases else []
    said, failure = work / "said.txt", None
    limit = None if left == math.inf else left
    with said.open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(command, stdout=out, check=False, timeout=limit).returncode
            failure = f"ended with exit code {code}, see above" if code else None
        except subprocess.TimeoutExpired:
            failure = f"did not end in the {left:.0f} seconds that it had"
    lines = [line for line in said.read_text("utf-8").splitlines() if line.startswith("{")]
    return (json.loads(lines[-1]) if lines else None), failure


def take(name: str, setting: Setting, tokens: torch.Tensor, arguments: argparse.Namespace) -> None:
    """This process's turn; prints the numbers when the steps are done, and again with the rest."""
    on_cuda = tokens.device.type == "cuda"
    before = 0 if on_cuda else machine.start_of_peak()
    method = METHODS[name](setting)
    step(method, tokens)  # warms up
    # What splitting took is none of a step's.
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        machine.start_of_peak()
    numbers = of_steps(method, [step(method, tokens) for _ in range(arguments.steps)])
    # On a CPU without what the program itself takes, which is the same for all.
    peak = torch.cuda.max_memory_allocated() if on_cuda else machine.resident("VmHWM") - before
    numbers["peak_bytes"] = peak
    print(json.dumps(numbers), flush=True)
    if arguments.turn > 0:
        return
    if arguments.rounds == 1:
        # Nobody reads the bases again, and the disk may not hold them beside a state.
        shutil.rmtree(arguments.work / "cache", ignore_errors=True)
    print(json.dumps({**numbers, **of_files(method, arguments.work)}), flush=True)


def step(method: Method, tokens: torch.Tensor) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    loss = method.step(tokens)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not math.isfinite(loss):
        print(f"the loss is {loss}: products of such numbers take less time", file=sys.stderr)
    return seconds


def of_steps(method: Method, seconds: list[float]) -> Numbers:
    """What is known when the steps are done."""
    return {
        "step_seconds": seconds,
        "start_seconds": method.seconds,
        "static_bytes": method.static_bytes(),
        "peak_bytes": None,
        "saved_bytes": None,
        "save_seconds": None,
        "export_seconds": None,
    }


def of_files(method: Method, work: Path) -> Numbers:
    """A state and an export, each where the disk has room for it; the model is used up then."""
    numbers: Numbers = {}
    trained = sum(p.numel() for p in method.trainables.values())
    if _has_room(work, 12 * trained, "a state"):
        began = time.perf_counter()
        numbers["saved_bytes"] = method.save(work / "state")
        numbers["save_seconds"] = time.perf_counter() - began
        shutil.rmtree(work / "state")
    if _has_room(work, _bytes_of(method.setting.base), "an export"):
        began = time.perf_counter()
        try:
            method.export(work / "export")
            numbers["export_seconds"] = time.perf_counter() - began
        except NotImplementedError:
            pass
        shutil.rmtree(work / "export", ignore_errors=True)
    return numbers


def _has_room(folder: Path, needed: int, what: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + _ROOM:
        print(f"no {what}: {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f}", file=sys.stderr)
    return free >= needed + _ROOM


def _bytes_of(base: Path) -> int:
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))
