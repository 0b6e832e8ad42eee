"""On which machine a benchmark runs, how fast that multiplies, and what memory its process takes.

Lives here, too, how a benchmark reads a path. Called by benchmarks. Must never: know what they
measure.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from osft_trainer.topology import usable_cpus


def use_all_cores() -> None:
    """Let torch have as many threads as the launcher gives one rank that is alone."""
    torch.set_num_threads(usable_cpus())


def circumstances(device: str) -> dict[str, Any]:
    """What a result of torch depends on, as its file tells it: machine, threads, torch, date.

    Args:
        device: "cpu" or "cuda".
    """
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": today(),
    }


def path(text: str) -> Path:
    """A path as a user gives it to a benchmark: `~` is the home, also behind `--output=`."""
    return Path(text).expanduser()


def processor() -> str:
    """Its name, and how many cores this process may use."""
    return f"{processor_name()}, {cores()} cores"


def processor_name() -> str:
    """As the kernel tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.now(UTC).date().isoformat()


def product_flops(size: int = 2048, times: int = 5) -> float:
    """Floating-point operations per second of a product of two square float32 matrices."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    left @ right
    began = time.perf_counter()
    for _ in range(times):
        left @ right
    return times * 2 * size**3 / (time.perf_counter() - began)


def start_of_peak() -> int:
    """Let the kernel note the highest resident memory anew; bytes that are resident now.

    What was freed is given back first: it would hide as much of what comes.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
