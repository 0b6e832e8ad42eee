"""The work between gradients and the next forward, over all targets together.

Lives here: removing kept directions from gradients and values, and forming the effective weights
again. Called by `OSFTModel`. Must never: keep state, or ask for a tensor that a single target does
not need whole.

With several ranks each target needs tensors from all of them. They travel together (`exchange`), in
the order of the targets, which is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osft_trainer.exchange import full_all, in_chunks, local, sum_all
from osft_trainer.linear import SubspaceWeight

_Pair = tuple[Tensor, Tensor]
"""Values to project, and the kept basis to project out of them."""


@torch.no_grad()
def project_gradients(subspaces: Sequence[SubspaceWeight]) -> None:
    """Remove from the gradients what would move kept directions; before clipping."""
    _project(subspaces, lambda factor: factor.grad)


@torch.no_grad()
def project_values(subspaces: Sequence[SubspaceWeight]) -> None:
    """The same for the values, where steps leave the set or rounding adds up."""
    _project(subspaces, lambda factor: factor.data)


@torch.no_grad()
def project_momentum(subspaces: Sequence[SubspaceWeight], optimizer: torch.optim.Optimizer) -> None:
    """The same for AdamW's first moments; a factor that never had a gradient has none."""
    _project(subspaces, lambda factor: optimizer.state.get(factor, {}).get("exp_avg"))


@torch.no_grad()
def refresh(subspaces: Sequence[SubspaceWeight]) -> None:
    """Form W + dW again, in place; after the values changed."""
    for alone in (s for s in subspaces if s.batched):
        alone.refresh([local(part) for part in alone.far_parts()])
    matrices = [s for s in subspaces if not s.batched]
    for chunk in in_chunks(matrices, lambda s: sum(_bytes(part) for part in s.far_parts())):
        parts = iter(full_all([part for s in chunk for part in s.far_parts()]))
        for subspace in chunk:
            subspace.refresh([next(parts) for _ in subspace.far_parts()])


def _project(
    subspaces: Sequence[SubspaceWeight], of: Callable[[nn.Parameter], Tensor | None]
) -> None:
    """Subtract U_h (U_h^T values) for rows, (values V_h^T) V_h for columns; in place."""
    rows: list[_Pair] = []
    cols: list[_Pair] = []
    for subspace in subspaces:
        for factor, side, kept in subspace.projected():
            values = of(factor)
            if values is None:
                continue
            if not subspace.batched:
                (rows if side == "rows" else cols).append((values, kept))
            elif side == "rows":
                # Experts are whole on their rank.
                _subtract_rows(values, kept, local(kept).mT @ local(values))
            else:
                _subtract_cols(values, local(kept))
    for chunk in in_chunks(rows, lambda pair: pair[1].shape[1] * _row_bytes(pair[0])):
        _project_rows(chunk)
    for chunk in in_chunks(cols, lambda pair: _bytes(pair[1])):
        wholes = full_all([kept for _, kept in chunk])
        for (values, _), whole in zip(chunk, wholes, strict=True):
            _subtract_cols(values, whole)


def _project_rows(pairs: Sequence[_Pair]) -> None:
    """Every rank holds some rows of values and basis: their products are partial sums."""
    coefficients = [local(kept).mT @ local(values) for values, kept in pairs]
    first = pairs[0][0]
    if isinstance(first, DTensor):
        coefficients = sum_all(coefficients, first.device_mesh.get_group())
    for (values, kept), found in zip(pairs, coefficients, strict=True):
        _subtract_rows(values, kept, found)


def _subtract_rows(values: Tensor, kept: Tensor, coefficients: Tensor) -> None:
    _subtract_product(local(values), local(kept), coefficients)


def _subtract_cols(values: Tensor, kept: Tensor) -> None:
    mine = local(values)
    _subtract_product(mine, mine @ kept.mT, kept)


def _subtract_product(values: Tensor, left: Tensor, right: Tensor) -> None:
    """In one pass over the values, matrices or a batch of them."""
    if values.dim() == 2:
        values.addmm_(left, right, alpha=-1)
    else:
        values.baddbmm_(left, right, alpha=-1)


def _bytes(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _row_bytes(values: Tensor) -> int:
    return values.shape[-1] * values.element_size()
