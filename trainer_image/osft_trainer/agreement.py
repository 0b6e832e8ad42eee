"""What the ranks of a run decide together.

Lives here: the few collectives that are not about gradients: a flag, a barrier, work that the first
rank does for all. Called by `train`, `loop`, `checkpoint` and `worker`. With one rank nothing is
sent. Must never be called by some ranks only: the others would wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from osft_trainer.outcome import Superseded
from osft_trainer.parallel import World

_KINDS: tuple[type[Exception], ...] = (ValueError, Superseded, OSError)
"""Failures of the first rank that every rank raises; by index, which is what is sent."""


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank."""
    if world.size == 1:
        return flag
    sent = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return bool(sent.item())


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    any_rank(False, world)


def from_first_rank(world: World, action: Callable[[], str]) -> str:
    """Let the first rank act, give its text to all.

    Raises:
        ValueError, Superseded, OSError: on every rank, where the action raised it on the first.
    """
    if world.size == 1:
        return action()
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


def _send(kind: int, text: str, world: World) -> None:
    raw = text.encode()
    dist.broadcast(torch.tensor([kind, len(raw)], device=world.device), src=0)
    if raw:
        dist.broadcast(torch.tensor(list(raw), dtype=torch.uint8, device=world.device), src=0)


def _receive(world: World) -> str:
    head = torch.zeros(2, dtype=torch.int64, device=world.device)
    dist.broadcast(head, src=0)
    kind, length = (int(number) for number in head.tolist())
    raw = torch.zeros(length, dtype=torch.uint8, device=world.device)
    if length:
        dist.broadcast(raw, src=0)
    text = bytes(raw.tolist()).decode()
    if kind:
        raise _KINDS[kind - 1](text)
    return text
