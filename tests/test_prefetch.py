"""Reading ahead: the same items in the same order, one ahead, exceptions where they belong."""

import threading
from collections.abc import Iterator

import pytest

from osft_trainer.prefetch import prefetched


def test_the_next_item_is_made_while_one_is_in_use() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    coming = prefetched(items())
    assert not made[0].is_set(), "nothing is made before it is asked for"
    assert next(coming) == 0
    assert made[1].wait(10)
    assert not made[2].is_set(), "one ahead, not two"
    assert list(coming) == [1, 2]


def test_the_work_is_done_in_another_thread() -> None:
    def items() -> Iterator[str]:
        yield threading.current_thread().name

    (name,) = prefetched(items())
    assert name.startswith("osft-batches")


def test_an_exception_comes_out_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the disk is gone")

    coming = prefetched(items())
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(ValueError, match="the disk is gone"):
        next(coming)


def test_no_more_is_made_than_is_wanted_and_the_source_is_closed() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        try:
            for number in range(9):
                made.append(number)
                yield number
        finally:
            made.append(-1)

    assert list(prefetched(items(), 3)) == [0, 1, 2]
    assert made == [0, 1, 2, -1]
    assert list(prefetched(items(), 0)) == []


@pytest.mark.parametrize("limit", [None, 5])
def test_stopping_early_closes_the_source_and_ends_the_thread(limit: int | None) -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            number = 0
            while True:
                yield number
                number += 1
        finally:
            closed.set()

    coming = prefetched(items(), limit)
    assert next(coming) == 0
    coming.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert not [t for t in threading.enumerate() if t.name.startswith("osft-batches")]
