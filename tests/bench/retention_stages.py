"""Which trainings the retention benchmark consists of, and which setting of a method is its best.

Used by `retention`. Nothing here trains or reads files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import retention_methods as methods
from retention_tasks import NEW
from retention_training import STEPS, Job, Outcome

RATES = [1e-4, 3e-4, 1e-3, 3e-3]
RATIOS = [0.25, 0.5]
SEEDS = [0, 1, 2]
SCREENED = ["easy, new word", "conflicting, new word"]
PROMISING = [
    (methods.OWN_TEXT, 0.5, 1e-2, 2.0),
    (methods.REPLAY, 0.5, 2e-2, 2.0),
    (methods.REPLAY, 0.75, 1e-2, 2.0),
]
"""Tried on the tasks with new words, too."""
ROOM = [
    (methods.OWN_TEXT, 0.5, 3e-3, 0.0),
    *PROMISING,
    (methods.BY_WEIGHTS, 0.25, 3e-3, 1.0),
]
"""Method, ratio, learning rate, weight decay."""
LACKS = "inc"
GAP = (methods.PLAIN_REPLAY, methods.OWN_TEXT, methods.REPLAY)
"""Methods that are given text of the old skills but one."""


@dataclass(frozen=True)
class Scope:
    """What of the benchmark is run."""

    methods: Sequence[str] = tuple(methods.USUAL)
    rates: Sequence[float] = tuple(RATES)
    """Of the screen."""
    ratios: Sequence[float] = tuple(RATIOS)
    """Of the screen."""
    seeds: Sequence[int] = tuple(SEEDS)
    """Of what follows the screen."""
    steps: int = STEPS

    def quick(self) -> Scope:
        """An hour and more becomes minutes: it shows that everything works, and teaches little."""
        return replace(
            self, rates=self.rates[2:3], ratios=self.ratios[1:], seeds=self.seeds[:1], steps=20
        )


def screen_jobs(scope: Scope) -> list[Job]:
    """Every method at every setting, on the screened tasks."""
    return [
        Job(method, task, rate, ratio, steps=scope.steps)
        for method in scope.methods
        for task in SCREENED
        for rate in scope.rates
        for ratio in (scope.ratios[:1] if method in methods.WITHOUT_RATIO else scope.ratios)
    ]


def best_settings(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Job]:
    """Per method the setting with the best result summed over the screened tasks."""
    best: dict[str, Job] = {}
    for method in names:
        mine = [o for o in outcomes if o.job.method == method]
        settings = {(o.job.learning_rate, o.job.ratio) for o in mine}

        def merit(setting: tuple[float, float], mine: list[Outcome] = mine) -> tuple[int, float]:
            ranks = [o.rank for o in mine if (o.job.learning_rate, o.job.ratio) == setting]
            return sum(rank[0] for rank in ranks), sum(rank[1] for rank in ranks)

        rate, ratio = max(sorted(settings), key=merit)
        best[method] = replace(mine[0].job, learning_rate=rate, ratio=ratio)
    return best


def final_jobs(scope: Scope, best: dict[str, Job]) -> list[Job]:
    """Each method at its best on every task and seed."""
    return [
        replace(job, task=task, seed=seed)
        for job in best.values()
        for task in NEW
        for seed in scope.seeds
    ]


def room_jobs(scope: Scope) -> list[Job]:
    """The split by activations with more room, where old and new inputs are made of the same words.

    At the setting that is best for new words it cannot learn these: the free directions hold so
    little of their inputs. What helps here must not harm the tasks with new words.
    """
    return [
        Job(method, task, rate, ratio, seed, scope.steps, decay)
        for method, ratio, rate, decay in ROOM
        if method in scope.methods
        for task in NEW
        if task not in SCREENED or (method, ratio, rate, decay) in PROMISING
        for seed in scope.seeds
    ]


def gap_jobs(scope: Scope, best: dict[str, Job]) -> list[Job]:
    """What is kept of an old skill that the text does not hold, at the best and the promising."""
    settings = [best[method] for method in GAP if method in scope.methods]
    settings += [
        Job(method, "", rate, ratio, steps=scope.steps, weight_decay=decay)
        for method, ratio, rate, decay in PROMISING
        if method in scope.methods
    ]
    return [
        replace(setting, task=task, seed=seed, lacks=LACKS)
        for setting in settings
        for task in SCREENED
        for seed in scope.seeds
    ]
