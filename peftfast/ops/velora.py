"""s · drop(x) Aᵀ Bᵀ on top of an output, where the backward pass gets of x no more than one number for each group of
its features (VeLoRA, Miles et al., arXiv 2405.17991).

With x in groups of d features, c[m, g] = x[m, g] · e for a direction e [d] of length one, and A's gradient is taken
with c[m, g] e in place of x[m, g]. It is (pᵀ c) ⊗ e for the gradient p of t = x Aᵀ, so what stands in for x is never
made. The gradients of x and B are exact. Kept for the backward pass are c and t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.ops.casts import compute_copies, copies_again
from peftfast.ops.composed import composed_add, composes
from peftfast.ops.function import apply, as_rows, composing, first_order, fresh, shaped_as
from peftfast.ops.lora import draw_seed
from peftfast.ops.plan import Plan, plan_beside
from peftfast_kernels.keep_mask import drop
from peftfast_kernels.lora_down import lora_down, lora_dt, scaled_product
from peftfast_kernels.lora_gemm import lora_add, lora_dx
from peftfast_kernels.lora_grad import lora_factor_grads

#: Makes the direction e [d], in any floating dtype, of the rows [M, K] that are going to be compressed.
Project = Callable[[Tensor], Tensor]


def direction(v: Tensor) -> Tensor:
    """v [d] in fp32 at length one; of zeros, the direction in which all features are alike."""
    v = v.float()
    norm = torch.linalg.vector_norm(v)
    return torch.where(norm > 0, v / norm, v.new_full((), len(v) ** -0.5))


def mean_direction(rows: Tensor, size: int) -> Tensor:
    """The direction [size] of the mean of all groups of `size` features of rows [M, K], the last group filled up with
    zeros."""
    total = rows.sum(0, dtype=torch.float32)
    return direction(F.pad(total, (0, -len(total) % size)).view(-1, size).sum(0))


def compress(rows: Tensor, e: Tensor) -> Tensor:
    """c [M, G] in e's dtype for rows [M, K] in G = ceil(K / d) groups and e [d]."""
    (m, k), d = rows.shape, len(e)
    whole = k // d
    c = lora_down(rows[:, : whole * d].reshape(-1, d), e.unsqueeze(0), None, 0.0).view(m, whole)
    if whole * d == k:
        return c
    return torch.cat([c, lora_down(rows[:, whole * d :], e[: k - whole * d].unsqueeze(0), None, 0.0)], dim=1)


class _VeloraAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor, e: Tensor, seed: Tensor | None, plan: Plan
    ) -> Tensor:
        down, up, ctx.copies = compute_copies(a, b, plan.branch)
        t = lora_down(as_rows(x).to(plan.dtype), down, seed, plan.dropout)
        out = lora_add(as_rows(y), t, up, plan.scale)
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        ctx.save_for_backward(t, a, b, c, e, seed)
        return fresh(shaped_as(out, y))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple:
        t, a, b, c, e, seed = ctx.saved_tensors
        plan: Plan = ctx.plan
        down, up = copies_again(ctx.copies, a, b, plan.branch)
        dy_rows = as_rows(dy)
        p = lora_dt(dy_rows, up, plan.scale)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.reshape(lora_dx(p, down, seed, plan.dropout, ctx.dtype), ctx.shape)
        (db,) = lora_factor_grads(dy_rows, t, None, None, None, 0.0, plan.scale, b.dtype, a.dtype)
        sums = scaled_product(p.t(), c, 1.0, a.dtype)  # [r, G]
        da = (sums.unsqueeze(2) * e.to(sums.dtype)).view(len(sums), -1).narrow(1, 0, plan.shape[1])
        return dy, dx, da.to(a.dtype), db, None, None, None, None


def velora_linear_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, project: Project, gain: float
) -> Tensor:
    """y + scale · drop(x) Aᵀ Bᵀ; shapes as in `ops.lora.lora_linear_add`.

    Args:
        project: of what is compressed, drop(x). gain: what A's gradient is multiplied by.
    """
    plan = plan_beside(x, a, b, scale, dropout)
    if composing():  # which follow no Function: exact gradients
        return composed_add(y, x, a, b, plan)
    if dropout and composes(x):  # small, and torch's own mask is the faster one
        x, plan = F.dropout(x, dropout), plan._replace(dropout=0.0)
    seed = draw_seed(x, plan.dropout)
    with torch.no_grad():
        rows = as_rows(x.detach()).to(plan.dtype).to(plan.branch)
        if seed is not None:
            rows = drop(rows, seed, plan.dropout)
        e = project(rows)
        c = compress(rows, e.to(plan.branch))
    return apply(_VeloraAdd, y, x, a, b, c, e * gain, seed, plan)
