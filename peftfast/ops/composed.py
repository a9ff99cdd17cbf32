"""Low-rank linears in torch's own operations: on a CPU with small inputs, under functorch's transforms and export, and
where checkpointing keeps some of them.

With small inputs the host takes the time, not the products. torch's derivative runs without Python, its dropout is one
operation, and the masks and casts that it keeps for the backward pass are small. Larger inputs are for `lora.py`'s
Function, which has no forward mode and no rule for vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.autocast import is_autocasting
from peftfast.ops.function import (
    apply,
    as_dtype,
    as_rows,
    composing,
    exporting,
    followed,
    left_alone,
    shaped_as,
    writable,
)
from peftfast.ops.gate import gated
from peftfast.ops.plan import Part, Plan
from peftfast_kernels import get_backend
from peftfast_kernels.decode import weight_again, weight_kn

#: Elements of an input up to which this is the faster way, by the bytes of one: see bench/results/small_products.md.
SMALL = {8: 1 << 15, 4: 1 << 15, 2: 1 << 18}


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ for a weight in a format of its own: what autograd keeps is the storage, which is decoded again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan, *stored: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(*stored)
        return torch.mm(rows, weight_kn(plan.weight(stored), plan.dtype))

    @staticmethod
    @left_alone
    def backward(ctx: Any, dy: Tensor) -> tuple:  # which is linear in dy, and so its own derivative
        plan, stored = ctx.plan, ctx.saved_tensors
        dx = torch.mm(dy, weight_again(plan.weight(stored), plan.dtype))
        return dx, None, *(None,) * len(stored)


def composes(x: Tensor) -> bool:
    """Whether this is how the product with x is best computed, or the only way."""
    if torch.compiler.is_compiling():
        return exporting()  # a graph for others is of torch's operations, and has their derivatives
    small = x.is_cpu and x.numel() <= SMALL.get(x.dtype.itemsize, 0) and get_backend() == "auto"
    return small or followed() or torch.jit.is_tracing()


def frozen_product(rows: Tensor, part: Part) -> Tensor:
    """x Wᵀ + bias of rows [M, K], a new tensor [M, N]."""
    w, bias = part.w, part.bias
    if w.format == "dense":
        return F.linear(rows, w.tensors[0], bias)
    if w.format == "dense_t":
        return F.linear(rows, w.tensors[0].t(), bias)
    rows = as_dtype(rows, part.plan.dtype)
    if rows.requires_grad and torch.is_grad_enabled() and not composing():
        y = apply(_FrozenProduct, rows, part.plan, *w.tensors)
    else:  # a Function takes the host as long as decoding a small weight
        y = torch.mm(rows, weight_kn(w, part.plan.dtype))
    if bias is None:
        return y
    return y.add_(bias) if writable() else y + bias


def composed_lora(
    x: Tensor,
    part: Part,
    gate: Tensor | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias + s (gate(drop(x) Aᵀ) Bᵀ + up_bias) [..., N]: the update in the factors' precision, or in autocast's.

    Args:
        gate: see `gated`, of the flattened input.
        read: what A reads in place of drop(x), made of that.
        up_bias: [N], in the update's precision.
    """
    _, _, a, b, plan = part
    rows = as_rows(x)
    y = frozen_product(rows, part)
    dropped = F.dropout(rows, plan.dropout) if plan.dropout else rows
    if read is not None:
        dropped = read(dropped if is_autocasting(x) else as_dtype(dropped, plan.branch))
    if not writable():  # an update for many may not be written into an output that is one
        update, alpha = _update(dropped, a, b, plan, gate, up_bias)
        y = as_dtype(torch.add(y, update, alpha=alpha), y.dtype)
    elif up_bias is None and y.dtype is rows.dtype is a.dtype is b.dtype and not is_autocasting(x):
        t, alpha = F.linear(dropped, a), plan.scale
        if y.dtype.itemsize < 4:
            t, alpha = _scaled(t, alpha)
        y.addmm_(gated(t, gate), b.mT, alpha=alpha)  # y is new, so it may be written to
    else:
        update, alpha = _update(dropped, a, b, plan, gate, up_bias)
        y.add_(update, alpha=alpha)
    return shaped_as(y, x)


def composed_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, plan: Plan, gate: Tensor | None = None) -> Tensor:
    """y + s gate(drop(x) Aᵀ) Bᵀ, for an output y [..., N] that others may have; `gate` as of x."""
    update, alpha = _update(F.dropout(x, plan.dropout) if plan.dropout else x, a, b, plan, gate)
    return as_dtype(torch.add(y, update, alpha=alpha), y.dtype)


def fused_lora(x: Tensor, part: Part) -> Tensor:
    """`composed_lora` in the shape that x has, for a compiler: it makes `addmm` of sums of matrices, also of gradients,
    which on a CPU copies what it adds to. Other sums are in the loops that follow."""
    y = shaped_as(frozen_product(as_rows(x), part), x)
    return composed_add(y, x, part.a, part.b, part.plan)


def _update(
    dropped: Tensor, a: Tensor, b: Tensor, plan: Plan, gate: Tensor | None, up_bias: Tensor | None = None
) -> tuple[Tensor, float]:
    """An update and its factor, whose product is s (gate(drop(x) Aᵀ) Bᵀ + up_bias)."""
    if is_autocasting(dropped):
        return F.linear(gated(F.linear(dropped, a), gate), b, up_bias), plan.scale
    t, alpha = F.linear(as_dtype(dropped, plan.branch), as_dtype(a, plan.branch)), plan.scale
    # a bias that is scaled in half precision has its gradient rounded twice
    if up_bias is None or plan.branch.itemsize >= 4:
        t, alpha = _scaled(t, alpha)
    if up_bias is not None and alpha != plan.scale:
        up_bias = up_bias * plan.scale
    return F.linear(gated(t, gate), as_dtype(b, plan.branch), up_bias), alpha


def _scaled(t: Tensor, scale: float) -> tuple[Tensor, float]:
    """t, and what its product is to be multiplied by: t is scaled, not the gradients, which would be rounded once more.
    Without gradients, a power of two gives the same bits wherever it enters, so an operation is saved."""
    if scale == 1.0 or not torch.is_grad_enabled() and math.frexp(scale)[0] == 0.5:
        return t, scale
    return t * scale, 1.0
