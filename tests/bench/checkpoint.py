"""What saving costs the training: how long a step waits, beside how long the save takes.

`make bench-checkpoint` measures both, to a disk and to memory (/dev/shm, as fast a folder as there
is), and the time of a step with and without a save in flight. One process; a state of the size that
--megabytes says; the steps are matrix products. The results go to `tests/bench/results/`, and `make
generate` puts them into the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import machine
from bench.tables import checkpoint_table
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.saving import Saver

RESULTS = Path(__file__).with_name("results")
MEMORY = Path("/dev/shm")
MEGABYTES, ROUNDS = 1200, 5


def state_of(megabytes: int) -> State:
    """Matrices with AdamW's two moments: a third of the bytes each."""
    count = max(1, megabytes // 3 // 16)
    trainables = {f"matrix-{n}": nn.Parameter(torch.randn(2048, 2048)) for n in range(count)}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-4, foreach=False)
    for parameter in trainables.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return State(trainables, optimizer, "bench")


def saver_of(folder: Path) -> Saver:
    """As a run makes it."""
    world = World(0, 0, 1, torch.device("cpu"))
    states = Checkpoints(RunFolder(folder), world, 1, 1, lambda: None, token="bench")
    training = TrainingParameters(
        model_path="m", data_path="d", ckpt_output_dir=str(folder), unfreeze_rank_ratio=0.5,
        effective_batch_size=1, max_tokens_per_gpu=8, max_seq_len=8, learning_rate=0.1,
    )  # fmt: skip
    return Saver(states, training, 0)


def measure(saver: Saver, state: State, rounds: int) -> dict[str, Any]:
    """Save some times while steps go on."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(4):
            left @ right
        return time.perf_counter() - began

    stalls, saves, alone, beside = [], [], [], []
    for turn in range(rounds + 1):
        quiet = [step() for _ in range(20)]
        began = time.perf_counter()
        saver.begin(state, Position(step=turn + 1))
        stall = time.perf_counter() - began
        busy = []
        while saver._flight is not None:
            busy.append(step())
            before = time.perf_counter()
            saver.advance(saver.is_writing, saver.has_failed)
            stall += time.perf_counter() - before
        if turn > 0:  # the first one fills the host's memory
            stalls.append(stall)
            saves.append(time.perf_counter() - began)
            alone += quiet
            beside += busy
    return {
        "save_seconds": saves,
        "stall_seconds": stalls,
        "step_seconds_alone": statistics.median(alone),
        "step_seconds_beside_a_save": statistics.median(beside),
    }


def main() -> None:
    """Measure, write the results, print them as tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="size of the state")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--folder", type=machine.path, help="on the disk; default: a temporary folder"
    )
    arguments = parser.parse_args()
    machine.use_all_cores()
    state = state_of(arguments.megabytes)
    size = sum(3 * p.numel() * p.element_size() for p in state.trainables.values())
    for to, place in (("disk", arguments.folder), ("memory", MEMORY)):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            found = measure(saver_of(Path(folder)), state, arguments.rounds)
        result = {
            "command": " ".join(["python -m bench.checkpoint", *sys.argv[1:]]),
            **machine.circumstances("cpu"),
            "megabytes": size / 1e6,
            "to": to,
            **found,
        }
        # A smaller trial is no result.
        if arguments.megabytes >= MEGABYTES and arguments.rounds >= ROUNDS:
            path = RESULTS / f"checkpoint-{to}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(checkpoint_table(result), flush=True)


if __name__ == "__main__":
    main()
