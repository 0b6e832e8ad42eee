"""The next batch is read while the step before it runs.

Lives here: the one thread that reads ahead. Called by `loop`. Must never: change the order of what
it is given, read more than one item ahead, or swallow an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar, cast

Item = TypeVar("Item")

_END = object()


def prefetched(items: Iterator[Item], limit: int | None = None) -> Iterator[Item]:
    """The same items in the same order, each one made in a thread while the one before is in use.

    `limit`: so many at most; no item behind it is made. None: all.

    An exception comes out where its item would have. When the caller stops early, closing this
    iterator waits for the item in the making, then closes `items`.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="osft-batches") as thread:
        try:
            # Here, not by the caller: the slice could not be closed, only what it is taken of.
            wanted = islice(items, limit)
            coming = thread.submit(next, wanted, _END)
            while (item := coming.result()) is not _END:
                coming = thread.submit(next, wanted, _END)
                yield cast(Item, item)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                thread.submit(close).result()
