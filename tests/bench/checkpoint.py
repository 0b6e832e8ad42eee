"""What saving costs the training: how long a step waits, beside how long the save takes.

`make bench-checkpoint` prints both, and the time of a step with and without a save in flight. One
process; a state of the size that --megabytes says; the steps are matrix products.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.saving import Saver


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


def main() -> None:
    """Save some times while steps go on, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1200, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    state = state_of(arguments.megabytes)
    size = sum(3 * p.numel() * p.element_size() for p in state.trainables.values())
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def step() -> float:
        began = time.perf_counter()
        for _ in range(4):
            left @ right
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saver = saver_of(Path(folder))
        stalls, saves, alone, beside = [], [], [], []
        for turn in range(arguments.rounds + 1):
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
    stall, save = statistics.median(stalls), statistics.median(saves)
    print(f"{size / 1e6:.0f} MB of state, {torch.get_num_threads()} threads")
    print(f"the save takes      {save:8.3f} s  ({min(saves):.3f} to {max(saves):.3f})")
    print(f"the step waits      {stall:8.3f} s  ({min(stalls):.3f} to {max(stalls):.3f})")
    print(f"share               {100 * stall / save:8.1f} %")
    slower = statistics.median(beside) / statistics.median(alone)
    print(f"steps in between    {slower:8.2f} times as long as without a save")


if __name__ == "__main__":
    main()
