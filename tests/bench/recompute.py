"""What keeping, recomputing and compiling a decoder block costs: `make bench-recompute`.

One model and one batch, trained by OSFT (exact): every block keeps all it computed, only its input
(activation checkpointing), or its input and the results of matrix products and attention (selective
checkpointing); and with each block compiled by torch.compile. Each setting runs in a process of its
own, and they take turns. A short row goes first, in which blocks are compiled. Memory is the
highest resident memory of the next forward and backward pass, less what lay there before it (on
CUDA: of allocated memory). The result goes to `tests/bench/results/`, and `make generate` puts it
into the README.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.methods import Method, Setting, ours
from bench.shapes import CPU_SHAPES, CUDA_SHAPES, SHAPES, counted, save
from osft_trainer.blocks import compile_blocks
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World

RESULTS = Path(__file__).with_name("results")
MODES: dict[str, tuple[str, bool]] = {
    "everything is kept": ("keep", False),
    "activation checkpointing": ("recompute", False),
    "selective activation checkpointing": ("selective", False),
    "everything is kept, blocks compiled": ("keep", True),
    "activation checkpointing, blocks compiled": ("recompute", True),
    "selective activation checkpointing, blocks compiled": ("selective", True),
}
"""What is kept, and whether blocks are compiled."""
STEPS = 3
"""Measured in each turn, after one that warms up."""

SHORT = 64
"""Tokens of the row in which blocks are compiled."""

Numbers = dict[str, Any]


def main() -> None:
    """Measure, write the result, print it."""
    arguments = _parser().parse_args()
    if arguments.device == "cpu":
        machine.use_all_cores()
    if arguments.one is not None:
        print(json.dumps(measure(arguments)))
        return
    shape = arguments.shape or (CPU_SHAPES if arguments.device == "cpu" else CUDA_SHAPES)[-1]
    turns: dict[str, list[Numbers]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="osft-bench-") as folder:
        dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
        save(shape, Path(folder) / "base", dtype, arguments.device)
        for turn in range(arguments.rounds):
            for mode in [*turns]:
                print(f"round {turn + 1} of {arguments.rounds}: {mode}", file=sys.stderr)
                found = _in_a_process(mode, Path(folder), arguments)
                if found is None:
                    del turns[mode]
                else:
                    turns[mode].append(found)
            # After each: what comes later may be cut off.
            if turns:
                _write(turns, shape, arguments)


def _write(turns: dict[str, list[Numbers]], shape: str, arguments: argparse.Namespace) -> None:
    result = {
        "command": " ".join(["python -m bench.recompute", *sys.argv[1:]]),
        **machine.circumstances(arguments.device),
        "shape": shape,
        "weights": counted(shape)[0],
        "tokens": arguments.tokens,
        "modes": {mode: _summary(found) for mode, found in turns.items()},
    }
    path = RESULTS / f"recompute-{shape}-{arguments.device}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["modes"], indent=1), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-100m, on CUDA llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each setting")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=machine.path, help=argparse.SUPPRESS)
    return parser


def _in_a_process(mode: str, folder: Path, arguments: argparse.Namespace) -> Numbers | None:
    """What the process measured; None if it failed, which it has said."""
    command = [sys.executable, "-m", "bench.recompute", f"--one={mode}", f"--folder={folder}"]
    command += [f"--device={arguments.device}", f"--tokens={arguments.tokens}"]
    # A cache of its own: what one turn has compiled another does not find.
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environ)
    if done.returncode != 0:
        print(f"bench: {mode} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    found: Numbers = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(arguments: argparse.Namespace) -> Numbers:
    """One setting in this process."""
    method = _method(arguments)
    vocabulary = method.module.get_submodule("hf.model.embed_tokens").weight.shape[0]
    torch.manual_seed(1)
    tokens = torch.randint(int(vocabulary), (1, arguments.tokens)).to(arguments.device)
    began = time.perf_counter()
    _pass(method, tokens[:, :SHORT])
    first = time.perf_counter() - began
    before = _start_of_peak(arguments.device)
    _pass(method, tokens)
    activations = _peak(arguments.device) - before
    method.step(tokens)  # makes the optimizer's state
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        method.step(tokens)  # waits for the device at its end
        seconds.append(time.perf_counter() - began)
    return {"bytes": activations, "first_pass_seconds": first, "step_seconds": seconds}


def _pass(method: Method, tokens: torch.Tensor) -> None:
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    loss = method.loss(tokens, positions)
    loss.backward()  # type: ignore[no-untyped-call]
    method.optimizer.zero_grad(set_to_none=True)
    float(loss.detach())  # waits for the device


def _method(arguments: argparse.Namespace) -> Method:
    on_cuda = arguments.device == "cuda"
    kept, compiled = MODES[arguments.one]
    setting = Setting(
        base=arguments.folder / "base",
        work=arguments.folder,
        world=World(0, 0, 1, torch.device(arguments.device)),
        dtype=torch.bfloat16 if on_cuda else torch.float32,
        ratio=0.25,
        activation_checkpointing=kept != "keep",
        liger=on_cuda,
        selective=kept == "selective",
        # Splits of large models take longer than all that is measured.
        random_bases=on_cuda,
    )
    method = ours(setting, "exact")
    model = method.module
    assert isinstance(model, OSFTModel)
    model.train()
    if compiled:
        compile_blocks(model.hf, setting.world.device)
    return method


def _start_of_peak(device: str) -> int:
    """From here on the highest is noted anew; bytes that lie there now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return machine.start_of_peak()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else machine.resident("VmHWM")


def _summary(turns: list[Numbers]) -> Numbers:
    steps = [statistics.median(turn["step_seconds"]) for turn in turns]
    return {
        "step_seconds": steps,
        "bytes": statistics.median(turn["bytes"] for turn in turns),
        "first_pass_seconds": [turn["first_pass_seconds"] for turn in turns],
    }


if __name__ == "__main__":
    main()
