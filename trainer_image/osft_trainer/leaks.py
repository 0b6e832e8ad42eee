"""How much of the update lies in the kept subspaces, while the training runs.

What lives here: which matrix is looked at after which step. Called by `loop` on every rank; the
measure itself is `SubspaceWeight.leak`. Must never: keep state (a resumed run measures what an
undisturbed one measures), or cost a step more than one matrix.

One matrix every `EVERY_STEPS` steps, in turn, so that all are seen in as many intervals as there
are matrices; the export measures all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from osft_trainer.linear import SubspaceWeight
from osft_trainer.model import OSFTModel

EVERY_STEPS = 10
"""The steps 1, 11, 21, ... are followed by a measurement."""

MAX_BYTES = 2**29
"""Of one update in float64, of which a few exist at one time. Tensors of many experts are larger:
they are measured by the export alone."""


@dataclass(frozen=True)
class Leak:
    """Shares of one matrix's update, as lengths, in its kept subspaces: 0 is none, 1 all of it."""

    matrix: str
    """Path of the target."""
    trained: float
    """Of the update as it is trained."""
    exported: float
    """Of what is left of it when W + dW is rounded to the exported type."""

    def to_row(self) -> dict[str, float | str]:
        """By the names of metrics.jsonl, without what is not finite."""
        found = {"leak": self.trained, "leakExported": self.exported}
        return {"leakMatrix": self.matrix, **{k: v for k, v in found.items() if isfinite(v)}}


class LeakWatch:
    """Measures the matrices of one model in turn."""

    def __init__(self, model: OSFTModel, exported: torch.dtype) -> None:
        """`exported` is the type of the weights that the run will write."""
        self._exported = exported
        self._watched = [(name, s) for name, s in model.subspaces() if _bytes(s) <= MAX_BYTES]

    def measure(self, step: int) -> Leak | None:
        """The leak of the matrix whose turn it is after this step (from 1). Collective."""
        turn, rest = divmod(step - 1, EVERY_STEPS)
        if rest or not self._watched:
            return None
        name, subspace = self._watched[turn % len(self._watched)]
        matrix = name.removesuffix(".subspace").removesuffix("_trained")
        return Leak(matrix, subspace.leak(), subspace.leak(self._exported))


def _bytes(subspace: SubspaceWeight) -> int:
    return subspace.effective.numel() * 8
