"""From prepared samples to the micro-batches of each optimizer step, in an order that can resume.

Lives here: the samples of a global batch, their packing into one bin per
rank and round, and the tensors of a bin. Called by the training loop. Everything but the reading
of samples is a pure function of numbers, so every rank computes the same plan without talking.
Must never: depend on the world size for what a step learns from, put two samples into one
attention span or predict one sample's first token from another, or drop a sample.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from osft_trainer.order import epoch_order
from osft_trainer.prepared import NO_LOSS, PreparedData, Samples
from osft_trainer.replay import Replay

IDLE_TOKENS = 2
"""Length of the stand-in for an empty bin: the shortest that still has a next token."""


Plan = list[list[list[int]]]
"""Rounds of bins of sample positions."""

_TENSORS = ("input_ids", "labels", "position_ids", "places")
"""What of a micro-batch goes to the device."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: samples laid end to end, without padding.

    input_ids, labels and position_ids are int64 [1, T]. position_ids restart at 0 with every
    sample; the model must take the borders of attention from them or from `lengths` (which sum to
    T). labels are unshifted, -100 where there is no loss and at every sample's first token, so
    that the usual shift by one crosses no border. places are the positions in the row whose next
    token counts, int64 [loss_tokens]: counted here, so that no device is waited for to learn them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor
    lengths: tuple[int, ...]
    loss_tokens: int
    is_dummy: bool = False
    """No sample was left for this rank: run it for the collectives, it adds nothing."""

    def pinned(self) -> "MicroBatch":
        """The same in memory that the current CUDA device copies from on its own."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What a model takes, on this device; from pinned memory nobody waits for the copies."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return {**tensors, "lengths": self.lengths}


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step. `samples`, `tokens` and `loss_tokens` count all ranks together.

    `micro_batches` are this rank's; every rank has the same number. The next batch's position is
    (epoch, index + 1), also after the epoch's last one.
    """

    epoch: int
    index: int
    micro_batches: tuple[MicroBatch, ...]
    samples: int
    tokens: int
    loss_tokens: int
    is_last: bool
    """Whether it ends the epoch."""
    replayed: int = 0
    """Samples of the old skills' text, beside `samples` of the data; their tokens count, too."""

    def pinned(self) -> "GlobalBatch":
        """The same, with every micro-batch in pinned memory."""
        return replace(self, micro_batches=tuple(m.pinned() for m in self.micro_batches))


def batches_per_epoch(num_samples: int, effective_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last may have fewer samples."""
    return -(-num_samples // effective_batch_size)


def pack(
    lengths: Sequence[int] | npt.NDArray[np.int64], world_size: int, max_tokens_per_gpu: int
) -> Plan:
    """Rounds of one bin per rank; a bin lists positions in `lengths`. Every position comes once.

    A round lasts as long as its fullest bin, so the others wait. Of three plans the one that lasts
    shortest is taken, then the one with fewer rounds: all bins about equally full (best when there
    is plenty), full rounds first and what is left spread evenly (best when one long sample would
    tower over even bins), or longest-processing-time as mini_trainer has it. A rank may get an
    empty bin. Deterministic.

    Raises:
        ValueError: a sample is longer than max_tokens_per_gpu.
    """
    sizes = [int(length) for length in lengths]
    if not sizes:
        return []
    if max(sizes) > max_tokens_per_gpu:
        raise ValueError(
            f"a sample has {max(sizes)} tokens, more than max_tokens_per_gpu {max_tokens_per_gpu}: "
            "raise max_tokens_per_gpu or lower max_seq_len"
        )
    longest_first = sorted(range(len(sizes)), key=lambda position: (-sizes[position], position))

    def cost(plan: Plan) -> tuple[int, int]:
        return sum(max(sum(sizes[p] for p in members) for members in r) for r in plan), len(plan)

    plans = (
        make(longest_first, sizes, world_size, max_tokens_per_gpu)
        for make in (_even_rounds, _full_rounds, lpt_rounds)
    )
    return min(plans, key=cost)


def _even_rounds(
    longest_first: Sequence[int], sizes: Sequence[int], world_size: int, capacity: int
) -> Plan:
    """Spread everything over the bins of all rounds; bins of like fullness share a round."""
    rounds = max(1, -(-sum(sizes) // (world_size * capacity)))
    while (bins := _spread(longest_first, sizes, rounds * world_size, capacity)) is None:
        rounds += 1  # ends: with one bin for each sample everything fits
    bins.sort(key=lambda members: -sum(sizes[position] for position in members))
    return [bins[start : start + world_size] for start in range(0, len(bins), world_size)]


def _full_rounds(
    longest_first: Sequence[int], sizes: Sequence[int], world_size: int, capacity: int
) -> Plan:
    """Fill round after round as far as it goes, until the rest can be spread over one."""
    plan: Plan = []
    rest = longest_first
    while rest:
        last = _spread(rest, sizes, world_size, capacity)
        if last is not None:
            return [*plan, last]
        bins: list[list[int]] = [[] for _ in range(world_size)]
        room = [capacity] * world_size
        left: list[int] = []
        for position in rest:
            fitting = [n for n in range(world_size) if room[n] >= sizes[position]]
            if not fitting:
                left.append(position)
                continue
            fullest = min(fitting, key=room.__getitem__)
            bins[fullest].append(position)
            room[fullest] -= sizes[position]
        plan.append(bins)
        rest = left
    return plan


def lpt_rounds(
    longest_first: Sequence[int], sizes: Sequence[int], world_size: int, capacity: int
) -> Plan:
    """Round after round, as many of the longest that are left as can be spread over it."""
    plan: Plan = []
    rest = longest_first
    while rest:
        fits, too_many = 1, len(rest) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if _spread(rest[:middle], sizes, world_size, capacity) is None:
                too_many = middle
            else:
                fits = middle
        bins = _spread(rest[:fits], sizes, world_size, capacity)
        assert bins is not None, "one sample fits into an empty bin"
        plan.append(bins)
        rest = rest[fits:]
    return plan


def _spread(
    longest_first: Sequence[int], sizes: Sequence[int], count: int, capacity: int
) -> list[list[int]] | None:
    """Longest sample first, to the emptiest of `count` bins; None when one would overflow."""
    bins: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for position in longest_first:
        load, number = emptiest[0]
        if load + sizes[position] > capacity:
            return None
        bins[number].append(position)
        heapq.heapreplace(emptiest, (load + sizes[position], number))
    return bins


def collate(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad_token_id: int = 0
) -> MicroBatch:
    """Lay (input_ids, labels) pairs, both int64 [length], end to end; none gives the stand-in."""
    if not samples:
        idle = torch.full((1, IDLE_TOKENS), pad_token_id, dtype=torch.int64)
        return MicroBatch(
            input_ids=idle,
            labels=torch.full_like(idle, NO_LOSS),
            position_ids=torch.arange(IDLE_TOKENS).unsqueeze(0),
            places=torch.zeros(0, dtype=torch.int64),
            lengths=(IDLE_TOKENS,),
            loss_tokens=0,
            is_dummy=True,
        )
    lengths = tuple(len(ids) for ids, _ in samples)
    labels = torch.cat([labels for _, labels in samples])
    starts = torch.tensor((0, *lengths[:-1])).cumsum(0)
    labels[starts] = NO_LOSS  # torch.cat has copied, the samples stay as they are
    places = (labels[1:] != NO_LOSS).nonzero()[:, 0]
    positions = torch.arange(len(labels)) - starts.repeat_interleave(torch.tensor(lengths))
    return MicroBatch(
        input_ids=torch.cat([ids for ids, _ in samples]).unsqueeze(0),
        labels=labels.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        places=places,
        lengths=lengths,
        loss_tokens=len(places),
    )


class _Members:
    """The samples of one global batch, from one source after the other."""

    def __init__(self, sources: Sequence[tuple[Samples, npt.NDArray[np.int64]]]) -> None:
        self._places = [(data, int(index)) for data, indices in sources for index in indices]
        self.lengths = np.concatenate([data.lengths[indices] for data, indices in sources])
        self.loss_tokens = sum(int(data.loss_counts[indices].sum()) for data, indices in sources)

    def pieces(self, at: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The sample at this position, as `PreparedData.pieces`."""
        data, index = self._places[at]
        return data.pieces(index)


def batches(
    prepared: PreparedData,
    *,
    effective_batch_size: int,
    max_tokens_per_gpu: int,
    rank: int,
    world_size: int,
    seed: int,
    start_epoch: int = 0,
    start_batch: int = 0,
    pad_token_id: int = 0,
    replay: Replay | None = None,
) -> Iterator[GlobalBatch]:
    """Global batches from (start_epoch, start_batch) on, epoch after epoch, without end.

    start_batch may be the number of batches in an epoch: the next epoch follows. Only the samples
    of this rank are read. What `replay` adds comes on top of effective_batch_size, so that steps
    and epochs are those of the data.

    Raises:
        ValueError: start_batch lies beyond the epoch (the data or the batch size has changed).
    """
    assert 0 <= rank < world_size
    per_epoch = batches_per_epoch(len(prepared), effective_batch_size)
    if not 0 <= start_batch <= per_epoch:
        raise ValueError(
            f"batch {start_batch} does not exist in an epoch of {per_epoch}: the data or "
            "effective_batch_size is not the one of the saved run"
        )
    epoch, index = start_epoch, start_batch
    while True:
        order = epoch_order(len(prepared), seed, epoch)
        for batch in range(index, per_epoch):
            first = batch * effective_batch_size
            members = order[first : first + effective_batch_size]
            batch_of = _Members([(prepared, members)])
            if replay is not None:
                before = epoch * len(prepared) + first
                again = replay.between(before, before + len(members))
                batch_of = _Members([(prepared, members), (replay.part, again)])
            rounds = pack(batch_of.lengths, world_size, max_tokens_per_gpu)
            yield GlobalBatch(
                epoch=epoch,
                index=batch,
                micro_batches=tuple(
                    collate(
                        [piece for at in bins[rank] for piece in batch_of.pieces(at)],
                        pad_token_id=pad_token_id,
                    )
                    for bins in rounds
                ),
                samples=len(members),
                tokens=int(batch_of.lengths.sum()),
                loss_tokens=batch_of.loss_tokens,
                is_last=batch == per_epoch - 1,
                replayed=len(batch_of.lengths) - len(members),
            )
        epoch, index = epoch + 1, 0
