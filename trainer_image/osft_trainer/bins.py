"""Which samples share a forward pass: bins of numbers, one for each rank and round.

Lives here: the plans of `packing`, as pure functions of lengths, so that every rank computes the
same one without talking. Called by `packing` and `planning`. Must never: read a sample, leave one
out, or let a pass hold more tokens than the limit, padding included.
"""

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from osft_trainer.layout import Layout

Plan = list[list[list[int]]]
"""Rounds of bins of sample positions."""

END_TO_END = Layout()
"""Of models that take any samples in one row."""


def pack(
    lengths: Sequence[int] | npt.NDArray[np.int64],
    world_size: int,
    max_tokens_per_gpu: int,
    layout: Layout = END_TO_END,
) -> Plan:
    """Rounds of one bin per rank; a bin lists positions in `lengths`. Every position comes once.

    A round lasts as long as its fullest bin, so the others wait. Of three plans the one that lasts
    shortest is taken, then the one with fewer rounds: all bins about equally full (best when there
    is plenty), full rounds first and what is left spread evenly (best when one long sample would
    tower over even bins), or longest-processing-time as mini_trainer has it. A rank may get an
    empty bin. Deterministic. Where the model's layout does not take all of these samples end to
    end, neighbours in length share a bin.

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
    if not layout.takes_all(sizes):
        return _neighbours(longest_first, sizes, world_size, max_tokens_per_gpu, layout)

    def cost(plan: Plan) -> tuple[int, int]:
        return sum(max(sum(sizes[p] for p in members) for members in r) for r in plan), len(plan)

    plans = (
        make(longest_first, sizes, world_size, max_tokens_per_gpu)
        for make in (_even_rounds, _full_rounds, lpt_rounds)
    )
    return min(plans, key=cost)


def _neighbours(
    longest_first: Sequence[int],
    sizes: Sequence[int],
    world_size: int,
    capacity: int,
    layout: Layout,
) -> Plan:
    """Cut the samples, longest first, into bins: as few rounds as may be, then as even as may be.

    Filling each bin as far as it goes gives the fewest of a capacity, and no more of a larger one,
    so the least capacity that makes do with these rounds is found by halving.
    """
    bins = _cut(longest_first, sizes, capacity, layout)
    rounds = -(-len(bins) // world_size)
    fails, fits = max(sizes) - 1, capacity
    while fits - fails > 1:
        middle = (fits + fails) // 2
        smaller = _cut(longest_first, sizes, middle, layout)
        if len(smaller) <= rounds * world_size:
            fits, bins = middle, smaller
        else:
            fails = middle

    def cost(members: Sequence[int]) -> int:
        lengths = [sizes[position] for position in members]
        return layout.tokens(len(lengths), sum(lengths), max(lengths, default=0))

    bins.sort(key=cost, reverse=True)
    bins += [[] for _ in range(rounds * world_size - len(bins))]
    return [bins[start : start + world_size] for start in range(0, len(bins), world_size)]


def _cut(
    longest_first: Sequence[int], sizes: Sequence[int], capacity: int, layout: Layout
) -> list[list[int]]:
    """Bins of neighbours in length that may share a pass, each as full as it gets."""
    bins: list[list[int]] = []
    longest = total = 0
    for position in longest_first:
        size = sizes[position]
        fits = bins and layout.tokens(len(bins[-1]) + 1, total + size, longest) <= capacity
        if fits and layout.may_share(longest, size):
            bins[-1].append(position)
            total += size
        else:
            bins.append([position])
            longest = total = size
    return bins


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
