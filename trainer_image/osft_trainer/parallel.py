"""Processes, devices and sharding.

What lives here: reading torchrun's environment, the process group, FSDP2 sharding of an
`OSFTModel`, gradient synchronisation and clipping by the global norm. Called by the training loop.
Must never: know what a projection is (`linear` does that on local rows), or start processes.

Sharding: every decoder block is one FSDP2 group, the rest is the root's. FSDP gathers the effective
weight, the trainable factors and the bases that a pass needs; W itself and the long kept bases
are row shards that are never gathered for forward. Gradients are summed over the ranks, so that
dividing each micro-batch's loss sum by the global token count gives the token mean.
A single process uses no process group at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from osft_trainer.exchange import local
from osft_trainer.linear import SubspaceWeight
from osft_trainer.model import OSFTModel
from osft_trainer.targets import decoder_blocks
from osft_trainer.topology import STORE_FILE_ENV

_UNGATHERED = ("base", "kept_rows", "kept_cols")
"""Buffers of `SubspaceWeight` that are sharded here instead of by FSDP."""


@dataclass(frozen=True)
class World:
    """This process's place among all."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def start_world(device: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> World:
    """Read RANK, LOCAL_RANK and WORLD_SIZE (absent: one process) and join the process group.

    Args:
        device: "cuda" or "cpu"; None takes CUDA (with NCCL) when there is one, else CPU (gloo).
        timeout: of every collective.

    Raises:
        ValueError: if CUDA is asked for and absent, or has fewer devices than local processes.
    """
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"nproc_per_node: local process {local_rank} has no GPU, this node shows {count}; "
                "start at most one process per GPU"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
    if size > 1:
        store = _store_of_lone_node(size)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=timeout,
            device_id=place if kind == "cuda" else None,
            **({} if store is None else {"store": store, "rank": rank, "world_size": size}),
        )
    return World(rank, local_rank, size, place)


def _store_of_lone_node(size: int) -> Any:
    """Where the ranks of a node that is alone meet; None where torchrun's variables say it."""
    path = os.environ.get(STORE_FILE_ENV)
    if path is None:
        return None
    # What an earlier start of the ranks has left there is not for this one.
    name = f"{path}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.FileStore(name, size)  # type: ignore[attr-defined]


def stop_world(world: World) -> None:
    """Leave the process group, if there is one."""
    if world.size > 1:
        dist.destroy_process_group()


def shard(model: OSFTModel, world: World) -> None:
    """Move the model to its device and split it over the ranks; before the optimizer is built.

    Every rank holds the same full model when this is called.
    """
    if world.size == 1:
        model.to(world.device)
        return
    split_over_ranks(model, world)


def split_over_ranks(model: OSFTModel, world: World) -> None:
    """The splitting alone, also of one rank; the process group is there."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    for _, subspace in model.subspaces():
        _shard_buffers(subspace, mesh)
    dtype = model.compute_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    _, blocks = decoder_blocks(model.hf)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Gloo has no other reduction, and the sum is what the loss is divided for.
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, world: World, enabled: bool) -> None:
    """Reduce gradients in the next backward or only accumulate them.

    Enabled on the last micro-batch of a step alone, gradients travel once per optimizer step.
    """
    if world.size > 1:
        assert isinstance(model, FSDPModule), "shard() comes first"
        model.set_requires_gradient_sync(enabled)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, world: World) -> float:
    """Scale gradients so that their norm over all ranks is at most `max_norm`.

    Returns the norm before clipping. When it is NaN or infinite nothing is scaled: the caller
    must not step.
    """
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    if gradients:
        # Together: on a GPU three operations for each of hundreds of gradients take milliseconds.
        total = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if world.size > 1:
        dist.all_reduce(total)
    norm = float(total.sqrt())
    if norm > max_norm and norm != float("inf"):
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def sum_over_ranks(value: float, world: World) -> float:
    """The sum of a number over all ranks, for example of loss-counted tokens."""
    if world.size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return float(total)


def _shard_buffers(subspace: SubspaceWeight, mesh: DeviceMesh) -> None:
    """Keep this rank's rows (experts) of the tensors that FSDP shall not gather."""
    rank, size = mesh.get_local_rank(), mesh.size()
    for name in _UNGATHERED:
        whole = getattr(subspace, name)
        if whole is None:
            continue
        # The same rule as FSDP2's dimension-0 shards; trailing ranks may hold nothing.
        chunks = whole.chunk(size, dim=0)
        rows = chunks[rank] if rank < len(chunks) else whole[:0]
        # A slice would keep the whole tensor alive.
        mine = rows.to(mesh.device_type, copy=True).contiguous()
        setattr(
            subspace,
            name,
            DTensor.from_local(
                mine,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=whole.shape,
                stride=whole.contiguous().stride(),
            ),
        )
