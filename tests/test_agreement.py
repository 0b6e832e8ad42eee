"""What the first rank does for all, and what one rank says to all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import tiny


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
