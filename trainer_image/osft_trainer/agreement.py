"""What the ranks of a run decide together.

Lives here: the few collectives that are not about gradients: a flag, a barrier, work that the first
rank does for all, a failure of one. Called by `train`, `loop`, `checkpoint`, `saving`,
`decomposition` and `worker`. With one rank nothing is sent. Must never be called by some ranks
only: the others would wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from osft_trainer.outcome import Superseded
from osft_trainer.parallel import World

_PATIENCE = timedelta(hours=12)
"""Long enough to tokenise any data. Not for ever: a node may vanish without closing connections."""

_KINDS: tuple[type[Exception], ...] = (ValueError, Superseded, OSError)
"""Failures of the first rank that every rank raises; by index, which is what is sent."""


def any_rank(flag: bool, world: World, patient: bool = False) -> bool:
    """Whether the flag is set on at least one rank.

    Args:
        flag: of this rank.
        world: this process's place.
        patient: wait for hours, not minutes: ranks come here after work of very unequal length.
    """
    if world.size == 1:
        return flag
    sent = torch.tensor([int(flag)], device=world.device)
    group = _patient(dist.group.WORLD) if patient else None
    dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=group)
    return bool(sent.item())


def any_rank_of_each(flags: Sequence[bool], world: World) -> list[bool]:
    """Several flags, each as `any_rank`, with one collective."""
    if world.size == 1:
        return list(flags)
    sent = torch.tensor([int(flag) for flag in flags], device=world.device)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in sent.tolist()]


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    any_rank(False, world)


def raise_together(failure: ValueError | OSError | None, world: World, elsewhere: str) -> None:
    """Fail on every rank if one has failed, as bad input if one has found that.

    Ranks come here after work of very unequal length, and wait for each other for hours.

    Args:
        failure: of this rank.
        world: this process's place.
        elsewhere: what a rank says that has not failed itself.
    """
    for kind in (ValueError, OSError):
        mine = failure if isinstance(failure, kind) else None
        if any_rank(mine is not None, world, patient=True):
            raise mine or kind(elsewhere)


def from_first_rank(world: World, action: Callable[[], str]) -> str:
    """Let the first rank act, give its text to all.

    Raises:
        ValueError, Superseded, OSError: on every rank, where the action raised it on the first.
    """
    if world.size == 1:
        return action()
    _patient(dist.group.WORLD)  # made before the action: making it has the world's short timeout
    if world.rank != 0:
        return _receive(world)
    try:
        text = action()
    except _KINDS as error:
        kind = next(i for i, kind in enumerate(_KINDS) if isinstance(error, kind))
        _send(1 + kind, str(error), world)
        raise
    _send(0, text, world)
    return text


@functools.cache
def _patient(of: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """All ranks, as a group whose collectives wait for hours instead of minutes.

    The first rank may tokenise for an hour while the others wait.
    """
    assert of is not None, "start_world() comes first"
    group: dist.ProcessGroup = dist.new_group(timeout=_PATIENCE)
    return group


def _send(kind: int, text: str, world: World) -> None:
    raw = text.encode()
    _broadcast(torch.tensor([kind, len(raw)], device=world.device))
    if raw:
        _broadcast(torch.tensor(list(raw), dtype=torch.uint8, device=world.device))


def _receive(world: World) -> str:
    kind, length = _broadcast(torch.zeros(2, dtype=torch.int64, device=world.device)).tolist()
    raw = torch.zeros(length, dtype=torch.uint8, device=world.device)
    text = bytes(_broadcast(raw).tolist()).decode() if length else ""
    if kind:
        raise _KINDS[kind - 1](text)
    return text


def _broadcast(tensor: Tensor) -> Tensor:
    """The first rank's values, put into the tensor of every rank."""
    dist.broadcast(tensor, src=0, group=_patient(dist.group.WORLD))
    return tensor
