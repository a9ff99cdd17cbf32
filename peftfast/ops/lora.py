"""y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ with a frozen W, as autograd Functions (Hu et al., arXiv 2106.09685).

Saved for the backward pass: the input itself (not a copy, whatever autocast does), t = drop(x) Aᵀ [M, r], and the
parameters. Dropout masks are functions of a saved seed, never stored. With a gate g [M, 1] or [M, r], g t takes the
place of t.

Small products are left to others: on a CPU to `composed.py`, on a GPU to `host_bound.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.autocast import autocast_dtype
from peftfast.ops.casts import compute_copy
from peftfast.ops.composed import composed_add, composed_lora, composes
from peftfast.ops.function import apply, fresh, fresh_if_compiled, gradients_of, second_order, transformed
from peftfast.ops.gate import gate_grad, gate_rows, gated
from peftfast.ops.host_bound import host_bound_limit, host_bound_lora, is_host_bound
from peftfast.ops.plan import Part, Plan, Way, branch_dtype, plan_of
from peftfast_kernels import get_backend
from peftfast_kernels.decode import Operand, weight_kn
from peftfast_kernels.keep_mask import drop
from peftfast_kernels.lora_down import lora_down, lora_dt
from peftfast_kernels.lora_gemm import lora_add, lora_dx, lora_gemm, lora_gemm_t
from peftfast_kernels.lora_grad import lora_factor_grads


def _draw(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-(2**62), 2**62, shape, dtype=torch.int64, device=x.device)


def draw_seed(x: Tensor, dropout: float) -> Tensor | None:
    """A seed from the device's default generator: recomputation under checkpointing draws the same one."""
    if dropout == 0.0:
        return None
    return _draw(x, ())


def draw_seeds(x: Tensor, plans: Sequence[Plan]) -> list[Tensor | None]:
    """One seed for every plan that drops, all from one draw."""
    dropping = sum(plan.dropout > 0.0 for plan in plans)
    if dropping == 0:
        return [None] * len(plans)
    seeds = iter(_draw(x, (dropping,)).unbind())
    return [next(seeds) if plan.dropout > 0.0 else None for plan in plans]


def _product(
    x: Tensor,
    w: Operand,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [..., N] and t before it is gated, for factors in the branch's dtype."""
    n, k = w.shape
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    if rows.dtype is not w.dtype:
        rows = rows.to(w.dtype)
    t = lora_down(rows, a, seed, dropout)
    acting = t if gate is None else gated(t, gate)
    y = lora_gemm(rows, w, None if bias is None else bias.to(w.dtype), acting, b, scale)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], n)), t


def factor_grads(
    dy: Tensor,
    t: Tensor,
    rows: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    plan: Plan,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """dB [N, r], and dA [R, K] where the input's rows are given (p may hold the stacked p of several adapters)."""
    if rows is None:
        return *lora_factor_grads(dy, t, None, None, None, 0.0, plan.scale, db_dtype, da_dtype), None
    db, da = lora_factor_grads(dy, t, rows, p, seed, plan.dropout, plan.scale, db_dtype, da_dtype)
    return db, da


def _update(x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, plan: Plan, gate: Tensor | None) -> Tensor:
    """s drop(x) Aᵀ Bᵀ of rows x, in operations that torch can differentiate as often as it is asked to."""
    if plan.dropout:
        x = x * drop(torch.ones_like(x), seed, plan.dropout)
    return plan.scale * (gated(x.to(plan.branch) @ a.to(plan.branch).t(), gate) @ b.to(plan.branch).t())


def _linear_again(ctx: Any, dy: Tensor) -> tuple:
    x, _, a, b, seed, gate, *stored = ctx.saved_tensors
    plan, needs = ctx.plan, ctx.needs_input_grad
    n, k = plan.shape
    x = x.view_as(x)  # a gate may be made of x itself, which is not this product's business
    rows, dy_rows = x.reshape(-1, k).to(plan.dtype), dy.reshape(-1, n)
    y = rows @ weight_kn(plan.weight(stored), plan.dtype) + _update(rows, a, b, seed, plan, gate)
    dx, da, db, dg = gradients_of(y.to(dy.dtype), (x, a, b, gate), (*needs[:3], needs[5]), dy_rows)
    return (dx, da, db, dy_rows.sum(0) if needs[3] else None, None, dg, None, *(None,) * len(stored))


def _add_again(ctx: Any, dy: Tensor) -> tuple:
    x, _, a, b, seed, gate = ctx.saved_tensors
    plan, needs = ctx.plan, ctx.needs_input_grad
    n, k = plan.shape
    x = x.view_as(x)
    update = _update(x.reshape(-1, k).to(plan.dtype), a, b, seed, plan, gate)
    wanted = (*needs[1:4], needs[5])
    dx, da, db, dg = gradients_of(update.to(dy.dtype), (x, a, b, gate), wanted, dy.reshape(-1, n))
    return dy, dx, da, db, None, dg, None


class _LoraLinear(torch.autograd.Function):
    """Base product and adapter together."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        gate: Tensor | None,
        plan: Plan,
        *stored: Tensor,
    ) -> Tensor:
        a_copy, keep_a = compute_copy(a, plan.branch)
        b_copy, keep_b = compute_copy(b, plan.branch)
        y, t = _product(x, plan.weight(stored), bias, a_copy, b_copy, seed, plan.scale, plan.dropout, gate)
        ctx.plan = plan
        # the copies that live anyway are kept; others are a rank-sized cast away
        ctx.copies = (a_copy if keep_a else None, b_copy if keep_b else None)
        ctx.save_for_backward(x, t, a, b, seed, gate, *stored)
        return fresh_if_compiled(y) if x.dim() == 2 else fresh(y)

    @staticmethod
    @second_order(_linear_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, seed, gate, *stored = ctx.saved_tensors
        plan: Plan = ctx.plan
        n, k = plan.shape
        a_copy, b_copy = ctx.copies
        a_copy = a.to(plan.branch) if a_copy is None else a_copy
        b_copy = b.to(plan.branch) if b_copy is None else b_copy
        dy_rows = dy if dy.dim() == 2 else dy.reshape(-1, n)
        need_x, need_a, need_b, need_bias, _, need_gate = ctx.needs_input_grad[:6]
        p = lora_dt(dy_rows, b_copy, plan.scale) if need_x or need_a or need_gate else None
        dgate = gate_grad(p, t, gate) if need_gate else None
        if gate is not None:
            t, p = gated(t, gate), None if p is None else gated(p, gate)
        dx = rows = dbias = None
        if need_x:
            w = plan.weight(stored)
            dx = lora_gemm_t(dy_rows, w, p, a_copy, seed, plan.dropout)
            dx = dx if dx.dtype is x.dtype else dx.to(x.dtype)  # even a cast to the same dtype takes the host a while
            dx = dx if x.dim() == 2 else dx.view(x.shape)
        if need_a:
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            rows = rows if rows.dtype is plan.dtype else rows.to(plan.dtype)
        db = da = None
        if need_a or need_b:
            db, da = factor_grads(dy_rows, t, rows, p, seed, plan, b.dtype, a.dtype)
        if need_bias:
            dbias = dy_rows.sum(0)
        return (dx, da, db, dbias, None, dgate, None, *(None,) * len(stored))


class _LoraAdd(torch.autograd.Function):
    """The adapter on top of an output that the base module has computed."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, gate: Tensor | None, plan: Plan
    ) -> Tensor:
        n, k = plan.shape
        rows = x if x.dim() == 2 else x.reshape(-1, k)
        rows = rows.to(plan.dtype)
        a_copy, keep_a = compute_copy(a, plan.branch)
        b_copy, keep_b = compute_copy(b, plan.branch)
        t = lora_down(rows, a_copy, seed, plan.dropout)
        acting = t if gate is None else gated(t, gate)
        out = lora_add(y if y.dim() == 2 else y.reshape(-1, n), acting, b_copy, plan.scale)
        ctx.plan = plan
        ctx.copies = (a_copy if keep_a else None, b_copy if keep_b else None)
        ctx.save_for_backward(x, t, a, b, seed, gate)
        return fresh(out if y.dim() == 2 else out.view(y.shape))

    @staticmethod
    @second_order(_add_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, seed, gate = ctx.saved_tensors
        plan: Plan = ctx.plan
        n, k = plan.shape
        a_copy, b_copy = ctx.copies
        a_copy = a.to(plan.branch) if a_copy is None else a_copy
        b_copy = b.to(plan.branch) if b_copy is None else b_copy
        dy_rows = dy if dy.dim() == 2 else dy.reshape(-1, n)
        need_x, need_a, need_b, _, need_gate = ctx.needs_input_grad[1:6]
        p = lora_dt(dy_rows, b_copy, plan.scale) if need_x or need_a or need_gate else None
        dgate = gate_grad(p, t, gate) if need_gate else None
        if gate is not None:
            t, p = gated(t, gate), None if p is None else gated(p, gate)
        dx = rows = db = da = None
        if need_x:
            dx = lora_dx(p, a_copy, seed, plan.dropout, x.dtype)
            dx = dx if x.dim() == 2 else dx.view(x.shape)
        if need_a:
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            rows = rows.to(plan.dtype)
        if need_a or need_b:
            db, da = factor_grads(dy_rows, t, rows, p, seed, plan, b.dtype, a.dtype)
        return dy, dx, da, db, None, dgate, None


def lora_linear(
    x: Tensor,
    w: Operand,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float,
    gate: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + scale · gate(drop(x) Aᵀ) Bᵀ.

    Args:
        x: [..., K].
        w: the frozen weight [N, K], whose `dtype` is that of the product and of the result.
        bias: [N] or None.
        a: [r, K]. b: [N, r]. Gradients arrive in their dtypes.
        scale: factor of the adapter. dropout: probability in [0, 1]; 0 outside training.
        gate: see `gated`; with the leading dimensions of x. None: none.

    Returns:
        [..., N] in `w.dtype`.
    """
    return lora_part(x, Part(w, bias, a, b, plan_of(w, branch_dtype(x, a, autocast_dtype(x)), scale, dropout)), gate)


def lora_part(x: Tensor, part: Part, gate: Tensor | None = None) -> Tensor:
    """`lora_linear` of a part whose plan has been made."""
    if gate is None:
        return way_of(x, part)(x, part)
    return (composed_lora if composes(x) else by_kernels)(x, part, gate_rows(gate))


def circumstances(x: Tensor) -> tuple:
    """What plans and `way_of` depend on besides the layer and how many elements x has; the first is what autocast
    wants."""
    return autocast_dtype(x), type(x), x.dtype, x.is_cuda, transformed(), get_backend(), host_bound_limit()


def way_of(x: Tensor, part: Part) -> Way:
    """The fastest way to `lora_part`."""
    if composes(x):
        return composed_lora
    if not torch.compiler.is_compiling() and is_host_bound(x, part.plan):
        return host_bound_lora
    return by_kernels


def by_kernels(x: Tensor, part: Part, gate: Tensor | None = None) -> Tensor:
    """The way of many tokens."""
    w, bias, a, b, plan = part
    seed = draw_seed(x, plan.dropout) if plan.dropout else None
    if not torch.is_grad_enabled():  # an autograd Function costs the host as much as two small products
        if a.dtype is not plan.branch or b.dtype is not plan.branch:
            a, b = compute_copy(a, plan.branch)[0], compute_copy(b, plan.branch)[0]
        return _product(x, w, bias, a, b, seed, plan.scale, plan.dropout, gate)[0]
    return apply(_LoraLinear, x, a, b, bias, seed, gate, plan, *w.tensors)


def lora_linear_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, gate: Tensor | None = None
) -> Tensor:
    """y + scale · gate(drop(x) Aᵀ) Bᵀ for y [..., N] from the base module; shapes and meaning as in `lora_linear`."""
    autocast = autocast_dtype(x)
    branch = branch_dtype(x, a, autocast)
    # under autocast the input is used in the branch's dtype; otherwise as it is
    dtype = x.dtype if autocast is None else branch
    plan = Plan("", (b.shape[0], a.shape[1]), dtype, branch, float(scale), dropout)
    if composes(x):
        return composed_add(y, x, a, b, plan, gate)
    return apply(_LoraAdd, y, x, a, b, draw_seed(x, dropout), gate_rows(gate), plan)
