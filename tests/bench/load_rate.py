"""Creates at a steady rate, and what each of them waits for.

Called by load_story. The API server shares the machine with what is measured, and stands still at
times: how long it takes to answer a create, and to show the object to this program's own watch, is
told beside the operator's wait, since no operator can be faster than the server it hears from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import load_machine
from bench.load_watch import Name


class Post(NamedTuple):
    """When a create was asked for, and when it was answered; seconds of the monotonic clock."""

    asked: float
    answered: float


@dataclass
class Times:
    """What is known of each name; filled by others while creates go on."""

    posts: Mapping[Name, Post]
    shown: Mapping[Name, float]
    """When this program's watch showed the OSFTJob."""
    children: Mapping[Name, float]
    """When this program's watch showed the PyTorchJob."""


def create(
    names: list[Name],
    rate: float,
    create_one: Callable[[Name], Name],
    times: Times,
    trees: dict[str, str],
    *,
    pool: Executor,
    wait_for: Callable[[list[Name], float], set[Name]],
) -> dict[str, Any]:
    """Create all `names` at `rate` a second, whatever the operator does; wait for their children.

    Args:
        names: of the OSFTJobs.
        rate: creates a second.
        create_one: makes one.
        times: filled by `create_one` and by the watches.
        trees: marks of process trees whose CPU time is counted, by name.
        pool: runs the creates.
        wait_for: waits for PyTorchJobs, at most so many seconds; returns those that never came.
    """
    start, usage = time.monotonic(), load_machine.Usage(trees)

    def on_time(number: int) -> None:
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        create_one(names[number])

    list(pool.map(on_time, range(len(names))))
    took = time.monotonic() - start
    lost = wait_for(names, 120 + len(names) / 10)
    whole = time.monotonic() - start
    used = usage.seconds()
    made = [name for name in names if name not in lost]
    return {
        "creates_per_second": round(len(names) / took, 1),
        **_spread([times.children[n] - times.posts[n].answered for n in made]),
        "not_made": len(lost),
        "server_alone": {
            "create_answered": _spread(
                [times.posts[n].answered - times.posts[n].asked for n in made]
            ),
            # a watch can be quicker than the answer
            "create_shown": _spread(
                [max(0.0, times.shown[n] - times.posts[n].answered) for n in made]
            ),
        },
        # says how many a second one core can take, also on a machine that is busy otherwise
        "cpu_seconds_per_job": {
            name: round(seconds / len(names), 4)
            for name, seconds in used.items()
            if name != "others"
        },
        "cores_used": {name: round(seconds / whole, 2) for name, seconds in used.items()},
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {
        "p50_seconds": _percentile(seconds, 50),
        "p99_seconds": _percentile(seconds, 99),
        "max_seconds": round(max(seconds), 3),
    }


def _percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return round(values[0], 3)
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 3)
