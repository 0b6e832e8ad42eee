"""What the gradient of a factor needs of its matrix's input: the part in the free directions.

Lives here: computing that part in the forward pass, so that it is kept for the backward pass
instead of the input, of which it is a fraction; once for all matrices that are fed one tensor and
share their directions (q, k, v; gate and up). Called by `gradients`.
Must never: keep a tensor alive.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Made:
    """The part that was made last, and of what."""

    x: weakref.ref[Tensor]
    version: int
    basis: weakref.ref[Tensor]
    part: weakref.ref[Tensor]

    def part_of(self, x: Tensor, basis: Tensor) -> Tensor | None:
        """The part, if these are what it was made of and it still lives."""
        same = self.x() is x and self.version == x._version and self.basis() is basis
        return self.part() if same else None


_last: list[_Made] = []
"""None or one: matrices that are fed one tensor come right after each other."""


def free_part(x: Tensor, basis: Tensor, in_rows: bool) -> Tensor:
    """The product of x ([..., in]) with the basis: [tokens, r].

    Args:
        x: what a matrix is fed.
        basis: in x r, or r x in.
        in_rows: whether a direction is a row of the basis: r x in.
    """
    if torch.compiler.is_compiling():
        return _multiplied(x, basis, in_rows)  # the compiler finds what is computed twice
    found = _last[0].part_of(x, basis) if _last else None
    if found is None:
        found = _multiplied(x, basis, in_rows)
        made = _Made(weakref.ref(x), x._version, weakref.ref(basis), weakref.ref(found))
        _last[:] = [made]
    return found


def _multiplied(x: Tensor, basis: Tensor, in_rows: bool) -> Tensor:
    basis = basis.to(x.dtype)
    return x.flatten(0, -2) @ (basis.t() if in_rows else basis)
