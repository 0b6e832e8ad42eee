"""Which samples of the old skills' text a step learns again beside its own.

Lives here: the endless stream of retention samples that `replay_ratio` deals out over the steps of
a run. Called by `packing`, which lays them into the same forward passes, and by `planning`. Pure: a
function of numbers, the same on every rank, so that a resumed run draws what the undisturbed one
does. Must never: deal out a sample that the retention loss is measured on.

Learning old examples along with new ones is rehearsal (Robins, 1995, "Catastrophic forgetting,
rehearsal and pseudorehearsal"; the second where the model writes the examples itself).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from osft_trainer.order import epoch_order
from osft_trainer.prepared import PreparedPart


@dataclass(frozen=True)
class Replay:
    """Retention text that is learned again."""

    part: PreparedPart
    """The samples that are read; those that measure what is kept are not among them."""
    ratio: float
    """Samples of it for each sample of the data, greater than 0."""
    seed: int
    """Of their order."""

    def between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Positions in `part` that go with samples first to last - 1 of the run, int64 [n].

        `first` and `last` count the samples of the data from the run's beginning. The shares of a
        sample add up: at ratio 0.25 each fourth one brings one along. Every sample of the text
        comes once before any comes again, each time in another order.
        """
        places = np.arange(int(self.ratio * first), int(self.ratio * last))
        rounds, within = np.divmod(places, len(self.part))
        found = np.empty(len(places), dtype=np.int64)
        for turn in np.unique(rounds):
            order = epoch_order(len(self.part), self.seed, int(turn))
            found[rounds == turn] = order[within[rounds == turn]]
        return found
