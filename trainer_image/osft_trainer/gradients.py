"""Products with an effective weight whose gradient goes to the factor of its update only.

What lives here: four autograd functions. Forward and the gradient of the input are one dense
product each; the gradient of the weight itself (rows x cols) is never formed for matrices used by
`linear.SubspaceLinear`. The small product that the factor's gradient needs of the input belongs to
the backward pass; made in the forward pass, it is kept instead of the input (`kept_inputs`). Called
by `linear`; must never hold state or know about sharding.

For M (rows x cols, as stored) used on T tokens the dense gradient would be A^T B with A (T x rows)
and B (T x cols): for a weight stored out x in, A is the gradient of the output and B the input; for
one stored in x out, the other way round. Every factor's gradient follows from A and B by first
multiplying them with the small bases, which is where the saving comes from.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from osft_trainer.kept_inputs import free_part


class UpdateProduct(torch.autograd.Function):
    """y = x M^T + b (or x M + b) for M = W + [U_0] F [V_0]; a basis of None is the identity."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        effective: Tensor,
        bias: Tensor | None,
        stored_in_out: bool,
        factor: Tensor,
        free_rows: Tensor | None,
        free_cols: Tensor | None,
        keeps_free_part: bool,
    ) -> Tensor:
        """Shapes: x [..., in], effective [rows, cols], factor [rows or r, cols or r].

        `keeps_free_part` keeps x B instead of x, where B is the basis at the input's side.
        """
        basis = free_rows if stored_in_out else free_cols
        kept = x
        if keeps_free_part and basis is not None:
            kept = free_part(x, basis, in_rows=not stored_in_out)
            free_rows, free_cols = (None, free_cols) if stored_in_out else (free_rows, None)
        ctx.save_for_backward(kept, effective, free_rows, free_cols)
        ctx.stored_in_out, ctx.factor_dtype = stored_in_out, factor.dtype
        return _product(x, effective, bias, stored_in_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x, bias and factor."""
        kept, effective, free_rows, free_cols = ctx.saved_tensors
        needs_x, _, needs_bias, _, needs_factor = ctx.needs_input_grad[:5]
        grad_x = _input_gradient(grad, effective, ctx.stored_in_out) if needs_x else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        grad_factor = None
        if needs_factor:
            # The basis of what is kept as its free part is not there: multiplied with already.
            a, b = _sides(kept, grad, ctx.stored_in_out)
            a = a if free_rows is None else a @ free_rows.to(a.dtype)
            b = b if free_cols is None else b @ free_cols.to(b.dtype).t()
            grad_factor = (a.t() @ b).to(ctx.factor_dtype)
        return grad_x, None, grad_bias, None, grad_factor, None, None, None


class FactoredProduct(torch.autograd.Function):
    """y = x M^T + b (or x M + b) for M = W_h + U diag(S) V with U, S, V trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        effective: Tensor,
        bias: Tensor | None,
        stored_in_out: bool,
        left: Tensor,
        values: Tensor,
        right: Tensor,
    ) -> Tensor:
        """Shapes: x [..., in], effective [rows, cols], left [rows, r], right [r, cols]."""
        ctx.save_for_backward(x, effective, left, values, right)
        ctx.stored_in_out = stored_in_out
        return _product(x, effective, bias, stored_in_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of x, bias, left, values and right."""
        x, effective, left, values, right = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        grad_x = _input_gradient(grad, effective, ctx.stored_in_out) if needs_x else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        a, b = _sides(x, grad, ctx.stored_in_out)
        a_low, b_low = a @ left.to(a.dtype), b @ right.to(b.dtype).t()
        grad_left = (a.t() @ b_low).to(left.dtype) * values
        grad_values = (a_low.to(values.dtype) * b_low.to(values.dtype)).sum(0)
        grad_right = values[:, None] * (a_low.t() @ b).to(right.dtype)
        return grad_x, None, grad_bias, None, grad_left, grad_values, grad_right


class UpdateWeight(torch.autograd.Function):
    """The effective weight as a tensor, for modules that use it in code of their own (experts).

    Here the dense gradient does exist, for one tensor at a time while its module runs backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        effective: Tensor,
        factor: Tensor,
        free_rows: Tensor | None,
        free_cols: Tensor | None,
    ) -> Tensor:
        """Shapes: effective [batch, rows, cols], factor [batch, rows or r, cols or r]."""
        ctx.save_for_backward(free_rows, free_cols)
        ctx.factor_dtype = factor.dtype
        return effective.view_as(effective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradient of the factor: U_0^T G V_0^T."""
        free_rows, free_cols = ctx.saved_tensors
        if free_rows is not None:
            grad = free_rows.to(grad.dtype).mT @ grad
        if free_cols is not None:
            grad = grad @ free_cols.to(grad.dtype).mT
        return None, grad.to(ctx.factor_dtype), None, None


class FactoredWeight(torch.autograd.Function):
    """As `UpdateWeight`, for the three trained factors of `factored`."""

    @staticmethod
    def forward(ctx: Any, effective: Tensor, left: Tensor, values: Tensor, right: Tensor) -> Tensor:
        """Shapes: left [batch, rows, r], values [batch, r], right [batch, r, cols]."""
        ctx.save_for_backward(left, values, right)
        return effective.view_as(effective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of left, values and right."""
        left, values, right = ctx.saved_tensors
        grad_low = (grad @ right.to(grad.dtype).mT).to(left.dtype)
        grad_left = grad_low * values[..., None, :]
        grad_values = (left * grad_low).sum(-2)
        grad_right = values[..., :, None] * (left.to(grad.dtype).mT @ grad).to(right.dtype)
        return None, grad_left, grad_values, grad_right


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, stored_in_out: bool) -> Tensor:
    if not stored_in_out:
        y = torch.nn.functional.linear(x, weight, bias)
        # With a bias it may be a view, and no view of a custom function may be changed in place,
        # which models do with what a linear layer gives them. The same memory, of its own. To ask
        # whether it is one would break the graph of a compiled block.
        return y if bias is None else cast(Tensor, torch.ops.aten._unsafe_view(y, y.shape))
    y = x @ weight
    return y if bias is None else y + bias


def _input_gradient(grad: Tensor, weight: Tensor, stored_in_out: bool) -> Tensor:
    return grad @ (weight.t() if stored_in_out else weight)


def _sides(x: Tensor, grad: Tensor, stored_in_out: bool) -> tuple[Tensor, Tensor]:
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    return (x, grad) if stored_in_out else (grad, x)
