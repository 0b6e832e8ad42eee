"""How many processes run where and how they meet: parameters, PET_* variables, defaults.

Called by `launch` and by `api`, before any process is started. The names are torchrun's, and a
parameter that is given beats its variable; where a node is alone, no meeting point counts, since no
port shall be open. Must never start a process, or import torch unless GPUs have to be counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from osft_trainer.config import LaunchParameters

DEFAULT_PORT = 29500
"""torchrun's port of a static rendezvous."""
ALONE = ""
"""Endpoint of a node that meets nobody: its ranks meet in a file."""
STORE_FILE_ENV = "OSFT_STORE_FILE"
"""Environment variable: the file in which the ranks of a node that is alone meet."""
PATIENCE_ENV = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable: seconds that ranks get to save after SIGTERM. Torch reads it."""
PATIENCE_SECONDS = 300
"""Used when it is not set: torch's own 30 seconds would cut off a large save."""


@dataclass(frozen=True)
class Topology:
    """What the launcher starts on this node."""

    nproc_per_node: int
    min_nodes: int
    max_nodes: int
    node_rank: int
    backend: str
    """static, c10d, or another that torch knows."""
    endpoint: str
    """HOST:PORT where the nodes meet, or ALONE."""
    rdzv_id: str
    rdzv_conf: Mapping[str, str]
    max_restarts: int
    """Restarts of the ranks inside one launcher. 0: the pod's restart policy does it."""
    patience_seconds: int
    """How long ranks may take to save after SIGTERM."""

    @property
    def is_single_process(self) -> bool:
        """Whether one process is all."""
        return self.max_nodes == 1 and self.nproc_per_node == 1


def count_gpus() -> int:
    """CUDA devices that torch sees."""
    # Here, because the operator's machines and early refusals do without torch.
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve(
    launch: LaunchParameters,
    environ: Mapping[str, str],
    gpus: Callable[[], int] = count_gpus,
) -> Topology:
    """Settle every launch setting: the parameter, else PET_*, else the default.

    Raises:
        ValueError: a setting is wrong or missing; names it, its value and the cure.
    """
    low, high = _nodes(launch, environ)
    backend, endpoint = _meeting_point(launch, environ, high)
    rank = _node_rank(launch, environ, high, backend)
    identity = launch.rdzv_id if launch.rdzv_id is not None else environ.get("PET_RDZV_ID")
    return Topology(
        nproc_per_node=_processes(launch, environ, gpus),
        min_nodes=low,
        max_nodes=high,
        node_rank=rank,
        backend=backend,
        endpoint=endpoint,
        rdzv_id=str(identity or "osft"),
        rdzv_conf=_conf(environ.get("PET_RDZV_CONF", "")),
        max_restarts=_number(environ, "PET_MAX_RESTARTS", 0),
        patience_seconds=_number(environ, PATIENCE_ENV, PATIENCE_SECONDS),
    )


def usable_cpus() -> int:
    """CPUs this process may use: affinity and the container's limit, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(count or 1, _cgroup_cpus(Path("/sys/fs/cgroup/cpu.max"))))


def _cgroup_cpus(path: Path) -> int:
    try:
        quota, period = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 2**31
    return 2**31 if quota == "max" else max(1, int(quota) // int(period))


def _processes(
    launch: LaunchParameters, environ: Mapping[str, str], gpus: Callable[[], int]
) -> int:
    value = launch.nproc_per_node
    asked = str(value if value is not None else environ.get("PET_NPROC_PER_NODE") or 1)
    if asked == "cpu":
        # torchrun would take one process per CPU of the host, which the container may not have.
        return 1
    if asked in ("auto", "gpu"):
        count = gpus()
        if asked == "gpu" and count == 0:
            raise ValueError(
                "nproc_per_node 'gpu': no CUDA device is visible here; use 'auto' or a number"
            )
        return max(1, count)
    if not asked.isdecimal() or not 1 <= int(asked) <= 1024:
        raise ValueError(f"nproc_per_node {asked!r} must be 1 to 1024, 'auto' or 'gpu'")
    return int(asked)


def _nodes(launch: LaunchParameters, environ: Mapping[str, str]) -> tuple[int, int]:
    if launch.nnodes is not None:
        return launch.nnodes, launch.nnodes
    text = environ.get("PET_NNODES") or "1"
    low, _, high = text.partition(":")
    if not low.isdecimal() or not (high or low).isdecimal():
        raise ValueError(f"PET_NNODES {text!r} must be a number or MIN:MAX")
    numbers = int(low), int(high or low)
    if not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"PET_NNODES {text!r} must be at least 1, and MIN at most MAX")
    return numbers


def _meeting_point(
    launch: LaunchParameters, environ: Mapping[str, str], nodes: int
) -> tuple[str, str]:
    """Backend and endpoint."""
    if nodes == 1:
        # Nobody to meet, whatever is set: a port that torch opens asks nobody who he is.
        return "c10d", ALONE
    if launch.rdzv_endpoint is not None:
        return "c10d", launch.rdzv_endpoint
    port = launch.master_port or _number(environ, "PET_MASTER_PORT", DEFAULT_PORT)
    if launch.master_addr is not None:
        return "static", f"{launch.master_addr}:{port}"
    endpoint = environ.get("PET_RDZV_ENDPOINT")
    if endpoint:
        return environ.get("PET_RDZV_BACKEND") or "c10d", endpoint
    address = environ.get("PET_MASTER_ADDR")
    if not address:
        raise ValueError(
            f"nnodes {nodes} needs a place to meet: set rdzv_endpoint HOST:PORT, or master_addr "
            "and node_rank, to the same host on every node"
        )
    return "static", f"{address}:{port}"


def _node_rank(
    launch: LaunchParameters, environ: Mapping[str, str], nodes: int, backend: str
) -> int:
    """This node's number; only a static rendezvous needs it to be told."""
    rank = launch.node_rank
    if rank is None:
        if backend == "static" and nodes > 1 and not environ.get("PET_NODE_RANK"):
            raise ValueError(f"nnodes {nodes} with master_addr needs node_rank: 0 to {nodes - 1}")
        rank = _number(environ, "PET_NODE_RANK", 0)
    if rank >= nodes:
        raise ValueError(f"node_rank {rank} must be below nnodes {nodes}")
    return rank


def _conf(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if any(not mark for _, mark, _ in pairs):
        raise ValueError(f"PET_RDZV_CONF {text!r} must look like key=value,key=value")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"{name} {text!r} must be a whole number")
    return int(text)
