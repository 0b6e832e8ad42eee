"""What `osft plan` says a process will need, beside what a training really takes.

`make bench-plan` trains a 27 M Llama for two optimizer steps on the CPU, each setting in a fresh
process, and prints the plan's estimate beside the highest resident memory of the steps, less what
the process held before it read the model. Once as it comes, and once with the C library told to
give large blocks back when they are freed, as a GPU's allocator can use them again; the difference
is what it keeps. `--output FILE` writes the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import tiny
from bench import machine, shapes
from osft_trainer.config import TrainingParameters
from osft_trainer.loop import Loop
from osft_trainer.planning import make_report
from osft_trainer.report import RunFolder

SHAPE = "llama-27m"
SETTINGS: list[dict[str, Any]] = [
    {"parameterization": "exact", "activation_checkpointing": True, "max_tokens_per_gpu": 1024},
    {"parameterization": "exact", "activation_checkpointing": True, "max_tokens_per_gpu": 4096},
    {"parameterization": "exact", "activation_checkpointing": False, "max_tokens_per_gpu": 4096},
    {
        "parameterization": "exact",
        "selective_activation_checkpointing": True,
        "max_tokens_per_gpu": 4096,
    },
    {"parameterization": "core", "activation_checkpointing": True, "max_tokens_per_gpu": 4096},
]
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc: a block of 1 MiB or more is mapped by itself. Unset, this grows to 32 MiB as blocks go."""
SAMPLE_LETTERS = 500
"""Of a question, and of its answer; a letter is a token."""
MEGABYTE = 1_000_000


def measure(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Plan and train here; MB of 10^6 bytes."""
    told = _parameters(folder, setting)
    memory = make_report(told, processes=1, device="cpu", energy=False).memory
    before = machine.resident("VmRSS")
    run = Loop.run

    def watched(loop: Loop, *arguments: Any) -> Any:
        # Loading and decomposing are over: from here on the kernel notes the highest anew.
        machine.start_of_peak()
        return run(loop, *arguments)

    Loop.run = watched  # type: ignore[method-assign]
    tiny.run(told)
    return {
        "planned": {name: size / MEGABYTE for name, size in memory.to_json().items()},
        "measured": (machine.resident("VmHWM") - before) / MEGABYTE,
        "step_seconds": _step_seconds(told),
    }


def _step_seconds(told: TrainingParameters) -> list[float]:
    lines = RunFolder(Path(told.ckpt_output_dir)).metrics.read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["seconds"]) for line in lines]


def _in_a_process(setting: dict[str, Any], environ: dict[str, str]) -> dict[str, Any]:
    """A fresh folder and a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        shapes.save(SHAPE, Path(folder) / "model", torch.float32)
        _write_data(Path(folder) / "data.jsonl")
        command = [sys.executable, "-m", "bench.plan_memory", "--one", folder]
        done = subprocess.run(
            [*command, json.dumps(setting)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _parameters(folder: Path, setting: dict[str, Any]) -> TrainingParameters:
    return tiny.training(
        folder / "model",
        folder / "data.jsonl",
        folder / "run",
        unfreeze_rank_ratio=0.25,
        effective_batch_size=4,
        max_seq_len=1024,
        training_mode="step",
        max_steps=2,
        save_final_checkpoint=False,
        **setting,
    )


def _write_data(path: Path) -> None:
    turns = [
        {"role": role, "content": letter * SAMPLE_LETTERS}
        for role, letter in (("user", "x"), ("assistant", "y"))
    ]
    path.write_text(f"{json.dumps({'messages': turns})}\n" * 8, encoding="utf-8")


def main() -> None:
    """Every setting in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=machine.path, help="file for the result")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one is not None:
        json.dump(measure(Path(told.one[0]), json.loads(told.one[1])), sys.stdout)
        return
    found = []
    for setting in SETTINGS:
        plain, giving = (_in_a_process(setting, environ) for environ in ({}, GIVING_BACK))
        found.append({**setting, **plain, "giving_back": giving})
        planned = plain["planned"]["total"]
        print(
            f"{setting}: planned {planned:.0f} MB; measured {plain['measured']:.0f} MB, "
            f"{giving['measured']:.0f} MB with memory given back; second step "
            f"{plain['step_seconds'][1]:.2f} s and {giving['step_seconds'][1]:.2f} s",
            flush=True,
        )
    result = {
        "command": "make bench-plan",
        "shape": SHAPE,
        "machine": machine.processor(),
        "date": machine.today(),
        "settings": found,
    }
    if told.output:
        told.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
