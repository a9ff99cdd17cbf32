"""y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ where a GPU multiplies sooner than the host can ask it to: few operations, all of
them torch's own, in one autograd Function with as little Python as there can be.

The kernels of `lora.py` take the host longer and the device less, which is what counts for larger inputs. Saved for the
backward pass: the input, t = drop(x) Aᵀ [M, r], torch's dropout mask, and the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from peftfast.ops.casts import Lasting, compute_copies, compute_pair, copies_again
from peftfast.ops.function import Apart, as_dtype, as_rows, fresh, gradients_of, left_alone
from peftfast.ops.plan import Part, Plan
from peftfast_kernels import get_backend
from peftfast_kernels.dispatch import host_bound_products
from peftfast_kernels.lora_down import scaled_product

#: Elements up to which reading and writing them a few times takes a GPU less time than a kernel of ours the host. Also
#: how many an input may have whose dropout mask is kept: larger masks are worth more than the host's time.
ELEMENTS = 1 << 20

_limit: int | None = None  # for all threads, since checkpointing runs layers again in autograd's


@contextmanager
def host_bound_up_to(products: int) -> Iterator[None]:
    """In place of what the GPU's table says; 0 where work is recorded once and replayed without the host."""
    global _limit
    before, _limit = _limit, products
    try:
        yield
    finally:
        _limit = before


def host_bound_limit() -> int | None:
    """What `host_bound_up_to` says, None outside it."""
    return _limit


def is_host_bound(x: Tensor, plan: Plan) -> bool:
    """Whether the product of x with a weight that is stored as floating-point numbers takes the host longer than the
    GPU. Outside compilers."""
    if not x.is_cuda:
        return False
    elements = x.numel()
    limit = host_bound_products(x.get_device()) if _limit is None else _limit
    return (
        elements * plan.shape[0] <= limit
        and (not plan.dropout or elements <= ELEMENTS)
        and plan.format in ("dense", "dense_t")
        and get_backend() == "auto"
    )


def is_small(x: Tensor) -> bool:
    """Whether an element-wise operation on x takes the host longer than the GPU. Outside compilers."""
    return x.is_cuda and x.numel() <= ELEMENTS and _limit != 0 and get_backend() == "auto"


def host_bound_lora(x: Tensor, part: Part) -> Tensor:
    """`lora.lora_part` [..., N] of what `is_host_bound`."""
    w, bias, a, b, plan = part
    # with the same mask whether or not there will be gradients: reentrant checkpointing runs a layer in both ways
    if torch.is_grad_enabled():
        return _apply(x, a, b, bias, w.tensors[0], plan)
    return _multiply(x, a, b, bias, w.tensors[0], plan)[0]


#: t [..., r], the mask, and what `copies_again` wants.
Kept = tuple[Tensor, Tensor | None, tuple[Lasting, Lasting]]


def _multiply(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor, plan: Plan) -> tuple[Tensor, Kept]:
    """The output [..., N], and what the backward pass wants."""
    form, _, dtype, branch, scale, dropout, _, _ = plan
    if x.dtype is not dtype:
        x = x.type(dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    w = weight if form == "dense" and weight.dtype is dtype else _weight(weight, plan)
    y = F.linear(x, w, None if bias is None else as_dtype(bias, dtype))
    wide, mask = as_rows(x) if branch is dtype else x.type(branch), None
    if dropout:
        wide, mask = torch.native_dropout(wide, dropout, True)
        mask = as_rows(mask)
    if branch is dtype:
        down, up, kept = compute_pair(a, b, branch)
        t = torch.mm(wide, down)
        as_rows(y).addmm_(t, up, alpha=scale)
    else:  # in the shape that x has: four views less
        down, up, kept = compute_copies(a, b, branch)
        t = F.linear(wide, down)
        y.add_(F.linear(t, up), alpha=scale)
    return y, (t, mask, kept)


def _differentiate(
    dy: Tensor, rows: Tensor, a: Tensor, b: Tensor, weight: Tensor, plan: Plan, kept: Kept,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of rows, a, b and bias, as far as they are needed."""
    (t, mask, copies), (need_x, need_a, need_b, need_bias) = kept, needs
    _, _, dtype, branch, scale, *_ = plan
    t = as_rows(t)
    down, up = copies_again(copies, a, b, branch)
    same = branch is dtype
    wide = as_dtype(dy, branch)
    dx = da = db = p = None
    if need_x or need_a:
        # of t, nothing but its shape is used
        p = torch.addmm(t, wide, up, beta=0, alpha=scale if mask is None else scale * _kept_scale(plan))
    if need_x:
        dx = torch.mm(dy, _weight(weight, plan))
        if mask is None and same:
            dx.addmm_(p, down)
        else:
            update = torch.mm(p, down)
            dx.add_(update if mask is None else update.mul_(mask))
    if need_b:
        db = scaled_product(wide.mT, t, scale, b.dtype, b)
    if need_a:
        rows = as_dtype(as_dtype(rows, dtype), branch)
        da = scaled_product(p.mT, rows if mask is None else rows * mask, 1.0, a.dtype, a)
    return dx, da, db, dy.sum(0) if need_bias else None


class _HostBound(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor, plan: Plan) -> Tensor:
        y, (t, mask, ctx.copies) = _multiply(x, a, b, bias, weight, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, a, b, weight, t, mask)
        return fresh(y) if y._is_view() else y  # torch's own linear with a bias gives one

    @staticmethod
    @left_alone
    def backward(ctx: Any, dy: Tensor) -> tuple:
        plan, needs = ctx.plan, ctx.needs_input_grad
        if torch.is_grad_enabled():
            x, a, b, weight, _, mask = Apart(ctx).saved_tensors
            return *_again(dy, x, a, b, weight, plan, mask, needs), None, None
        x, a, b, weight, t, mask = ctx.saved_tensors
        dy, kept = as_rows(dy), (t, mask, ctx.copies)
        dx, *grads = _differentiate(dy, as_rows(x), a, b, weight, plan, kept, needs[:4])
        return _shaped(dx, x), *grads, None, None


# as `function.apply` does it, without asking for transforms once more
_apply = super(Function, _HostBound).apply


def _shaped(dx: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient of rows as that of x."""
    if dx is None:
        return None
    return as_dtype(dx if x.dim() == 2 else torch.reshape(dx, x.shape), x.dtype)


def _kept_scale(plan: Plan) -> float:
    """What dropout multiplies by what it keeps; 0 where it keeps nothing, so that no NaN can appear."""
    return 1.0 / (1.0 - plan.dropout) if plan.dropout < 1.0 else 0.0


def _weight(stored: Tensor, plan: Plan) -> Tensor:
    """W [N, K]."""
    return as_dtype(stored.t() if plan.format == "dense_t" else stored, plan.dtype)


def _again(
    dy: Tensor, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, plan: Plan, mask: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, a, b and bias in operations that torch can differentiate in turn."""
    rows, dy = as_rows(x).to(plan.dtype), as_rows(dy)
    dropped = rows.to(plan.branch) if mask is None else rows.to(plan.branch) * mask * _kept_scale(plan)
    update = dropped @ a.to(plan.branch).t() @ b.to(plan.branch).t()
    y = F.linear(rows, _weight(weight, plan)) + plan.scale * update
    dx, da, db = gradients_of(y.to(dy.dtype), (x, a, b), needs[:3], dy)
    return dx, da, db, dy.sum(0) if needs[3] else None
