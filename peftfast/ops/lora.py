"""y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ with a frozen W, as autograd Functions (Hu et al., arXiv 2106.09685).

Saved for the backward pass: the input itself (not a copy, whatever autocast does), t = drop(x) Aᵀ [M, r], and the
parameters. Dropout masks are functions of a saved seed, never stored. With a gate g [M, 1] or [M, r], g t takes the
place of t.

Small products are left to others: on a CPU to `composed.py`, on a GPU to `host_bound.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.autocast import autocast_dtype
from peftfast.ops.casts import compute_copies, copies_again
from peftfast.ops.composed import composed_add, composed_lora, composes, fused_lora
from peftfast.ops.function import (
    apply,
    as_dtype,
    as_rows,
    followed,
    fresh,
    fresh_if_compiled,
    gradients_of,
    second_order,
    shaped_as,
)
from peftfast.ops.gate import gate_grad, gate_rows, gated
from peftfast.ops.host_bound import host_bound_limit, host_bound_lora, is_host_bound
from peftfast.ops.plan import Part, Plan, Way, branch_dtype, plan_beside, plan_of
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


def _product(x: Tensor, part: Part, seed: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output [..., N] and t before it is gated, for a part whose factors are in the branch's dtype."""
    w, bias, a, b, plan = part
    rows = as_dtype(as_rows(x), plan.dtype)
    t = lora_down(rows, a, seed, plan.dropout)
    y = lora_gemm(rows, w, None if bias is None else bias.to(plan.dtype), gated(t, gate), b, plan.scale)
    return shaped_as(y, x), t


def _update(x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, plan: Plan, gate: Tensor | None) -> Tensor:
    """s drop(x) Aᵀ Bᵀ of rows x, in such operations as `formula`."""
    if plan.dropout:
        x = x * drop(torch.ones_like(x), seed, plan.dropout)
    return plan.scale * (gated(x.to(plan.branch) @ a.to(plan.branch).t(), gate) @ b.to(plan.branch).t())


def formula(
    rows: Tensor, w: Operand, a: Tensor, b: Tensor, seed: Tensor | None, plan: Plan, gate: Tensor | None = None
) -> Tensor:
    """`lora_linear` of rows [M, K] without the bias, in operations that torch can differentiate as often as it is asked
    to."""
    rows = as_dtype(rows, plan.dtype)
    return rows @ weight_kn(w, plan.dtype) + _update(rows, a, b, seed, plan, gate)


def _linear_again(ctx: Any, dy: Tensor) -> tuple:
    x, _, a, b, seed, gate, *stored = ctx.saved_tensors
    plan, needs = ctx.plan, ctx.needs_input_grad
    dy_rows = as_rows(dy)
    y = formula(as_rows(x), plan.weight(stored), a, b, seed, plan, gate)
    dx, da, db, dg = gradients_of(y.to(dy.dtype), (x, a, b, gate), (*needs[:3], needs[5]), dy_rows)
    return (dx, da, db, dy_rows.sum(0) if needs[3] else None, None, dg, None, *(None,) * len(stored))


def _add_again(ctx: Any, dy: Tensor) -> tuple:
    x, _, a, b, seed, gate = ctx.saved_tensors
    plan, needs = ctx.plan, ctx.needs_input_grad
    update = _update(as_dtype(as_rows(x), plan.dtype), a, b, seed, plan, gate)
    wanted = (*needs[1:4], needs[5])
    dx, da, db, dg = gradients_of(update.to(dy.dtype), (x, a, b, gate), wanted, as_rows(dy))
    return dy, dx, da, db, None, dg, None


class _Branch(NamedTuple):
    """The gradients of a low-rank branch, as far as they are needed."""

    p: Tensor | None  # of drop(x) Aᵀ
    down: Tensor  # A in the branch's dtype
    da: Tensor | None
    db: Tensor | None
    dgate: Tensor | None


def _differentiate(
    ctx: Any, dy: Tensor, x: Tensor, t: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, gate: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
) -> _Branch:  # fmt: skip
    """Both Functions' part of a backward pass; dy [M, N], `needs` of x, a, b and the gate."""
    plan: Plan = ctx.plan
    need_x, need_a, need_b, need_gate = needs
    down, up = copies_again(ctx.copies, a, b, plan.branch)
    p = lora_dt(dy, up, plan.scale) if need_x or need_a or need_gate else None
    dgate = gate_grad(p, t, gate) if need_gate else None
    if gate is not None:
        t, p = gated(t, gate), None if p is None else gated(p, gate)
    da = db = None
    if need_a or need_b:
        own = (as_dtype(as_rows(x), plan.dtype), p, seed, plan.dropout) if need_a else (None, None, None, 0.0)
        db, *das = lora_factor_grads(dy, t, *own, plan.scale, b.dtype, a.dtype)
        da = das[0] if das else None
    return _Branch(p, down, da, db, dgate)


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
        down, up, ctx.copies = compute_copies(a, b, plan.branch)
        y, t = _product(x, Part(plan.weight(stored), bias, down, up, plan), seed, gate)
        ctx.plan = plan
        ctx.save_for_backward(x, t, a, b, seed, gate, *stored)
        return fresh_if_compiled(y) if x.dim() == 2 else fresh(y)

    @staticmethod
    @second_order(_linear_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, seed, gate, *stored = ctx.saved_tensors
        plan: Plan = ctx.plan
        need_x, need_a, need_b, need_bias, _, need_gate = ctx.needs_input_grad[:6]
        dy = as_rows(dy)
        branch = _differentiate(ctx, dy, x, t, a, b, seed, gate, (need_x, need_a, need_b, need_gate))
        dx = None
        if need_x:
            dx = lora_gemm_t(dy, plan.weight(stored), branch.p, branch.down, seed, plan.dropout)
            dx = shaped_as(as_dtype(dx, x.dtype), x)
        dbias = dy.sum(0) if need_bias else None
        return (dx, branch.da, branch.db, dbias, None, branch.dgate, None, *(None,) * len(stored))


class _LoraAdd(torch.autograd.Function):
    """The adapter on top of an output that the base module has computed."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, gate: Tensor | None, plan: Plan
    ) -> Tensor:
        down, up, ctx.copies = compute_copies(a, b, plan.branch)
        t = lora_down(as_dtype(as_rows(x), plan.dtype), down, seed, plan.dropout)
        out = lora_add(as_rows(y), gated(t, gate), up, plan.scale)
        ctx.plan = plan
        ctx.save_for_backward(x, t, a, b, seed, gate)
        return fresh(shaped_as(out, y))

    @staticmethod
    @second_order(_add_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, seed, gate = ctx.saved_tensors
        need_x, need_a, need_b, _, need_gate = ctx.needs_input_grad[1:6]
        needs = need_x, need_a, need_b, need_gate
        branch = _differentiate(ctx, as_rows(dy), x, t, a, b, seed, gate, needs)
        dx = None
        if need_x:
            dx = shaped_as(lora_dx(branch.p, branch.down, seed, ctx.plan.dropout, x.dtype), x)
        return dy, dx, branch.da, branch.db, None, branch.dgate, None


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
    return autocast_dtype(x), type(x), x.dtype, x.is_cuda, followed(), get_backend(), host_bound_limit()


def _fuses(x: Tensor, dropout: float) -> bool:
    """Whether a compiler, which has no kernels of ours for a CPU, is to have torch's own operations for its loops. Our
    dropout masks take those less time than torch's."""
    return x.is_cpu and not dropout and torch.compiler.is_compiling()


def way_of(x: Tensor, part: Part) -> Way:
    """The fastest way to `lora_part`."""
    if composes(x):
        return composed_lora
    if not torch.compiler.is_compiling():
        return host_bound_lora if is_host_bound(x, part.plan) else by_kernels
    return fused_lora if _fuses(x, part.plan.dropout) else by_kernels


def by_kernels(x: Tensor, part: Part, gate: Tensor | None = None) -> Tensor:
    """The way of many tokens."""
    w, bias, a, b, plan = part
    seed = draw_seed(x, plan.dropout)
    if not torch.is_grad_enabled():  # an autograd Function costs the host as much as two small products
        if a.dtype is not plan.branch or b.dtype is not plan.branch:
            a, b, _ = compute_copies(a, b, plan.branch)
            part = part._replace(a=a, b=b)
        return _product(x, part, seed, gate)[0]
    return apply(_LoraLinear, x, a, b, bias, seed, gate, plan, *w.tensors)


def lora_linear_add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float, gate: Tensor | None = None
) -> Tensor:
    """y + scale · gate(drop(x) Aᵀ) Bᵀ for y [..., N] from the base module; shapes and meaning as in `lora_linear`."""
    plan = plan_beside(x, a, b, scale, dropout)
    if composes(x) or _fuses(x, dropout):
        return composed_add(y, x, a, b, plan, gate)
    return apply(_LoraAdd, y, x, a, b, draw_seed(x, dropout), gate_rows(gate), plan)
