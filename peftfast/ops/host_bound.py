"""y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ where a GPU multiplies sooner than the host can ask it to: few operations, all of
them torch's own, in one autograd Function with as little Python as there can be.

The kernels of `lora.py` take the host longer and the device less, which is what counts for larger inputs. Saved for the
backward pass: the input, t = drop(x) Aᵀ [M, r], torch's dropout mask, and the parameters. Layers that share an input
are one Function, in which its gradient is summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from peftfast.ops.casts import compute_pair
from peftfast.ops.function import as_dtype, as_rows, fresh, gradients_of, left_alone
from peftfast.ops.plan import Part, Plan
from peftfast_kernels import get_backend
from peftfast_kernels.dispatch import host_bound_products
from peftfast_kernels.lora_down import gives_accumulator

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
    if x.dim() == 2:
        return _multiply(x, a, b, bias, w.tensors[0], plan)[0]
    y = _multiply(x.reshape(-1, plan.shape[1]), a, b, bias, w.tensors[0], plan)[0]
    return y.view(*x.shape[:-1], plan.shape[0])


def host_bound_siblings(x: Tensor, parts: Sequence[Part]) -> Sequence[Tensor]:
    """`host_bound_lora` of parts that `blocks.fit_together`, all of the same x, which gets one gradient."""
    if not torch.is_grad_enabled():
        return [host_bound_lora(x, part) for part in parts]
    members: list[Tensor | None] = []
    for w, bias, a, b, _ in parts:
        members += (a, b, bias, w.tensors[0])
    return _apply_siblings(x, tuple([part.plan for part in parts]), *members)


#: t, the mask, and the factors in the branch's dtype where those live anyway.
Kept = tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]


def _multiply(
    rows: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor, plan: Plan
) -> tuple[Tensor, Kept]:
    """The output [M, N] of rows [M, K], and what the backward pass wants."""
    form, _, dtype, branch, scale, dropout, _, _ = plan
    if rows.dtype is not dtype:
        rows = rows.to(dtype)
    dropped, mask = rows if branch is dtype else rows.to(branch), None
    if dropout:
        dropped, mask = torch.native_dropout(dropped, dropout, True)
    down, up, turned, kept = compute_pair(a, b, branch)
    t = F.linear(dropped, down)
    w = weight if form == "dense" and weight.dtype is dtype else _weight(weight, plan)
    y = F.linear(rows, w, None if bias is None else as_dtype(bias, dtype))
    if branch is dtype:
        y.addmm_(t, turned, alpha=scale)
    else:
        y.add_(torch.mm(t, turned), alpha=scale)
    return y, (t, mask, kept)


def _differentiate(
    dy: Tensor, rows: Tensor, a: Tensor, b: Tensor, weight: Tensor, plan: Plan, kept: Kept,
    needs: Sequence[bool], dx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of rows, a, b and bias, as far as they are needed.

    Args:
        dx: what the gradient of rows is added to. It is in the product's dtype.
    """
    (t, mask, copies), (need_x, need_a, need_b, need_bias) = kept, needs
    _, _, dtype, branch, scale, *_ = plan
    down, up = copies or (a.to(branch), b.to(branch))
    same = branch is dtype
    wide = dy if same else dy.to(branch)
    da = db = p = None
    if need_x or need_a:
        # of t, nothing but its shape is used
        p = torch.addmm(t, wide, up, beta=0, alpha=scale if mask is None else scale * _kept_scale(plan))
    if need_x:
        w = _weight(weight, plan)
        dx = torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
        if mask is None and same:
            dx.addmm_(p, down)
        else:
            update = torch.mm(p, down)
            dx.add_(update if mask is None else update.mul_(mask))
    if need_b:
        db = _product(wide.t(), t, b, scale)
    if need_a:
        rows = rows if rows.dtype is branch and same else rows.to(dtype).to(branch)
        da = _product(p.t(), rows if mask is None else rows * mask, a, 1.0)
    return dx, da, db, dy.sum(0) if need_bias else None


class _HostBound(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, weight: Tensor, plan: Plan) -> Tensor:
        n, k = plan.shape
        flat = x.dim() == 2
        y, (t, mask, ctx.copies) = _multiply(x if flat else x.reshape(-1, k), a, b, bias, weight, plan)
        ctx.plan = plan
        ctx.save_for_backward(x, a, b, weight, t, mask)
        return y if flat else fresh(y.view(*x.shape[:-1], n))

    @staticmethod
    @left_alone
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, a, b, weight, t, mask = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return *_again(dy, x, a, b, weight, plan, mask, needs), None, None
        n, k = plan.shape
        flat = x.dim() == 2
        dy, rows = (dy, x) if flat else (dy.reshape(-1, n), x.reshape(-1, k))
        dx, *grads = _differentiate(dy, rows, a, b, weight, plan, (t, mask, ctx.copies), needs[:4], None)
        return _shaped(dx, x), *grads, None, None


class _HostBoundSiblings(Function):
    """The members' tensors in a row: a, b, bias, weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plans: tuple[Plan, ...], *members: Tensor | None) -> tuple[Tensor, ...]:
        flat = x.dim() == 2
        rows = as_dtype(x if flat else x.reshape(-1, x.shape[-1]), plans[0].dtype)
        ys, saved, copies = [], [x], []
        for plan, a, b, bias, weight in zip(plans, *[iter(members)] * 4, strict=True):
            y, (t, mask, copy) = _multiply(rows, a, b, bias, weight, plan)
            ys.append(y if flat else fresh(y.view(*x.shape[:-1], y.shape[1])))
            saved += (a, b, weight, t, mask)
            copies.append(copy)
        ctx.set_materialize_grads(False)
        ctx.plans, ctx.copies = plans, copies
        ctx.save_for_backward(*saved)
        return tuple(ys)

    @staticmethod
    @left_alone
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        x, *saved = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        rows, dx, grads = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), None, []
        for plan, copies, dy, a, b, weight, t, mask, need_a, need_b, need_bias, _ in zip(
            ctx.plans, ctx.copies, dys, *[iter(saved)] * 5, *[iter(needs)] * 4, strict=True
        ):
            need = need_x, need_a, need_b, need_bias
            if dy is None:  # nobody has used this output
                own = (None, None, None)
            elif torch.is_grad_enabled():
                more, *own = _again(dy, x, a, b, weight, plan, mask, need)
                dx = more if dx is None else dx + more
            else:
                dy = dy if dy.dim() == 2 else dy.reshape(-1, plan.shape[0])
                dx, *own = _differentiate(dy, rows, a, b, weight, plan, (t, mask, copies), need, dx)
            grads += (*own, None)
        return _shaped(dx, x), None, *grads


# as `function.apply` does it, without asking for transforms once more
_apply, _apply_siblings = super(Function, _HostBound).apply, super(Function, _HostBoundSiblings).apply


def _shaped(dx: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient of rows as that of x."""
    if dx is None:
        return None
    dx = dx if x.dim() == 2 else dx.view(x.shape)
    return dx if dx.dtype is x.dtype else dx.to(x.dtype)


def _kept_scale(plan: Plan) -> float:
    """What dropout multiplies by what it keeps; 0 where it keeps nothing, so that no NaN can appear."""
    return 1.0 / (1.0 - plan.dropout) if plan.dropout < 1.0 else 0.0


def _weight(stored: Tensor, plan: Plan) -> Tensor:
    """W [N, K]."""
    return as_dtype(stored.t() if plan.format == "dense_t" else stored, plan.dtype)


def _product(left: Tensor, right: Tensor, like: Tensor, scale: float) -> Tensor:
    """scale · left right in the dtype of `like`, of which nothing else but its shape is used: of half-precision numbers
    on a GPU, fp32 straight from the accumulator."""
    if like.dtype is left.dtype:
        return torch.addmm(like, left, right, beta=0, alpha=scale)
    if like.dtype is torch.float32 and gives_accumulator(left):
        return torch.addmm(like, left, right, beta=0, alpha=scale, out_dtype=torch.float32)
    product = torch.mm(left, right).to(like.dtype)
    return product if scale == 1.0 else product.mul_(scale)


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
