"""Splitting a weight matrix into a kept and a free subspace.

What lives here: the rank rule and which bases a parameterisation needs, nothing else (`bases`
computes them). Called by `model.convert` through a decomposition provider (which may add a cache)
and by tests.
Must never: touch modules, files or process groups.

Letters: rows x cols is the matrix as it is stored (for `nn.Linear` out x in, for `Conv1D` in x out;
the allowed set of updates does not change under transposition, so no orientation is needed),
R = min(rows, cols), k kept directions, r = R - k free ones. A leading batch axis (experts) is
allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_UP, Decimal

import torch
from torch import Tensor

from osft_trainer.bases import matrix_bases

PARAMETERIZATIONS = ("exact", "core", "factored", "dense")


@dataclass(frozen=True)
class Split:
    """The parts of W = U_h S_h V_h + U_0 S_0 V_0 that a parameterisation needs; others are None.

    Shapes carry a leading batch axis for expert tensors. All parts are contiguous. A basis that
    several matrices share is one frozen `nn.Parameter` in the splits of all of them.
    """

    free_rows: Tensor | None = None
    """U_0: rows x r."""
    free_cols: Tensor | None = None
    """V_0: r x cols."""
    kept_rows: Tensor | None = None
    """U_h: rows x k."""
    kept_cols: Tensor | None = None
    """V_h: k x cols."""
    free_values: Tensor | None = None
    """S_0: r, only for `factored`."""

    def to_tensors(self) -> dict[str, Tensor]:
        """The parts that are present, by name: what a cache writes."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Split:
        """Inverse of `to_tensors`; an unknown name is a TypeError."""
        return cls(**tensors)


def free_rank(rows: int, cols: int, unfreeze_rank_ratio: float) -> int:
    """Number of free directions r of a rows x cols matrix: ratio * min(rows, cols), rounded.

    The ratio is read as the decimal number the user wrote (0.9 is nine tenths, not the nearest
    binary fraction), halves round up. A ratio above 0 frees at least one direction; a ratio below
    1 keeps at least one where the matrix has two or more.

    Raises:
        ValueError: if the ratio is not within 0 and 1.
    """
    ratio = Decimal(repr(float(unfreeze_rank_ratio)))
    if not ratio.is_finite() or not 0 <= ratio <= 1:
        raise ValueError(
            f"unfreeze_rank_ratio: {unfreeze_rank_ratio} is not between 0 and 1; "
            "give the share of directions to train, for example 0.25"
        )
    full = min(rows, cols)
    if ratio in (0, 1):
        return int(ratio) * full
    rounded = int((ratio * full).to_integral_value(rounding=ROUND_HALF_UP))
    return max(1, min(rounded, full - 1))


def needed_parts(rows: int, cols: int, rank: int, parameterization: str) -> frozenset[str]:
    """Names of the `Split` parts that `linear.SubspaceWeight` needs for this matrix."""
    full = min(rows, cols)
    if rank == 0 or parameterization == "dense":
        return frozenset()
    if parameterization == "factored":
        return frozenset({"free_rows", "free_cols", "kept_rows", "kept_cols", "free_values"})
    if rank == full:
        return frozenset()
    if parameterization == "core" or rows == cols:
        return frozenset({"free_rows", "free_cols"})
    return frozenset({"free_cols", "kept_rows"} if rows > cols else {"free_rows", "kept_cols"})


def split_weight(weight: Tensor, rank: int, parameterization: str = "exact") -> Split:
    """Decompose `weight` ([batch x] rows x cols) and keep the parts that are needed.

    Works in float64 on the weight's device, one matrix at a time. The returned float32 bases are
    orthonormal, and orthogonal to what they leave out, to float32 rounding (about 1e-7). Equal
    input gives equal output; for the signs see `bases.matrix_bases`.

    Raises:
        ValueError: if the weight holds NaN or infinity.
    """
    rows, cols = weight.shape[-2:]
    parts = needed_parts(rows, cols, rank, parameterization)
    if not parts:
        return Split()
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity; check the checkpoint it was read from")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    batch = weight.shape[:-2]
    found: dict[str, list[Tensor]] = {name: [] for name in sorted(parts)}
    for matrix in weight.detach().reshape(-1, rows, cols):
        made = matrix_bases(matrix.double(), rank, parts)
        for name, kept in found.items():
            # A slice keeps the whole factor alive, and a strided one has no row shards: copy.
            part = made[name].to(dtype).clone(memory_format=torch.contiguous_format)
            kept.append(part)
    return Split(
        **{
            name: torch.stack(kept).reshape(*batch, *kept[0].shape) if batch else kept[0]
            for name, kept in found.items()
        }
    )
