"""Time of the kept and free bases beside one singular value decomposition, and of the cache.

`make bench-bases` measures, for each shape, the seconds of `torch.linalg.svd` in
float64 and of our `split_weight`, in turns, their ratio with its spread over the rounds, and how
far the split found is from the exact one. Then it prepares the bases of a small model twice: the
second time they are read. Random weights with a spectrum like that of trained ones. The result goes
to `tests/bench/results/`, and `make generate` puts it into the README.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import machine
from bench.tables import bases_table
from osft_trainer.decomposition import prepare
from osft_trainer.parallel import World
from osft_trainer.subspace import free_rank, split_weight
from osft_trainer.targets import plan_targets

RESULTS = Path(__file__).with_name("results")
SHAPES = [(1024, 1024), (1024, 3584), (3584, 1024)]
RATIO = 0.25
ROUNDS = 5


def weight_like_a_trained_one(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Gaussian noise and a few strong directions, rounded to bfloat16."""
    torch.manual_seed(rows + cols)
    noise = torch.randn(rows, cols) / cols**0.5
    strong = torch.randn(rows, 16) @ torch.randn(16, cols) / (rows * cols) ** 0.25
    return (noise + 0.3 * strong).bfloat16().float().to(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def largest_sine(weight: torch.Tensor, rank: int, form: str) -> float:
    """Sine of the largest angle between a basis found and the kept space it must avoid, or fill."""
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    parts = split_weight(weight, rank, form).to_tensors()
    kept = {"rows": left[:, :-rank], "cols": right[:-rank].mT}
    found = 0.0
    for name, part in parts.items():
        side = name[-4:]
        basis = (part if side == "rows" else part.mT).double()
        inside = kept[side] @ (kept[side].mT @ basis)
        wrong = inside if name.startswith("free") else basis - inside
        found = max(found, float(torch.linalg.matrix_norm(wrong, 2)))
    return found


def measure_bases(shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns, for one shape."""
    rows, cols = shape
    weight = weight_like_a_trained_one(rows, cols, arguments.device)
    rank = free_rank(rows, cols, RATIO)
    theirs: list[float] = []
    ours: list[float] = []
    for turn in range(arguments.rounds + 1):
        svd = partial(torch.linalg.svd, weight.double(), full_matrices=False)
        seconds = timed(svd, arguments.device)
        own = timed(partial(split_weight, weight, rank, arguments.form), arguments.device)
        if turn > 0:  # the first one warms up
            theirs.append(seconds)
            ours.append(own)
    return {
        "shape": shape,
        "svd_seconds": theirs,
        "seconds": ours,
        "largest_sine": largest_sine(weight, rank, arguments.form),
    }


def measure_cache(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start with an empty cache and with a full one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )
    plan = plan_targets(model, RATIO, arguments.form)
    world = World(0, 0, 1, arguments.device)
    with tempfile.TemporaryDirectory() as folder:

        def start() -> None:
            found = prepare(model, plan, cache=Path(folder), base_digest="bench", world=world)
            for target in plan.targets:
                weight = model.get_parameter(target.parameter).detach().to(arguments.device)
                for part in found.decompose(target, weight).to_tensors().values():
                    part.clone()  # a file that is only mapped is not read

        return {
            "matrices": len(plan.targets),
            "empty_seconds": timed(start, arguments.device),
            "full_seconds": [timed(start, arguments.device) for _ in range(3)],
        }


def main() -> None:
    """Measure, write the result, print it as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="fewer write no result")
    parser.add_argument("--form", default="exact", choices=["exact", "core", "factored"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    arguments = parser.parse_args()
    machine.use_all_cores()
    result = {
        "command": " ".join(["python -m bench.decomposition", *sys.argv[1:]]),
        **machine.circumstances(arguments.device.type),
        "form": arguments.form,
        "ratio": RATIO,
        "bases": [measure_bases(shape, arguments) for shape in SHAPES],
        "cache": measure_cache(arguments),
    }
    if arguments.rounds >= ROUNDS:
        path = RESULTS / f"bases-{arguments.form}-{arguments.device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(bases_table(result))


if __name__ == "__main__":
    main()
