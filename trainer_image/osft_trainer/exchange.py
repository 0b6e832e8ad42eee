"""Many small tensors in one collective.

Lives here: gathering the rows of several sharded tensors at once, adding several tensors up over
the ranks at once, and cutting a list of work into pieces that such an exchange may hold. Called by
`linear` and `projection`. Must never: know what the tensors mean, or start a process group.

On small models the time of a step is the number of collectives, not their size. Plain tensors (one
process) pass through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_Item = TypeVar("_Item")

CHUNK_BYTES = 64 * 2**20
"""Most that an exchange holds, unless a single target needs more: it costs memory for a moment."""


def local(part: Tensor) -> Tensor:
    """This rank's rows, sharing memory; the tensor itself where it is not sharded."""
    return part.to_local() if isinstance(part, DTensor) else part


def full(part: Tensor) -> Tensor:
    """All rows. Collective when sharded."""
    return part.full_tensor() if isinstance(part, DTensor) else part


def full_all(parts: Sequence[Tensor]) -> list[Tensor]:
    """All rows of each, with one collective for each dtype. Parts are sharded on dimension 0.

    A part that is there several times travels once.
    """
    found = list(parts)
    by_dtype: dict[torch.dtype, list[int]] = {}
    first: dict[int, int] = {}
    for position, part in enumerate(parts):
        if isinstance(part, DTensor) and first.setdefault(id(part), position) == position:
            by_dtype.setdefault(part.dtype, []).append(position)
    for positions in by_dtype.values():
        gathered = _gather([part for i in positions if isinstance(part := parts[i], DTensor)])
        for position, whole in zip(positions, gathered, strict=True):
            found[position] = whole
    for position, part in enumerate(parts):
        if isinstance(part, DTensor):
            found[position] = found[first[id(part)]]
    return found


def sum_all(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The sums over the ranks of tensors of one dtype, with one collective."""
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    pieces = torch.split(flat, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def in_chunks(items: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Runs of items whose sizes in bytes add up to `CHUNK_BYTES` at most; one may exceed it."""
    chunk: list[_Item] = []
    held = 0
    for item in items:
        needed = size(item)
        if chunk and held + needed > CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
        chunk.append(item)
        held += needed
    if chunk:
        yield chunk


def _gather(parts: Sequence[DTensor]) -> list[Tensor]:
    """Shards are the chunks of dimension 0: the last ranks may hold fewer rows, or none."""
    mesh = parts[0].device_mesh
    heights = [-(-part.shape[0] // mesh.size()) for part in parts]
    lengths = [h * part.shape[1:].numel() for h, part in zip(heights, parts, strict=True)]
    mine = parts[0].to_local().new_zeros(sum(lengths))
    for place, part in zip(torch.split(mine, lengths), parts, strict=True):
        rows = part.to_local().flatten()
        place[: rows.numel()] = rows
    table = mine.new_empty(mesh.size(), mine.numel())
    dist.all_gather(list(table), mine, group=mesh.get_group())
    columns = torch.split(table, lengths, dim=1)
    return [
        column.reshape(mesh.size() * height, *part.shape[1:])[: part.shape[0]]
        for column, height, part in zip(columns, heights, parts, strict=True)
    ]
