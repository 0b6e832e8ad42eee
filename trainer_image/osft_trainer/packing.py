"""From prepared samples to the micro-batches of each optimizer step, in an order that can resume.

Lives here: the samples of a global batch, their packing into one bin per
rank and round, and the tensors of a bin. Called by the training loop. Everything but the reading
of samples is a pure function of numbers, so every rank computes the same plan without talking.
Must never: depend on the world size for what a step learns from, put two samples into one
attention span or predict one sample's first token from another, or drop a sample.
"""

import bisect
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
    """Spread everything over the bins of all rounds; bins of like fullness share a round.

    As few rounds as spreading can do with. What fits into some bins fits into more of them, so the
    number is found by halving.
    """
    alone = sum(2 * size > capacity for size in sizes)  # no two of these share a bin
    least = max(-(-sum(sizes) // capacity), alone, 1)
    fits = -(-least // world_size)
    fails, step = fits - 1, 1
    while (bins := _spread(longest_first, sizes, fits * world_size, capacity)) is None:
        fails, fits, step = fits, fits + step, 2 * step  # ends: a bin for each sample is enough
    while fits - fails > 1:
        middle = (fits + fails) // 2
        fewer = _spread(longest_first, sizes, middle * world_size, capacity)
        if fewer is None:
            fails = middle
        else:
            fits, bins = middle, fewer
    bins.sort(key=lambda members: -sum(sizes[position] for position in members))
    return [bins[start : start + world_size] for start in range(0, len(bins), world_size)]


def _full_rounds(
    longest_first: Sequence[int], sizes: Sequence[int], world_size: int, capacity: int
) -> Plan:
    """Fill round after round as far as it goes, until the rest can be spread over one."""
    plan: Plan = []
    left = _Left(longest_first, sizes)
    while len(left):
        if left.tokens <= world_size * capacity:
            last = _spread(left.all(), sizes, world_size, capacity)
            if last is not None:
                return [*plan, last]
        bins: list[list[int]] = [[] for _ in range(world_size)]
        room = [capacity] * world_size
        place = 0
        # The longest that fits somewhere goes where the least room is left. One that fits nowhere
        # does not fit later either: room only shrinks.
        while (place := left.first(place, max(room))) < len(longest_first):
            size = sizes[longest_first[place]]
            fullest = min((r, n) for n, r in enumerate(room) if r >= size)[1]
            bins[fullest].append(left.take(place))
            room[fullest] -= size
        plan.append(bins)
    return plan


class _Left:
    """Samples from the longest to the shortest, some of them taken already."""

    def __init__(self, longest_first: Sequence[int], sizes: Sequence[int]) -> None:
        self._positions = longest_first
        self._sizes = sizes
        self._negated = [-sizes[position] for position in longest_first]
        self._next = list(range(len(longest_first) + 1))
        """A place that is left, or one between this and the next that is."""
        self._count = len(longest_first)
        self.tokens = sum(sizes)

    def __len__(self) -> int:
        """Number of samples that are left."""
        return self._count

    def first(self, place: int, longest: int) -> int:
        """Place of the longest from `place` on that is left and no longer than this; or the end."""
        return self._at_or_behind(bisect.bisect_left(self._negated, -longest, lo=place))

    def take(self, place: int) -> int:
        """Take the sample at a place."""
        self._next[place] = place + 1
        position = self._positions[place]
        self._count -= 1
        self.tokens -= self._sizes[position]
        return position

    def all(self) -> list[int]:
        """Whatever is left."""
        return [position for at, position in enumerate(self._positions) if self._next[at] == at]

    def _at_or_behind(self, place: int) -> int:
        while (after := self._next[place]) != place:
            # Halves the way for the next one, so that no stretch is walked again and again.
            self._next[place] = self._next[after]
            place = after
        return place


def lpt_rounds(
    longest_first: Sequence[int], sizes: Sequence[int], world_size: int, capacity: int
) -> Plan:
    """Round after round, as many of the longest that are left as can be spread over it."""
    plan: Plan = []
    emptiest: list[tuple[int, int]] = []
    for position in longest_first:
        size = sizes[position]
        if not emptiest or emptiest[0][0] + size > capacity:
            plan.append([[] for _ in range(world_size)])
            emptiest = [(0, number) for number in range(world_size)]
        load, number = emptiest[0]
        plan[-1][number].append(position)
        heapq.heapreplace(emptiest, (load + size, number))
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
