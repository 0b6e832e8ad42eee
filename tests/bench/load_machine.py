"""On which machine, and with which versions, a benchmark ran, and who used it meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from cluster import binaries
from osft_operator import process_tree

TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, Any]:
    """The machine and what was measured on it."""
    programs = binaries.ensure()
    server = programs.path("kube-apiserver")
    assert server is not None
    told = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "kopf": importlib.metadata.version("kopf"),
        "api_server": told.stdout.strip()
        + (" with custom resources served by a second server" if programs.joined else ""),
    }


class Usage:
    """CPU time since it was made: of some trees of processes, of this one, of all else."""

    def __init__(self, marks: dict[str, str]) -> None:
        """Begin to measure trees, by name, with their marks."""
        self._marks = marks
        self._before = self._now()

    def seconds(self) -> dict[str, float]:
        """By name of the tree; `benchmark` is this process, `others` what is no part of it."""
        # the processes are read one after the other, so others' share can come out below nothing
        now = self._now()
        return {name: max(0.0, used - self._before[name]) for name, used in now.items()}

    def _now(self) -> dict[str, float]:
        own = os.times()
        used = {
            name: sum(map(process_seconds, process_tree.find(mark)))
            for name, mark in self._marks.items()
        }
        used["benchmark"] = own.user + own.system
        # user, nice, system of all processors
        total = sum(map(int, Path("/proc/stat").read_text().split()[1:4])) / TICKS
        return {**used, "others": total - sum(used.values())}


def process_seconds(pid: int) -> float:
    """CPU time of a process, in user and system mode; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def _first(file: str, key: str) -> str:
    """The first value of a key in one of the kernel's tables."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"
