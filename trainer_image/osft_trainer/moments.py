"""AdamW whose step stays where projected gradients point to.

Lives here: which factors share their second moment along an axis, and the step that does it. Built
by `optimizer`; saved and restored by `shards`. Must never: project (`projection` does).

A factor F of form `tall` must obey U_h^T F = 0 (`linear`): P F = F with the projection
P = I - U_h U_h^T, which mixes rows. AdamW divides the first moment M element by element, M / D, and
P (M / D) is not (P M) / D: its step leaves the set, and what a projection afterwards gives back is
no longer the way down. Gradients in the kept directions, often the larger ones, then move the rest.

Let D have one number for each column, D_ij = d_j. Then M / D = M diag(1/d), and

    P (M diag(1/d)) = (P M) diag(1/d)

for every P that acts from the left: the step commutes with the projection. So with gradients that
are projected, P G = G, the first moment, its mean with non-negative weights, obeys P M = M, the
step P (M / D) = M / D, and so does F, a sum of such steps and of itself scaled down (weight decay).
A step on the allowed set ends at the best point of the set: (M / D) . G = sum_j (M_j . G_j) / d_j
is zero for projected G only where G is. For form `wide`, F V_h^T = 0, the same holds of rows.

d_j^2 is the mean of the squares of column j in any orthonormal coordinates of the free space, of
which there are rows - k: the sum over the rows divided by rows - k. So a step is as long as an
element-wise one after its projection. Sharing one second moment over a block of parameters is what
Adam-mini (Zhang et al., 2024, arXiv 2406.16793) does to save memory; here it also takes less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from osft_trainer.exchange import local, sum_all


@dataclass(frozen=True)
class SharedMoment:
    """Of one factor: along which axis its second moment is shared."""

    axis: int
    """-2: one number for each column, of all rows; -1: one for each row."""
    free: int
    """Free directions along the axis, which the sum of squares is divided by."""

    def shape(self, factor: Sequence[int]) -> list[int]:
        """Of the second moment, for a factor or some rows of it."""
        found = list(factor)
        found[self.axis] = 1
        return found

    def crosses_ranks(self, factor: Tensor) -> bool:
        """Whether the axis is the one that rows are split over ranks on."""
        return factor.dim() + self.axis == 0


class SubspaceAdamW(torch.optim.AdamW):
    """torch's AdamW, but for the factors that share: theirs is the step of this module."""

    shared: Mapping[nn.Parameter, SharedMoment]

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        shared: Mapping[nn.Parameter, SharedMoment],
        **options: Any,
    ) -> None:
        """`groups` and `options` as of torch's; no group has parameters of both sorts."""
        super().__init__(groups, **options)
        self.shared = shared

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Collective where factors are split over ranks."""
        assert closure is None, "the training loop computes gradients itself"
        every = self.param_groups
        try:
            self.param_groups = [g for g in every if g["params"][0] not in self.shared]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group["params"][0] in self.shared:
                self._step_together(group)

    @torch.no_grad()
    def _step_together(self, group: dict[str, Any]) -> None:
        factors = [factor for factor in group["params"] if factor.grad is not None]
        beta1, beta2 = group["betas"]
        for factor, squares in zip(factors, self._sums_of_squares(factors), strict=True):
            if not self.state[factor]:
                self.state[factor].update(fresh_state(self, factor))
            state = self.state[factor]
            state["step"] += 1
            count = state["step"].item()
            mean = local(state["exp_avg"]).lerp_(local(factor.grad), 1 - beta1)
            weight = (1 - beta2) / self.shared[factor].free
            second = state["exp_avg_sq"].mul_(beta2).add_(squares, alpha=weight)
            divisor = (second / (1 - beta2**count)).sqrt_().add_(group["eps"])
            values = local(factor.data)
            if group["weight_decay"]:
                values.mul_(1 - group["lr"] * group["weight_decay"])
            values.addcdiv_(mean, divisor, value=-group["lr"] / (1 - beta1**count))

    def _sums_of_squares(self, factors: Sequence[nn.Parameter]) -> list[Tensor]:
        """Of the gradients along each factor's axis, over all ranks, with one exchange."""
        found = [
            local(f.grad).square().sum(self.shared[f].axis, keepdim=True)
            for f in factors
            if f.grad is not None
        ]
        split = [
            number
            for number, factor in enumerate(factors)
            if isinstance(factor, DTensor) and self.shared[factor].crosses_ranks(factor)
        ]
        if split:
            first = factors[split[0]]
            assert isinstance(first, DTensor)
            sums = sum_all([found[n] for n in split], first.device_mesh.get_group())
            for number, whole in zip(split, sums, strict=True):
                found[number] = whole
        return found


def fresh_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step.

    exp_avg is sharded as the parameter; a shared exp_avg_sq is a plain tensor: of this rank's rows,
    or the same on every rank where its axis is that of the rows.
    """
    shared = shared_of(optimizer, parameter)
    mine = local(parameter.data)
    if shared is not None:
        second = mine.new_zeros(shared.shape(mine.shape))
    else:
        second = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    fused = shared is None and bool(optimizer.param_groups[0].get("fused"))
    # The fused kernel counts its steps on the device, the plain loop on the CPU.
    place = mine.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=place),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": second.detach(),
    }


def shared_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> SharedMoment | None:
    """How a parameter's second moment is shared; None where it is element-wise."""
    return optimizer.shared.get(parameter) if isinstance(optimizer, SubspaceAdamW) else None
