"""y + s_g B_g A_g x for rows that each have an adapter g of their own: an autograd Function over the routed kernels.

Several adapters are trained in one batch as if each were trained alone: sums run over the rows of one adapter, in their
order, so no result depends on what else is in the batch. Saved are x itself, t [M, R], stacked factors and the route.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.autocast import autocast_dtype
from peftfast.ops.function import as_rows, first_order, fresh_if_compiled
from peftfast.ops.plan import branch_dtype
from peftfast_kernels.lora_routed import Route, make_route, routed_add, routed_down, routed_down_grad, routed_up_grad


class RowRoute(NamedTuple):
    """The adapters of the rows [M] of a flattened input."""

    route: Route
    unknown: Tensor | None  # bool [M, 1]: rows whose number no adapter has; None where the host knows there are none


def row_route(index: Tensor, adapters: int, tokens: int, known: bool) -> RowRoute:
    """The route of samples with `tokens` rows each.

    Args:
        index: [S] int64, adapter of every sample, -1 for none.
        known: whether all of `index` is below `adapters`. Where it may not be, such rows become NaN: to look at the
            numbers would stall a GPU.
    """
    rows = index if tokens == 1 else index.repeat_interleave(tokens)
    if known:
        return RowRoute(make_route(rows, adapters), None)
    return RowRoute(make_route(rows.clamp(max=adapters - 1), adapters), (rows >= adapters).unsqueeze(1))


def runs_segmented(x: Tensor) -> bool:
    """Whether the routed kernels serve this input; elsewhere batched products are the faster form."""
    return x.dtype != torch.float64 and routed_down.runs_triton(x)


class _RoutedAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, unknown: Tensor | None, *route: Tensor
    ) -> Tensor:
        branch = branch_dtype(x, a, autocast_dtype(x))
        narrow_a, narrow_b = a.to(branch), b.to(branch)
        t = routed_down(x, *route, narrow_a)
        if unknown is not None:
            t = t.masked_fill(unknown, float("nan"))
        ctx.save_for_backward(x, t, a, b, scales, *route)
        return fresh_if_compiled(routed_add(y, t, *route, narrow_b, scales))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, scales, *route = ctx.saved_tensors
        need_x, need_a, need_b = ctx.needs_input_grad[1:4]
        p, db = routed_up_grad(dy, t, *route, b.to(t.dtype), scales, b.dtype)
        dx = da = None
        if need_x:  # the expansion with aᵀ for b, on top of nothing
            nothing = x.new_zeros(()).expand(x.shape)
            dx = routed_add(nothing, p, *route, a.to(t.dtype).transpose(1, 2), torch.ones_like(scales))
        if need_a:
            da = routed_down_grad(x, p, *route, a.dtype)
        return dy, dx, da, db if need_b else None, None, None, *(None for _ in route)


def routed_linear_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scales: Tensor, rows: RowRoute) -> Tensor:
    """y with scales[g] b[g] a[g] x_m added to every row m of adapter g.

    Args:
        y: [..., N], x: [..., K], M rows each.
        a: [G, R, K], b: [G, N, R], scales: [G]; smaller ranks are padded with zeros.

    Returns:
        [..., N] in y's dtype; rows without an adapter are y's, bit for bit.
    """
    out = _RoutedAdd.apply(as_rows(y), as_rows(x), a, b, scales.float(), rows.unknown, *rows.route)
    return torch.reshape(out, y.shape)
