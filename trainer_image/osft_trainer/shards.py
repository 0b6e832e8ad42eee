"""The rows of the training state that one rank holds, in one safetensors file.

Lives here: which rows a rank has, copying them to host memory with AdamW's state, writing such a
copy, and reading any rows back from the files of any number of ranks. Called by `saving` (copying;
writing on a thread of its own) and `checkpoint` (reading). Must never: use pickle, gather a whole
parameter, or hold the interpreter while bytes travel: the training goes on beside the writing.

A file holds, for each trained parameter, `value/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`: this
rank's rows (dimension 0, as FSDP2 shards) in float32; a second moment that is shared over the rows
is whole in every file. Beside it lies a JSON file with the row
ranges, AdamW's step counts and the file's size and sha256, by which a torn file is recognised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osft_trainer.durable import sync
from osft_trainer.moments import SharedMoment, fresh_state, shared_of

Trainables = Mapping[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, beside its step count."""

_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
"""Names in safetensors of the types that trainables have."""

_PIECE_BYTES = 16 * 2**20
"""Hashed and written at once: what the hash has read is still in the processor's cache."""


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
        """Whether the file is the one that was written, byte for byte.

        Raises:
            OSError: it cannot be read now, which says nothing about what is in it.
        """
        try:
            return self.path.stat().st_size == self.size and _sha256(self.path) == self.sha256
        except FileNotFoundError:
            return False


def file_of(folder: Path, rank: int) -> Path:
    """Where a rank's rows lie."""
    return folder / f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Rows:
    """A copy in host memory of the rows that one rank holds, taken between two steps."""

    tensors: dict[str, Tensor]
    """As the file holds them."""
    rows: dict[str, tuple[int, int]]
    shapes: dict[str, list[int]]
    steps: dict[str, float]


class HostCopy:
    """Takes such copies, always into the same memory: fresh pages cost more than copying does."""

    def __init__(self) -> None:
        """Nothing is reserved before the first copy."""
        self._memory: dict[str, Tensor] = {}

    def take(self, trainables: Trainables, optimizer: torch.optim.Optimizer) -> Rows:
        """Copy this rank's rows now. What the last call returned is overwritten."""
        counts: dict[str, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        for name, parameter in trainables.items():
            state = optimizer.state.get(parameter, {})
            tensors[f"value/{name}"] = self._copy(f"value/{name}", parameter)
            for moment in MOMENTS if state else ():
                tensors[f"{moment}/{name}"] = self._copy(f"{moment}/{name}", state[moment])
            if state:
                counts[name] = state["step"]
        if any(parameter.device.type == "cuda" for parameter in trainables.values()):
            torch.cuda.current_stream().synchronize()
        return Rows(
            tensors,
            {name: rows_of(parameter) for name, parameter in trainables.items()},
            {name: list(parameter.shape) for name, parameter in trainables.items()},
            _numbers(counts),
        )

    def _copy(self, key: str, source: Tensor) -> Tensor:
        found = _local(source).detach()
        memory = self._memory.get(key)
        if memory is None:
            # Pinned memory is what a device copies into at full speed.
            pinned = found.device.type == "cuda"
            memory = torch.empty(found.shape, dtype=found.dtype, pin_memory=pinned)
            self._memory[key] = memory
        return memory.copy_(found, non_blocking=True)


def _numbers(counts: dict[str, Tensor]) -> dict[str, float]:
    """The counts as numbers; with one transfer, as on a device each would be waited for."""
    on_device = {name: count for name, count in counts.items() if count.device.type != "cpu"}
    moved = torch.stack(list(on_device.values())).tolist() if on_device else []
    found = dict(zip(on_device, moved, strict=True))
    return {name: found[name] if name in found else float(counts[name]) for name in counts}


def write_rows(folder: Path, rank: int, copied: Rows) -> None:
    """Write a copy and its description, and force both to disk."""
    path = file_of(folder, rank)
    sha256 = write_tensors(path, copied.tensors)
    sync(path)
    description = {
        "rows": copied.rows,
        "shapes": copied.shapes,
        "steps": copied.steps,
        "size": path.stat().st_size,
        "sha256": sha256,
    }
    path.with_suffix(".json").write_text(json.dumps(description), encoding="utf-8")
    sync(path.with_suffix(".json"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file piece by piece; its sha256 is worked out on the way.

    The package's own `save_file` copies everything once more and holds the interpreter meanwhile.
    """
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for raw in [head, *map(_bytes_of, tensors.values())]:
            for at in range(0, len(raw), _PIECE_BYTES):
                sha256.update(raw[at : at + _PIECE_BYTES])
                file.write(raw[at : at + _PIECE_BYTES])
    return sha256.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, not a copy."""
    return tensor.numpy().reshape(-1).view(np.uint8).data


def open_shard(folder: Path, rank: int) -> Shard | None:
    """A rank's file; None when its description is missing or damaged.

    Raises:
        OSError: the description cannot be read now.
    """
    path = file_of(folder, rank)
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        rows = {name: (int(start), int(stop)) for name, (start, stop) in found["rows"].items()}
        return Shard(path, rows, found["shapes"], found["steps"], found["size"], found["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


@torch.no_grad()
def read_rows(
    shards: list[Shard],
    trainables: Trainables,
    optimizer: torch.optim.Optimizer | None,
    is_elementwise: bool = False,
) -> None:
    """Fill this rank's rows of every parameter and of AdamW's state, in place.

    The files may come from another number of ranks. Without an optimizer only the parameters.

    Args:
        shards: the files of all ranks that wrote the state.
        trainables: parameters by name.
        optimizer: whose state is filled.
        is_elementwise: an earlier version wrote a second moment for each number of each parameter;
            those that are shared now become their mean.

    Raises:
        ValueError: names or shapes are not the ones of this model.
    """
    _check_shapes(shards[0], trainables)
    for name, parameter in trainables.items():
        rows = rows_of(parameter)
        _fill(shards, f"value/{name}", name, rows, _local(parameter))
        if optimizer is None:
            continue
        if name not in shards[0].steps:
            optimizer.state.pop(parameter, None)
            continue
        state = fresh_state(optimizer, parameter)
        state["step"].fill_(shards[0].steps[name])
        _fill(shards, f"exp_avg/{name}", name, rows, _local(state["exp_avg"]))
        key, second = f"exp_avg_sq/{name}", _local(state["exp_avg_sq"])
        shared = shared_of(optimizer, parameter)
        if shared is not None and is_elementwise:
            _fill_mean(shards, key, name, rows, second, shared)
        elif shared is not None and shared.crosses_ranks(parameter):
            with safe_open(shards[0].path, framework="pt") as file:
                second.copy_(file.get_tensor(key))
        else:
            _fill(shards, key, name, rows, second)
        optimizer.state[parameter] = state


def _check_shapes(shard: Shard, trainables: Trainables) -> None:
    saved = shard.shapes
    wanted = {name: list(parameter.shape) for name, parameter in trainables.items()}
    if saved != wanted:
        names = sorted(n for n in {*saved, *wanted} if saved.get(n) != wanted.get(n))
        raise ValueError(
            f"checkpoint {shard.path.parent}: {', '.join(names[:5])} do not fit this model and "
            "these arguments; set other_parameters back, or give the run another ckpt_output_dir "
            "or run_id"
        )


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


def _fill(shards: list[Shard], key: str, name: str, rows: tuple[int, int], local: Tensor) -> None:
    """Copy these rows of one tensor out of the files that hold some of them."""
    for at, part in _parts(shards, key, name, rows):
        local[at - rows[0] : at - rows[0] + len(part)].copy_(part)


def _fill_mean(
    shards: list[Shard],
    key: str,
    name: str,
    rows: tuple[int, int],
    local: Tensor,
    shared: SharedMoment,
) -> None:
    """What is shared, of a second moment that was kept for each number."""
    crosses_rows = len(shards[0].shapes[name]) + shared.axis == 0
    wanted = (0, shards[0].shapes[name][0]) if crosses_rows else rows
    for at, part in _parts(shards, key, name, wanted):
        sums = part.to(local).sum(shared.axis, keepdim=True) / shared.free
        if crosses_rows:
            local.add_(sums)
        else:
            local[at - rows[0] : at - rows[0] + len(part)].copy_(sums)


def _parts(
    shards: list[Shard], key: str, name: str, rows: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """These rows of one tensor, piece by piece, each with the number of its first row."""
    start, stop = rows
    for shard in shards:
        first, last = shard.rows[name]
        low, high = max(start, first), min(stop, last)
        if low < high:
            with safe_open(shard.path, framework="pt") as file:
                yield low, file.get_slice(key)[low - first : high - first]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
