"""Whether this run is a soak, and with it how many random examples a property is tried on.

Asked by conftest and by every test that does more in a soak. `make test` draws the same examples
every time: whether a change passes must depend on the change. `make soak` draws twenty times as
many, other ones each time.
"""

from __future__ import annotations

import os

from hypothesis import settings

SOAK = "OSFT_SOAK" in os.environ
"""Set by `make soak`."""

settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("other", max_examples=20 * 100, print_blob=True)


def load_profile() -> None:
    """For all properties of this run; conftest calls it."""
    settings.load_profile("other" if SOAK else "same")


def examples(count: int) -> int:
    """So many, or in a soak twenty times as many."""
    return 20 * count if SOAK else count
