"""On which machine, and with which versions, a benchmark ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from cluster import binaries


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


def _first(file: str, key: str) -> str:
    """The first value of a key in one of the kernel's tables."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"
