"""A training step of osft beside plain fine-tuning, PEFT's OSF and LoRA, and mini_trainer on CUDA.

`make bench-train` (CPU) and `make bench-gpu` (CUDA); `--quick` shows in seconds that it works. One
model, one batch, one precision, one loss. The methods take turns (A B C, A B C, ...), so that a
busy machine slows all of them alike; the spread is over the rounds. On CPU all of them lie in
memory side by side; on CUDA each turn is a process of its own, so that the peak memory is its own.
The result goes to `tests/bench/results/`, and `make generate` puts it into the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench import machine, mini_trainer_peer, tables
from bench.methods import CUDA_ONLY, METHODS, Method, Setting
from bench.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, save, step_flops
from osft_trainer.parallel import World

RESULTS = Path(__file__).with_name("results")
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16, without sparsity, as the makers state them."""

Numbers = dict[str, Any]


def main() -> None:
    """Measure, write the result, print its table."""
    arguments = _parser().parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: --device cuda needs a CUDA device, and torch sees none here")
    shape = arguments.shape or _default_shape(arguments)
    names = [name for name in METHODS if _takes_part(name, arguments)]
    if arguments.only is not None:
        with tempfile.TemporaryDirectory(prefix="osft-bench-") as work:
            method = METHODS[arguments.only](_setting(arguments, Path(work)))
            steps = [_step(method, _tokens(arguments, shape)) for _ in range(arguments.steps + 1)]
            print(json.dumps(_closing(method, steps[1:], Path(work))))
        return
    with tempfile.TemporaryDirectory(prefix="osft-bench-") as folder:
        base = Path(folder) / "base"
        weights = save(shape, base, torch.float32 if arguments.device == "cpu" else torch.bfloat16)
        arguments.base = base
        if arguments.device == "cpu":
            found = _side_by_side(names, arguments, shape, Path(folder))
        else:
            found = _one_by_one(names, arguments, shape)
    result = _result(arguments, shape, weights, found)
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        tokens = "" if arguments.tokens is None else f"-{arguments.tokens}-tokens"
        path = RESULTS / f"train-{shape}-{arguments.device}{tokens}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    print(tables.training_table(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-100m, on CUDA qwen2.5-1.5b")
    parser.add_argument("--quick", action="store_true", help="a tiny model; writes no result")
    parser.add_argument("--tokens", type=int, help="of a step; default: 512, on CUDA 8192")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each method")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn, on CUDA")
    parser.add_argument("--ratio", type=float, default=0.25, help="unfreeze_rank_ratio")
    parser.add_argument("--methods", help="some of them, comma-separated; default: all")
    parser.add_argument("--machine", help="its name in the result; default: processor or GPU")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser


def _default_shape(arguments: argparse.Namespace) -> str:
    if arguments.quick:
        return "quick"
    return CPU_SHAPES[-1] if arguments.device == "cpu" else CUDA_SHAPES[0]


def _takes_part(name: str, arguments: argparse.Namespace) -> bool:
    if arguments.methods is not None and name not in arguments.methods.split(","):
        return False
    if name not in CUDA_ONLY:
        return True
    if arguments.device == "cuda" and not mini_trainer_peer.is_installed():
        print(f"{name} does not take part: {mini_trainer_peer.INSTALL}")
    return arguments.device == "cuda" and mini_trainer_peer.is_installed()


def _setting(arguments: argparse.Namespace, work: Path) -> Setting:
    on_cuda = arguments.device == "cuda"
    return Setting(
        base=arguments.base,
        work=work,
        world=World(0, 0, 1, torch.device(arguments.device)),
        dtype=torch.bfloat16 if on_cuda else torch.float32,
        ratio=arguments.ratio,
        activation_checkpointing=on_cuda,
        liger=on_cuda,
    )


def _tokens(arguments: argparse.Namespace, shape: str) -> torch.Tensor:
    torch.manual_seed(1)
    count = _token_count(arguments)
    ids = torch.randint(SHAPES[shape][2]["vocab_size"], (1, count))
    return ids.to(arguments.device)


def _token_count(arguments: argparse.Namespace) -> int:
    return int(arguments.tokens or (512 if arguments.device == "cpu" else 8192))


def _step(method: Method, tokens: torch.Tensor) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    method.step(tokens)
    if tokens.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _side_by_side(
    names: list[str], arguments: argparse.Namespace, shape: str, folder: Path
) -> dict[str, Numbers]:
    methods: dict[str, Method] = {}
    for number, name in enumerate(names):
        print(f"building {name}", file=sys.stderr)
        methods[name] = METHODS[name](_setting(arguments, folder / str(number)))
    tokens = _tokens(arguments, shape)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 1):
        print(f"round {turn} of {arguments.rounds}", file=sys.stderr)
        for name, method in methods.items():
            step = _step(method, tokens)
            if turn > 0:  # the first one warms up
                seconds[name].append(step)
    return {
        name: _closing(method, seconds[name], folder / f"{number}-written")
        for number, (name, method) in enumerate(methods.items())
    }


def _one_by_one(names: list[str], arguments: argparse.Namespace, shape: str) -> dict[str, Numbers]:
    turns: dict[str, list[Numbers]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        for name in names:
            print(f"round {turn + 1} of {arguments.rounds}: {name}", file=sys.stderr)
            command = [sys.executable, "-m", "bench.train_step", f"--only={name}"]
            command += [f"--device={arguments.device}", f"--shape={shape}"]
            command += [f"--base={arguments.base}", f"--steps={arguments.steps}"]
            command += [f"--tokens={_token_count(arguments)}", f"--ratio={arguments.ratio}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode != 0:
                sys.exit(f"bench: {name} failed with exit code {done.returncode}, see above")
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    found = {}
    for name, parts in turns.items():
        steps = [statistics.median(part["step_seconds"]) for part in parts]
        found[name] = {**parts[-1], "step_seconds": steps}
    return found


def _closing(method: Method, steps: list[float], work: Path) -> Numbers:
    """What is measured once, after the steps."""
    on_cuda = method.setting.world.device.type == "cuda"
    numbers: Numbers = {
        "step_seconds": steps,
        "start_seconds": method.seconds,
        "static_bytes": method.static_bytes(),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    }
    began = time.perf_counter()
    numbers["saved_bytes"] = method.save(work / "state")
    numbers["save_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    try:
        method.export(work / "export")
        numbers["export_seconds"] = time.perf_counter() - began
    except NotImplementedError:
        numbers["export_seconds"] = None
    shutil.rmtree(work / "state")
    shutil.rmtree(work / "export", ignore_errors=True)
    return numbers


def _result(
    arguments: argparse.Namespace, shape: str, weights: int, found: dict[str, Numbers]
) -> Numbers:
    on_cuda = arguments.device == "cuda"
    device = torch.cuda.get_device_name() if on_cuda else machine.processor()
    tokens = _token_count(arguments)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    return {
        "machine": arguments.machine or device,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "shape": shape,
        "weights": weights,
        "tokens": tokens,
        "ratio": arguments.ratio,
        "dtype": "bfloat16" if on_cuda else "float32",
        "activation_checkpointing": on_cuda,
        "step_flops": step_flops(shape, weights, tokens),
        "peak_flops": peak if on_cuda else None,
        "methods": found,
    }


if __name__ == "__main__":
    main()
