"""The rows of the training state that one rank holds, in one safetensors file.

Lives here: which rows a rank has, writing them with AdamW's state, and reading any rows back from
the files of any number of ranks. Called by `checkpoint`. Must never: use pickle, or gather a whole
parameter.

A file holds, for each trained parameter, `value/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`: this
rank's rows (dimension 0, as FSDP2 shards) in float32. Beside it lies a JSON file with the row
ranges, AdamW's step counts and the file's size and sha256, by which a torn file is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Trainables = Mapping[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter that has its shape."""


@dataclass(frozen=True)
class Shard:
    """One rank's file, as its JSON file describes it."""

    path: Path
    rows: dict[str, tuple[int, int]]
    """[start, stop) of dimension 0, by parameter."""
    shapes: dict[str, list[int]]
    """Shapes of the whole parameters."""
    steps: dict[str, float]
    """AdamW's step count by parameter; absent for a parameter that never had a gradient."""
    size: int
    sha256: str

    def is_intact(self) -> bool:
        """Whether the file is the one that was written, byte for byte."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        return _sha256(self.path) == self.sha256


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's rows lie."""
    return folder / f"rank-{rank:05d}.safetensors"


def write_shard(
    folder: Path, rank: int, trainables: Trainables, optimizer: torch.optim.Optimizer
) -> None:
    """Write this rank's rows and their description, and force both to disk."""
    path = file_of(folder, rank)
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, parameter in trainables.items():
        state = optimizer.state.get(parameter, {})
        tensors[f"value/{name}"] = _local(parameter)
        tensors.update({f"{moment}/{name}": _local(state[moment]) for moment in MOMENTS if state})
        if state:
            steps[name] = float(state["step"])
    save_file({key: part.detach().cpu().contiguous() for key, part in tensors.items()}, path)
    sync(path)
    description = {
        "rows": {name: rows_of(parameter) for name, parameter in trainables.items()},
        "shapes": {name: list(parameter.shape) for name, parameter in trainables.items()},
        "steps": steps,
        "size": path.stat().st_size,
        "sha256": _sha256(path),
    }
    path.with_suffix(".json").write_text(json.dumps(description), encoding="utf-8")
    sync(path.with_suffix(".json"))


def open_shard(folder: Path, rank: int) -> Shard | None:
    """A rank's file; None when its description is missing or damaged."""
    path = file_of(folder, rank)
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        rows = {name: (int(start), int(stop)) for name, (start, stop) in found["rows"].items()}
        return Shard(path, rows, found["shapes"], found["steps"], found["size"], found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def read_rows(
    shards: list[Shard], trainables: Trainables, optimizer: torch.optim.Optimizer | None
) -> None:
    """Fill this rank's rows of every parameter and of AdamW's state, in place.

    The files may come from another number of ranks. Without an optimizer only the parameters.

    Raises:
        ValueError: names or shapes are not the ones of this model.
    """
    saved = shards[0].shapes
    wanted = {name: list(parameter.shape) for name, parameter in trainables.items()}
    if saved != wanted:
        names = sorted(n for n in {*saved, *wanted} if saved.get(n) != wanted.get(n))
        raise ValueError(
            f"checkpoint {shards[0].path.parent}: {', '.join(names[:5])} do not fit this model and "
            "these arguments; set other_parameters back, or give the run another ckpt_output_dir "
            "or run_id"
        )
    for name, parameter in trainables.items():
        _fill(shards, f"value/{name}", name, parameter)
        if optimizer is None:
            continue
        if name not in shards[0].steps:
            optimizer.state.pop(parameter, None)
            continue
        state: dict[str, Any] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        for moment in MOMENTS:
            _fill(shards, f"{moment}/{name}", name, state[moment])
        fused = bool(optimizer.param_groups[0].get("fused"))
        # The fused kernel counts its steps on the device, the plain loop on the CPU.
        place = _local(parameter).device if fused else torch.device("cpu")
        state["step"] = torch.tensor(shards[0].steps[name], dtype=torch.float32, device=place)
        optimizer.state[parameter] = state


def rows_of(parameter: Tensor) -> tuple[int, int]:
    """[start, stop) of dimension 0 that this rank holds: torch.chunk's rule, as FSDP2 shards."""
    count = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return 0, count
    mesh = parameter.device_mesh
    assert mesh.ndim == 1, "parameters are sharded over one dimension of ranks"
    chunk = -(-count // mesh.size())
    start = min(mesh.get_local_rank() * chunk, count)
    stop = min(start + chunk, count)
    assert stop - start == _local(parameter).shape[0], "rows are sharded by torch.chunk's rule"
    return start, stop


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fill(shards: list[Shard], key: str, name: str, target: Tensor) -> None:
    """Copy this rank's rows of one tensor out of the files that hold some of them."""
    start, stop = rows_of(target)
    local = _local(target)
    for shard in shards:
        first, last = shard.rows[name]
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        with safe_open(shard.path, framework="pt") as file:
            part = file.get_slice(key)[low - first : high - first]
        local[low - start : high - start].copy_(part)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
