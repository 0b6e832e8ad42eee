"""Order, packing and collation: nothing lost, nothing twice, the same steps on any world size."""

import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import examples
from osft_trainer.bins import _even_rounds, _spread, lpt_rounds, pack
from osft_trainer.order import epoch_order
from osft_trainer.packing import GlobalBatch, batches, batches_per_epoch, collate
from osft_trainer.prepared import PreparedData
from packed_data import make_data, members, samples_of

ORDER_OF_TEN = [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
"""Pinned: another order would break the resume of every saved run."""
ANY_SAMPLES_RANKS_AND_CAPACITY = given(
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(100, 300),
)
"""Lengths of samples, ranks, and tokens of a bin that holds any one of the samples."""


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    lengths = np.random.default_rng(0).integers(2, 40, size=53).tolist()
    return make_data(tmp_path / "prepared", lengths)


def run(
    data: PreparedData, world_size: int, count: int, *, start: tuple[int, int] = (0, 0)
) -> list[list[GlobalBatch]]:
    """The first `count` batches of every rank."""
    return [
        list(
            islice(
                batches(
                    data,
                    effective_batch_size=8,
                    max_tokens_per_gpu=64,
                    rank=rank,
                    world_size=world_size,
                    seed=7,
                    start_epoch=start[0],
                    start_batch=start[1],
                ),
                count,
            )
        )
        for rank in range(world_size)
    ]


def test_order_is_a_stable_permutation() -> None:
    assert epoch_order(10, 42, 0).tolist() == ORDER_OF_TEN
    assert sorted(epoch_order(1000, 3, 5).tolist()) == list(range(1000))
    assert epoch_order(100, 1, 0).tolist() != epoch_order(100, 1, 1).tolist()
    assert epoch_order(100, 1, 0).tolist() != epoch_order(100, 2, 0).tolist()
    assert epoch_order(100, 1, 2).tolist() != epoch_order(100, 2, 1).tolist()


def test_every_first_place_is_as_likely() -> None:
    firsts = np.bincount([epoch_order(5, 0, epoch)[0] for epoch in range(2000)], minlength=5)
    assert firsts.min() > 320  # 400 expected, standard deviation 18


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_comes_once_per_epoch(data: PreparedData, world_size: int) -> None:
    steps = batches_per_epoch(len(data), 8)
    assert steps == 7
    ranks = run(data, world_size, 2 * steps)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            seen += members([rank[step] for rank in ranks])
        assert sorted(seen) == list(range(len(data)))


def test_steps_do_not_depend_on_the_world_size(data: PreparedData) -> None:
    alone, two, three = (run(data, size, 10) for size in (1, 2, 3))
    for step in range(10):
        (one,) = [rank[step] for rank in alone]
        for ranks in (two, three):
            parts = [rank[step] for rank in ranks]
            assert members(parts) == members([one])
            assert len({len(part.micro_batches) for part in parts}) == 1
            for part in parts:
                assert (part.epoch, part.index, part.is_last) == (one.epoch, one.index, one.is_last)
                assert (part.samples, part.tokens) == (one.samples, one.tokens)
                assert part.loss_tokens == one.loss_tokens
            local = sum(micro.loss_tokens for part in parts for micro in part.micro_batches)
            assert local == one.loss_tokens


def test_positions_and_last_batch(data: PreparedData) -> None:
    (rank,) = run(data, 1, 8)
    assert [(b.epoch, b.index) for b in rank] == [*((0, i) for i in range(7)), (1, 0)]
    assert [b.is_last for b in rank] == [False] * 6 + [True, False]
    assert [b.samples for b in rank] == [8] * 6 + [5, 8]


@pytest.mark.parametrize("start", [(0, 3), (0, 6), (0, 7), (1, 0), (1, 5)])
def test_start_in_the_middle_equals_the_tail(data: PreparedData, start: tuple[int, int]) -> None:
    whole = run(data, 2, 20)
    skipped = start[0] * 7 + start[1]
    tail = run(data, 2, 20 - skipped, start=start)
    for full, part in zip(whole, tail, strict=True):
        for expected, found in zip(full[skipped:], part, strict=True):
            assert (expected.epoch, expected.index) == (found.epoch, found.index)
            for a, b in zip(expected.micro_batches, found.micro_batches, strict=True):
                assert torch.equal(a.input_ids, b.input_ids)
                assert torch.equal(a.labels, b.labels)
                assert torch.equal(a.position_ids, b.position_ids)


def test_position_beyond_the_epoch_is_refused(data: PreparedData) -> None:
    with pytest.raises(ValueError, match="batch 8 does not exist in an epoch of 7"):
        run(data, 1, 1, start=(0, 8))


def test_only_the_ranks_own_samples_are_read(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    sample = data.sample
    monkeypatch.setattr(data, "sample", lambda i: read.append(i) or sample(i))
    (first, *_) = run(data, 3, 1)
    own = [s for micro in first[0].micro_batches for s in samples_of(micro)]
    assert read[: len(own)] == own
    assert len(read) == 8  # three ranks together: the batch, once


@settings(deadline=None, max_examples=examples(300))
@given(
    lengths=st.lists(st.integers(1, 100), max_size=80),
    world_size=st.integers(1, 9),
    capacity=st.integers(100, 400),
)
def test_packing_keeps_its_promises(lengths: list[int], world_size: int, capacity: int) -> None:
    rounds = pack(lengths, world_size, capacity)
    assert all(len(bins) == world_size for bins in rounds)
    placed = sorted(p for bins in rounds for members in bins for p in members)
    assert placed == list(range(len(lengths)))
    loads = [[sum(lengths[p] for p in members) for members in bins] for bins in rounds]
    assert all(load <= capacity for bins in loads for load in bins)
    assert all(any(bins) for bins in loads)
    assert pack(np.array(lengths, dtype=np.int64), world_size, capacity) == rounds


@settings(max_examples=examples(200), deadline=None)
@ANY_SAMPLES_RANKS_AND_CAPACITY
def test_even_rounds_are_as_few_as_spreading_allows(
    lengths: list[int], world_size: int, capacity: int
) -> None:
    """The number is found by halving, which wants that what fits goes on to fit into more bins."""
    longest_first = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
    fits = [
        _spread(longest_first, lengths, rounds * world_size, capacity) is not None
        for rounds in range(1, len(lengths) + 1)
    ]
    assert fits == sorted(fits)
    found = _even_rounds(longest_first, lengths, world_size, capacity)
    assert len(found) == 1 + fits.index(True)


@pytest.mark.parametrize("length", [3000, 1400])
@pytest.mark.parametrize("world_size", [1, 8])
def test_the_work_on_many_long_samples_does_not_grow_with_their_square(
    world_size: int, length: int
) -> None:
    """One or two of them fill a bin."""
    calls = [_calls_of_planning(count, world_size, length) for count in (1024, 4096)]
    assert calls[1] < 6 * calls[0]


def _calls_of_planning(count: int, world_size: int, length: int) -> int:
    """Calls of functions, built-in ones too, that planning so many samples takes."""
    draws = np.random.default_rng(0).normal(length, 100, size=count)
    lengths = np.clip(draws, 1, 4096).astype(np.int64)
    calls: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    try:
        rounds = pack(lengths, world_size, 4096)
    finally:
        sys.setprofile(None)
    assert sorted(p for bins in rounds for each in bins for p in each) == list(range(count))
    return calls["call"] + calls["c_call"]


def test_fewer_samples_than_ranks_leave_empty_bins() -> None:
    assert pack([5, 9], 4, 10) == [[[1], [0], [], []]]


def test_one_long_sample_shares_a_full_round() -> None:
    """Even bins would hold 6 next to 10: 2 ranks would wait for it."""
    rounds = pack([10, *[2] * 8], 2, 10)
    loads = [[sum([10, *[2] * 8][p] for p in members) for members in bins] for bins in rounds]
    assert loads == [[10, 10], [4, 2]]


def test_rounds_that_hold_everything_are_not_followed_by_an_empty_one() -> None:
    """Spreading overflows here where filling does not."""
    sizes = [9, 9, 23, 23, 28, 55, 69, 73, 92]
    rounds = pack(sizes, 2, 100)
    loads = [[sum(sizes[p] for p in members) for members in bins] for bins in rounds]
    assert len(rounds) == 2
    assert sum(map(sum, loads)) == sum(sizes)
    assert max(map(max, loads)) <= 100


def test_sample_beyond_the_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens, more than max_tokens_per_gpu 10"):
        pack([3, 12], 2, 10)


@settings(max_examples=examples(200), deadline=None)
@ANY_SAMPLES_RANKS_AND_CAPACITY
def test_no_plan_waits_longer_than_longest_processing_time(
    lengths: list[int], world_size: int, capacity: int
) -> None:
    def duration(rounds: list[list[list[int]]]) -> int:
        return sum(max(sum(lengths[p] for p in bins) for bins in each) for each in rounds)

    longest_first = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
    theirs = lpt_rounds(longest_first, lengths, world_size, capacity)
    ours = pack(lengths, world_size, capacity)
    assert sorted(p for each in theirs for bins in each for p in bins) == list(range(len(lengths)))
    assert duration(ours) <= duration(theirs)


def waste(world_size: int, batch: int, capacity: int, longest: int) -> float:
    """Share of the tokens for which a rank waits for the fullest bin of its round."""
    random = np.random.default_rng(1)
    spent = used = 0
    for _ in range(50):
        draws = random.lognormal(mean=6.0, sigma=0.9, size=batch)
        lengths = np.clip(draws, 16, longest).astype(np.int64)
        for bins in pack(lengths, world_size, capacity):
            loads = [int(lengths[members].sum()) for members in bins]
            spent += world_size * max(loads)
            used += sum(loads)
    return 1 - used / spent


@pytest.mark.parametrize(
    ("world_size", "batch", "capacity", "longest"),
    [(8, 128, 8192, 4096), (2, 128, 8192, 4096), (16, 256, 16384, 8192), (8, 64, 4096, 4096)],
)
def test_little_time_is_spent_waiting(
    world_size: int,
    batch: int,
    capacity: int,
    longest: int,
) -> None:
    share = waste(world_size, batch, capacity, longest)
    print(f"waiting: {share:.4f}")
    assert share <= 0.03


def test_collation_of_a_long_pack() -> None:
    """131k tokens against a plain loop over the samples."""
    random = np.random.default_rng(2)
    lengths = random.multinomial(131_072 - 300, np.ones(300) / 300) + 1
    samples = []
    for length in lengths.tolist():
        ids = torch.from_numpy(random.integers(0, 50_000, size=length))
        labels = ids.masked_fill(torch.from_numpy(random.random(length) < 0.4), -100)
        samples.append((ids, labels))  # position 0 may carry a label: collate must remove it
    before = [labels.clone() for _, labels in samples]
    batch = collate(samples)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (1, 131_072)
    ids_list: list[int] = []
    labels_list: list[int] = []
    places: list[int] = []
    for ids, labels in samples:
        ids_list += ids.tolist()
        labels_list += [-100, *labels.tolist()[1:]]
        places += range(len(ids))
    assert batch.input_ids[0].tolist() == ids_list
    assert batch.labels[0].tolist() == labels_list
    assert batch.position_ids[0].tolist() == places
    assert batch.lengths == tuple(lengths.tolist())
    counted = [at - 1 for at, label in enumerate(labels_list) if label != -100]
    assert batch.places.tolist() == counted
    assert batch.loss_tokens == len(counted)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, samples, strict=True))


def test_empty_bin_becomes_a_batch_without_loss() -> None:
    batch = collate([], pad_token_id=9)
    assert batch.is_dummy
    assert batch.loss_tokens == len(batch.places) == 0
    assert batch.input_ids.tolist() == [[9, 9]]
    assert batch.labels.tolist() == [[-100, -100]]
    assert batch.position_ids.tolist() == [[0, 1]]
