"""g (y - bias + s t Bᵀ) + bias with t = x Aᵀ: DoRA on top of a base product y (Liu et al., arXiv 2402.09353).

g = m / ‖W + s B A‖ per output feature. The norm is a constant of the gradient (section 4.3 of the paper); W + s B A
is never there as a whole. Saved for the backward pass: x, y, t [M, r] and the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.autocast import without_autocast
from peftfast.ops.casts import Lasting, compute_copy, copy_again
from peftfast.ops.function import apply, as_dtype, as_rows, composing, fresh, gradients_of, second_order, shaped_as
from peftfast.ops.plan import Plan, plan_beside
from peftfast_kernels.decode import Operand
from peftfast_kernels.dora_add import dora_add
from peftfast_kernels.feature_scale import feature_scale_grad
from peftfast_kernels.lora_down import lora_down, lora_dt
from peftfast_kernels.lora_gemm import lora_dx
from peftfast_kernels.lora_grad import lora_factor_grads
from peftfast_kernels.row_norm import row_norm


@torch.no_grad()
def weight_norm(w: Operand, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + scale · B A‖ of every row, [N], in fp32 or wider; W [N, K] in any storage, a [r, K], b [N, r]."""
    with without_autocast(a):
        norm = row_norm.reference if composing() else row_norm
        return norm(w, a, b, float(scale))


class _Sum(NamedTuple):
    """What `_sum` computes."""

    out: Tensor  # g (y - bias + scale · x Aᵀ Bᵀ) + bias
    t: Tensor  # x Aᵀ
    copy: Lasting  # A in the branch's dtype, for `copy_again`


def _sum(y: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, plan: Plan) -> _Sum:
    a_copy, lasting = compute_copy(a, plan.branch)
    t = lora_down(as_rows(x).to(plan.dtype), a_copy, None, 0.0)
    gb = _scaled_rows(b, g, plan.branch)
    shift = None if bias is None else bias.to(g.dtype) * (1 - g)
    with without_autocast(y):
        out = dora_add(as_rows(y), g, shift, t, gb, plan.scale)
    return _Sum(shaped_as(out, y), t, lasting)


def _again(ctx: Any, dy: Tensor) -> tuple:
    y, x, _, a, b, g, bias = ctx.saved_tensors
    plan: Plan = ctx.plan
    update = as_rows(x).to(plan.dtype).to(plan.branch) @ a.to(plan.branch).t() @ b.to(plan.branch).t()
    shift = 0.0 if bias is None else bias.to(g.dtype)
    out = g * (as_rows(y).to(g.dtype) - shift + plan.scale * update.to(g.dtype)) + shift
    return (*gradients_of(out.to(dy.dtype), (y, x, a, b, g, bias), ctx.needs_input_grad[:6], as_rows(dy)), None)


class _DoraAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, plan: Plan
    ) -> Tensor:
        out, t, ctx.copy = _sum(y, x, a, b, g, bias, plan)
        ctx.plan = plan
        ctx.save_for_backward(y, x, t, a, b, g, bias)
        return fresh(out)

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        y, x, t, a, b, g, bias = ctx.saved_tensors
        plan: Plan = ctx.plan
        need_x, need_a = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        dy_rows = as_rows(dy)
        y_grad, dg = feature_scale_grad(dy_rows, as_rows(y), g, g.dtype)
        p = rows = None
        if need_x or need_a:
            p = lora_dt(dy_rows, _scaled_rows(b, g, plan.branch), plan.scale)
        if need_a:
            rows = as_rows(x).to(plan.dtype)
        raw, *da = lora_factor_grads(dy_rows, t, rows, p if need_a else None, None, 0.0, plan.scale, g.dtype, a.dtype)
        dg = dg + (raw * b.to(g.dtype)).sum(1)
        dbias = None
        if bias is not None:
            total = dy_rows.sum(0, dtype=g.dtype)
            dg = dg - bias.to(g.dtype) * total
            dbias = ((1 - g) * total).to(bias.dtype) if ctx.needs_input_grad[5] else None
        dx = None
        if need_x:
            dx = shaped_as(lora_dx(p, copy_again(ctx.copy, a, plan.branch), None, 0.0, x.dtype), x)
        db = (raw * g[:, None]).to(b.dtype)
        return torch.reshape(y_grad, y.shape), dx, da[0] if da else None, db, dg, dbias, None


def _scaled_rows(b: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g · B [N, r] in the branch's dtype, rounded once; g is the wider of the two."""
    return as_dtype(b * g.unsqueeze(1), dtype)


def dora_linear_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """g (y - bias + scale · x Aᵀ Bᵀ) + bias in y's dtype.

    Args:
        y: [..., N], the base module's output, bias included.
        x: [..., K]. a: [r, K]. b: [N, r]. g: [N] in fp32 or wider; all three receive gradients.
        bias: [N] or None.
    """
    plan = plan_beside(x, a, b, scale, 0.0)
    if not torch.is_grad_enabled():  # a Function takes the host as long as two small products
        return _sum(y, x, a, b, g, bias, plan).out
    return apply(_DoraAdd, y, x, a, b, g, bias, plan)
