"""What the first rank does for all, and what one rank says to all."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

import pytest

import tiny
from osft_trainer.agreement import from_first_rank, raise_together
from osft_trainer.parallel import start_world, stop_world


def ended(
    first_rank_does: Callable[[], str], ranks: int = 3, timeout_seconds: float = 30
) -> set[int | None]:
    told = (first_rank_does, timeout_seconds, "grüße")
    return set(tiny.finish(tiny.start_ranks(tiny.agree, ranks, [told] * ranks)))


def test_all_wait_for_the_first_rank_beyond_the_timeout_of_collectives() -> None:
    assert ended(tiny.slow_words, timeout_seconds=2) == {0}


@pytest.mark.parametrize(("fails", "code"), [(tiny.bad_words, 2), (tiny.lost_folder, 4)])
def test_all_raise_what_the_first_rank_raised(fails: Callable[[], str], code: int) -> None:
    assert ended(fails) == {code}


def fail(failure: ValueError | OSError | None, seconds: float) -> None:
    """One rank that works for some time and fails, or does not."""
    world = start_world("cpu", timeout=timedelta(seconds=2))
    from_first_rank(world, lambda: "go")
    time.sleep(seconds)
    raise_together(failure, world, "another rank failed")
    stop_world(world)


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([None, None], 0),
        ([None, OSError("disk full")], 75),
        ([OSError("disk full"), ValueError("NaN")], 2),
    ],
)
def test_the_failure_of_one_ends_all_with_one_code(
    failures: list[ValueError | OSError | None], code: int
) -> None:
    told = [(failure, 4.0 * rank) for rank, failure in enumerate(failures)]
    assert set(tiny.finish(tiny.start_ranks(fail, len(failures), told))) == {code}
