"""One weight matrix whose update stays inside the free subspace.

What lives here: `SubspaceWeight` (the tensors of one target and the algebra on them) and
`SubspaceLinear` (the module that stands in for `nn.Linear` and `Conv1D`). Called by `model`,
`experts` and `projection`; sharded by `parallel`. Must never: choose targets, decompose, or start a
process group.

Allowed updates of W = U_h S_h V_h + U_0 S_0 V_0 are the dW with U_h^T dW = 0 and dW V_h^T = 0. This
set is linear and is parameterised with W untouched and trainable factors that start at dW = 0:

    form      dW                   trainable           values projected to
    dense     F                    F: rows x cols      none (every direction is free)
    square    U_0 F V_0            F: r x r            none (also `core` on any shape)
    tall      F V_0                F: rows x r         U_h^T F = 0
    wide      U_0 F                F: r x cols         F V_h^T = 0
    right     F V_0                F: rows x r         none: split by the inputs, only dW V_h^T = 0
    left      U_0 F                F: r x cols         none: the same where inputs are rows
    factored  U S V - U_0 S_0 V_0  U, S, V             U_h^T U = 0 and V V_h^T = 0

Gradients are projected in the same way, before they are clipped. Of `tall` and `wide` the
optimizer's step then stays in the set (`moments`), so that values are projected now and then alone,
against rounding that adds up. AdamW's own step leaves it: `factored`, whose set is not linear, has
its values projected after each step, too, as in mini_trainer.

The effective weight W + dW is formed once per optimizer step (`refresh`), in the base's dtype.
Trainables and bases are float32: bases in bfloat16 would leak 2^-9 of every update into the kept
part.

Sharded (FSDP2): parameters are DTensors outside forward, rows split over the ranks; `base` and the
kept bases are DTensor buffers which FSDP does not gather. `refresh` then works on local rows.
Expert tensors are split over experts, so that nothing has to be exchanged for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from osft_trainer.exchange import full, full_all, local
from osft_trainer.gradients import FactoredProduct, FactoredWeight, UpdateProduct, UpdateWeight
from osft_trainer.moments import SharedMoment
from osft_trainer.subspace import Split


class SubspaceWeight(nn.Module):
    """A frozen base weight and the trainable factors of its update.

    `effective` is W + dW; `base` is W. Frozen bases are parameters without gradient, so that FSDP2
    gathers them for both passes in the compute dtype.
    """

    base: Tensor
    kept_rows: Tensor | None
    kept_cols: Tensor | None

    def __init__(self, weight: Tensor, split: Split, rank: int, parameterization: str) -> None:
        """`weight` is [experts x] rows x cols; `split` holds `subspace.needed_parts` of it."""
        super().__init__()
        assert rank > 0, "a target without free directions stays an ordinary frozen parameter"
        self.batched = weight.dim() == 3
        self.keeps_free_part = False
        """Whether of an input only the part in the free directions is kept for backward. For blocks
        that are not recomputed: in those it would be made in a pass that keeps nothing."""
        self.form = _form(weight, split, rank, parameterization)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.effective = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.register_buffer("base", weight.detach(), persistent=False)
        self.register_buffer("kept_rows", split.kept_rows, persistent=False)
        self.register_buffer("kept_cols", split.kept_cols, persistent=False)
        self.free_rows = _frozen(split.free_rows)
        self.free_cols = _frozen(split.free_cols)
        self.free_values = _frozen(split.free_values)
        if self.form == "factored":
            self.left = nn.Parameter(_present(split.free_rows).clone())
            self.values = nn.Parameter(_present(split.free_values).clone())
            self.right = nn.Parameter(_present(split.free_cols).clone())
        else:
            rows, cols = weight.shape[-2:]
            shape = (
                *weight.shape[:-2],
                rows if split.free_rows is None else rank,
                cols if split.free_cols is None else rank,
            )
            self.factor = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

    def multiply(self, x: Tensor, bias: Tensor | None, stored_in_out: bool) -> Tensor:
        """The product of x ([..., in]) with the effective weight, plus bias."""
        if self.form == "factored":
            y = FactoredProduct.apply(  # type: ignore[no-untyped-call]
                x, self.effective, bias, stored_in_out, self.left, self.values, self.right
            )
        else:
            y = UpdateProduct.apply(  # type: ignore[no-untyped-call]
                x, self.effective, bias, stored_in_out, self.factor, self.free_rows,
                self.free_cols, self.keeps_free_part and torch.is_grad_enabled(),
            )  # fmt: skip
        return cast(Tensor, y)

    def weight(self) -> Tensor:
        """The effective weight, carrying the gradient of the factors."""
        if self.form == "factored":
            w = FactoredWeight.apply(  # type: ignore[no-untyped-call]
                self.effective, self.left, self.values, self.right
            )
        else:
            w = UpdateWeight.apply(  # type: ignore[no-untyped-call]
                self.effective, self.factor, self.free_rows, self.free_cols
            )
        return cast(Tensor, w)

    @property
    def shared_moment(self) -> SharedMoment | None:
        """How the factor's second moment is shared, so that steps stay in the set; None: not."""
        if self.form == "tall":
            return SharedMoment(-2, self.factor.shape[-2] - _present(self.kept_rows).shape[-1])
        if self.form == "wide":
            return SharedMoment(-1, self.factor.shape[-1] - _present(self.kept_cols).shape[-2])
        return None

    def projected(self) -> list[tuple[nn.Parameter, str, Tensor]]:
        """The factors that need projection, each with the side it touches and its kept basis."""
        if self.form == "tall":
            return [(self.factor, "rows", _present(self.kept_rows))]
        if self.form == "wide":
            return [(self.factor, "cols", _present(self.kept_cols))]
        if self.form == "factored":
            return [
                (self.left, "rows", _present(self.kept_rows)),
                (self.right, "cols", _present(self.kept_cols)),
            ]
        return []

    def far_parts(self) -> list[Tensor]:
        """What multiplies from the right in dW: of a matrix, every row of dW needs all of it."""
        if self.form == "factored":
            cols = _present(self.free_cols)
            return [self.values, self.right, _present(self.free_values), cols]
        parts: list[Tensor] = [] if self.free_rows is None else [self.factor]
        return parts if self.free_cols is None else [*parts, self.free_cols]

    @torch.no_grad()
    def refresh(self, far: Sequence[Tensor]) -> None:
        """Form W + dW again, in place; `far` are `far_parts`, whole or of this rank's experts."""
        near = [local(part) for part in self._near_parts()]
        base, effective = local(self.base), local(self.effective.data)
        if self.form in ("factored", "dense") or base.dtype != near[0].dtype:
            # One pass: the sum is formed in float32 and rounded once. (`factored` subtracts first:
            # equal factors leave the base bit for bit.)
            torch.add(base, self._delta(near, far), out=effective)
            return
        *before, last = far
        product = torch.baddbmm if self.batched else torch.addmm
        # No update of the whole size comes into being beside the weight.
        product(base, self._delta(near, before), last, out=effective)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """W + dW with all rows, in the trainables' dtype. Collective when sharded."""
        return full(self.base) + self.update()

    @torch.no_grad()
    def update(self) -> Tensor:
        """The update dW with all rows, in the trainables' dtype. Collective when sharded."""
        near, far = self._near_parts(), self.far_parts()
        whole = full_all([*near, *far])
        return self._delta(whole[: len(near)], whole[len(near) :])

    @torch.no_grad()
    def leak(self, exported: torch.dtype | None = None) -> float:
        """Largest share of the update that touches kept directions, in float64; 0 without update.

        `exported` takes the update that is left when W + dW is rounded to that type: the rounding
        does not know the subspaces.

        max(|U_h^T dW|, |dW V_h^T|) / |dW| (Frobenius). Where a kept basis is not stored, the kept
        part of dW is dW - U_0 U_0^T dW, which is as long as U_h^T dW. A split by the inputs keeps
        directions on one side only. Collective when sharded.
        """
        near, far = self._near_parts(), self.far_parts()
        parts = full_all([*near, *far])
        bases = [None if part is None else full(part) for part in self._bases()]
        base = None if exported is None else full(self.base)
        # One matrix at a time: the experts of a layer together are gigabytes in float64.
        squares = torch.zeros(3, dtype=torch.float64, device=parts[0].device)
        for number in range(self.base.shape[0] if self.batched else 1):
            mine = [self._matrix(part, number) for part in parts]
            delta = self._update_of(
                mine[: len(near)],
                mine[len(near) :],
                None if base is None else self._matrix(base, number),
                exported,
            )
            kept_rows, free_rows, kept_cols, free_cols = (
                None if part is None else self._matrix(part, number) for part in bases
            )
            # The other side is the same of the transposed.
            cols = _kept_part(_transposed(kept_cols), _transposed(free_cols), delta.mT)
            sides = (_kept_part(kept_rows, free_rows, delta), cols)
            squares += torch.stack([side.norm() for side in (*sides, delta)]).square()
        # Divided at the end: the bases are gathered by all ranks or by none.
        on_rows, on_cols, total = squares.sqrt().tolist()
        return float(max(on_rows, on_cols) / total) if total else 0.0

    def _bases(self) -> tuple[Tensor | None, ...]:
        """Of the rows, then of the columns: the kept directions, the free ones."""
        return self.kept_rows, self.free_rows, self.kept_cols, self.free_cols

    def _matrix(self, part: Tensor, number: int) -> Tensor:
        """What a part holds of one expert; all of it where there are none."""
        return part[number] if self.batched else part

    def _update_of(
        self,
        near: Sequence[Tensor],
        far: Sequence[Tensor],
        base: Tensor | None,
        exported: torch.dtype | None,
    ) -> Tensor:
        """The update of one matrix in float64, as trained or as `exported` holds it."""
        if exported is None:
            return self._delta([p.double() for p in near], [p.double() for p in far])
        assert base is not None
        return (base + self._delta(near, far)).to(exported).double() - base.double()

    def _near_parts(self) -> list[Tensor]:
        """What multiplies from the left in dW: every row of dW needs the same row of it."""
        if self.form == "factored":
            return [self.left, _present(self.free_rows)]
        return [self.factor if self.free_rows is None else self.free_rows]

    def _delta(self, near: Sequence[Tensor], far: Sequence[Tensor]) -> Tensor:
        """The rows (experts) of dW whose `near` is given."""
        if self.form == "factored":
            values, right, start_values, start_right = far
            trained = (near[0] * values[..., None, :]) @ right
            return trained - (near[1] * start_values[..., None, :]) @ start_right
        delta = near[0]
        for part in far:
            delta = delta @ part
        return delta


class SubspaceLinear(nn.Module):
    """Stands in for `nn.Linear` (weight out x in) or `Conv1D` (weight in x out)."""

    def __init__(self, subspace: SubspaceWeight, bias: nn.Parameter | None, conv1d: bool) -> None:
        """`bias` is the replaced module's own parameter."""
        super().__init__()
        self.subspace = subspace
        self.bias = bias
        self.conv1d = conv1d

    @property
    def weight(self) -> Tensor:
        """The effective weight, for model code that reads it; its gradient reaches the factors."""
        return self.subspace.weight()

    @property
    def in_features(self) -> int:
        """Length of the input's last axis."""
        return self.subspace.effective.shape[0 if self.conv1d else 1]

    @property
    def out_features(self) -> int:
        """Length of the output's last axis."""
        return self.subspace.effective.shape[1 if self.conv1d else 0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self.subspace.multiply(x, bias, self.conv1d)


def _form(weight: Tensor, split: Split, rank: int, parameterization: str) -> str:
    if parameterization == "factored":
        return "factored"
    if split.free_rows is not None and split.free_cols is not None:
        return "square"
    if split.free_rows is not None:
        return "left" if split.kept_cols is None else "wide"
    if split.free_cols is not None:
        return "right" if split.kept_rows is None else "tall"
    assert rank >= min(weight.shape[-2:]), "without bases every direction is free"
    return "dense"


def _transposed(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.mT


def _kept_part(kept: Tensor | None, free: Tensor | None, delta: Tensor) -> Tensor:
    """What an update has in the kept directions of its rows; nothing where no basis is there."""
    if kept is not None:
        return kept.double().mT @ delta
    if free is None:
        return delta.new_zeros(())
    basis = free.double()
    return delta - basis @ (basis.mT @ delta)


def _frozen(part: Tensor | None) -> nn.Parameter | None:
    if part is None or isinstance(part, nn.Parameter):
        return part  # a parameter is shared with other targets
    return nn.Parameter(part, requires_grad=False)


def _present(part: Tensor | None) -> Tensor:
    assert part is not None, "the decomposition left out a part that this form needs"
    return part
