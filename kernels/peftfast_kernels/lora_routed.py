"""Several adapters in one batch: every row of x is served by its own adapter, or by none.

Shapes: x [M, K], y and dy [M, N]; stacked factors a [G, R, K], b [G, N, R] (smaller ranks are padded with zeros),
scales fp32 [G]; t and p [M, R]. A `Route` says which adapter serves a row, -1 for the base alone. It is computed once
per batch on the device, without a host synchronisation, and shared by all layers. Punica (arXiv 2310.18547) and S-LoRA
(arXiv 2311.03285) serve adapters so; here the backward exists as well, and every sum has one owner: no atomics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peftfast_kernels.lora_down import WIDE_CHUNK, make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks


class Route(NamedTuple):
    """Which adapter serves which row."""

    rows: Tensor  # int32 [M]: adapter of each row, -1 for none
    order: Tensor  # int32 [M]: row indices sorted by adapter, stable
    starts: Tensor  # int32 [G + 1]: adapter g owns order[starts[g] : starts[g + 1]]


def make_route(rows: Tensor, adapters: int) -> Route:
    """The route of a batch: ``rows`` holds one adapter index in [-1, ``adapters``) per row. Never synchronises."""
    rows = rows.to(torch.int32)
    ordered, order = torch.sort(rows, stable=True)
    bounds = torch.arange(adapters + 1, dtype=torch.int32, device=rows.device)
    return Route(rows, order.to(torch.int32), torch.searchsorted(ordered, bounds).to(torch.int32))


def _one_hot(rows: Tensor, adapters: int, dtype: torch.dtype) -> Tensor:
    """[M, G] with a one where the row belongs to the adapter; rows without an adapter are all zero."""
    return (rows[:, None] == torch.arange(adapters, device=rows.device)[None, :]).to(dtype)


def _spread(t: Tensor, rows: Tensor, adapters: int) -> Tensor:
    """t [M, R] as [M, G * R], each row in its adapter's columns: routed products are then ordinary products."""
    mine = _one_hot(rows, adapters, torch.bool)
    return torch.where(mine[:, :, None], t[:, None, :], 0).flatten(1)


def _gathered(all_ranks: Tensor, rows: Tensor, adapters: int, rank: int) -> Tensor:
    """The columns of each row's own adapter out of [M, G * R]; zero for rows without one."""
    index = rows.clamp(min=0).to(torch.int64)[:, None, None].expand(-1, 1, rank)
    own = all_ranks.view(-1, adapters, rank).gather(1, index).squeeze(1)
    return torch.where((rows >= 0)[:, None], own, 0)


def _finite(factors: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [G, ...] times their scales, zeros where an adapter's are not finite, and which adapters' are not [G]: in
    a product with all of them, infinities would reach every row."""
    scaled = factors * scales[:, None, None]
    broken = ~torch.isfinite(scaled).flatten(1).all(1)
    return torch.where(broken[:, None, None], 0, scaled), broken


def _is_in(rows: Tensor, adapters: Tensor) -> Tensor:
    """[M, 1]: whether the row's adapter is among these [G]."""
    return ((rows >= 0) & adapters[rows.clamp(min=0).to(torch.int64)])[:, None]


def _sum_over_rows(spread: Tensor, wide: Tensor, rows: Tensor, adapters: int) -> Tensor:
    """spreadᵀ wide [G * R, C] in `wide`'s accumulation dtype, where rows that are not finite reach the sum of their own
    adapter only, as NaN."""
    dtype = spread.dtype
    out = torch.zeros(spread.shape[1], wide.shape[1], dtype=dtype, device=wide.device)
    broken = torch.zeros(adapters, dtype=torch.bool, device=wide.device)
    for part in row_chunks(wide.shape[0], wide.shape[1], WIDE_CHUNK, wide.device):
        finite = torch.isfinite(wide[part]).all(1)
        broken |= (~finite[:, None] & (_one_hot(rows[part], adapters, torch.bool))).any(0)
        out.addmm_(spread[part].t(), torch.where(finite[:, None], wide[part].to(dtype), 0))
    return out.masked_fill_(broken.repeat_interleave(spread.shape[1] // adapters)[:, None], float("nan"))


# -- shrink -----------------------------------------------------------------------------------------------------------


def _down_reference(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor, a: Tensor) -> Tensor:
    dtype = accumulate_dtype(x, a)
    every = torch.einsum("mk,grk->mgr", x.to(dtype), a.to(dtype))
    return torch.einsum("mgr,mg->mr", every, _one_hot(rows, a.shape[0], dtype))


def _cases(build):
    for m, k, n, rank, adapters, dtype, pattern in (
        (37, 40, 50, 5, 3, torch.float32, "mixed"),
        (1, 33, 20, 8, 2, torch.float32, "mixed"),
        (0, 16, 16, 4, 2, torch.float32, "mixed"),
        (70, 70, 45, 24, 4, torch.float16, "mixed"),
        (40, 48, 64, 16, 1, torch.bfloat16, "base"),
        (65, 34, 33, 1, 70, torch.float32, "many"),
        (130, 40, 36, 3, 5, torch.float32, "sorted"),
    ):
        name = f"M{m}-K{k}-N{n}-R{rank}-G{adapters}-{str(dtype)[6:]}-{pattern}"
        yield Case(
            name, lambda device, c=(m, k, n, rank, adapters, dtype, pattern): build(device, *_inputs(device, *c))
        )


def _inputs(device, m, k, n, rank, adapters, dtype, pattern):
    g = torch.Generator().manual_seed(m)
    rows = torch.randint(-1, adapters, (m,), generator=g)
    if pattern == "base":
        rows.fill_(-1)
    elif pattern == "sorted":
        rows = rows.sort().values
    route = make_route(rows.to(device), adapters)
    x, dy, t = make_inputs(device, [(m, k), (m, n), (m, rank)], dtype)
    a, b = make_inputs(device, [(adapters * rank, k), (adapters * n, rank)], dtype, seed=1, std=0.2)
    scales = torch.rand(adapters, generator=g).to(device)
    return route, x, dy, t, a.view(adapters, rank, k), b.view(adapters, n, rank), scales


def _down_build(device, route, x, dy, t, a, b, scales):
    return {"x": x, **route._asdict(), "a": a}


def routed_cost(x: Tensor, factor: Tensor, products: int) -> Cost:
    """Reads of one activation [M, D] and of every adapter's factor once; `products` skinny products."""
    rank = factor.numel() // max(factor.shape[0] * x.shape[1], 1)
    moved = x.numel() * x.element_size() + factor.numel() * factor.element_size()
    return Cost(2.0 * products * x.numel() * rank, float(moved))


@op(
    reference=_down_reference,
    module="lora_routed_kernels",
    cases=lambda: _cases(_down_build),
    cost=lambda x, rows, order, starts, a: routed_cost(x, a, 1),
    fake=lambda x, rows, order, starts, a: a.new_empty(x.shape[0], a.shape[1]),
)
def routed_down(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor, a: Tensor) -> Tensor:
    """Returns t [M, R] with t_m = a[rows_m] x_m in a's dtype, zero where rows_m is -1; x [M, K], a [G, R, K]."""
    every = torch.mm(x.to(a.dtype), a.flatten(0, 1).t())
    return _gathered(every, rows, a.shape[0], a.shape[1])


# -- expand -----------------------------------------------------------------------------------------------------------


def _add_reference(
    y: Tensor, t: Tensor, rows: Tensor, order: Tensor, starts: Tensor, b: Tensor, scales: Tensor
) -> Tensor:
    dtype = accumulate_dtype(y, t, b)
    mine = _one_hot(rows, b.shape[0], dtype) * scales.to(dtype)
    return y.to(dtype) + torch.einsum("mr,gnr,mg->mn", t.to(dtype), b.to(dtype), mine)


def _add_build(device, route, x, dy, t, a, b, scales):
    return {"y": dy, "t": t, **route._asdict(), "b": b, "scales": scales}


@op(
    reference=_add_reference,
    module="lora_routed_kernels",
    cases=lambda: _cases(_add_build),
    cost=lambda y, t, rows, order, starts, b, scales: routed_cost(y, b, 1),
    fake=lambda y, t, rows, order, starts, b, scales: y.new_empty(y.shape),
)
def routed_add(y: Tensor, t: Tensor, rows: Tensor, order: Tensor, starts: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """Returns y with scales[g] b[g] t_m added to every row m of adapter g, in y's dtype, out of place.

    y [M, N], t [M, R], b [G, N, R], scales fp32 [G]. The backward's dx is the same call with p, aᵀ and scales of one.
    """
    factors, broken = _finite(b, scales)
    factors, lost = factors.transpose(1, 2).flatten(0, 1), _is_in(rows, broken)
    spread = _spread(t, rows, b.shape[0]).to(factors.dtype)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    for part in row_chunks(y.shape[0], y.shape[1], WIDE_CHUNK, y.device):
        out[part] = torch.addmm(y[part].to(factors.dtype), spread[part], factors).masked_fill_(lost[part], float("nan"))
    return out


# -- backward ---------------------------------------------------------------------------------------------------------


def _up_reference(
    dy: Tensor,
    t: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    b: Tensor,
    scales: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(dy, t, b)
    mine = _one_hot(rows, b.shape[0], dtype) * scales.to(dtype)
    p = torch.einsum("mn,gnr,mg->mr", dy.to(dtype), b.to(dtype), mine)
    return p, torch.einsum("mn,mr,mg->gnr", dy.to(dtype), t.to(dtype), mine)


def _up_build(device, route, x, dy, t, a, b, scales):
    return {"dy": dy, "t": t, **route._asdict(), "b": b, "scales": scales, "grad_dtype": torch.float32}


@op(
    reference=_up_reference,
    module="lora_routed_grad_kernels",
    cases=lambda: _cases(_up_build),
    cost=lambda dy, t, rows, order, starts, b, scales, grad_dtype: routed_cost(dy, b, 2),
    fake=lambda dy, t, rows, order, starts, b, scales, grad_dtype: (
        t.new_empty(t.shape),
        b.new_empty(b.shape, dtype=grad_dtype),
    ),
)
def routed_up_grad(
    dy: Tensor,
    t: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    b: Tensor,
    scales: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns p [M, R] with p_m = scales[g] b[g]ᵀ dy_m in t's dtype, and db [G, N, R] in ``grad_dtype``.

    dy [M, N], t [M, R], b [G, N, R], scales fp32 [G]. An adapter without rows gets a zero gradient.
    """
    adapters, n, rank = b.shape
    dtype = accumulate_dtype(dy)
    factors = (b * scales[:, None, None]).transpose(0, 1).flatten(1).to(dtype)
    spread = _spread(t, rows, adapters).to(dtype)
    every = torch.empty(dy.shape[0], adapters * rank, dtype=dtype, device=dy.device)
    for part in row_chunks(dy.shape[0], n, WIDE_CHUNK, dy.device):
        torch.mm(dy[part].to(dtype), factors, out=every[part])
    db = _sum_over_rows(spread, dy, rows, adapters)
    p, db = _gathered(every, rows, adapters, rank).to(t.dtype), db.view(adapters, rank, n)
    db = db.transpose(1, 2) * scales[:, None, None]
    return p, torch.empty(b.shape, dtype=grad_dtype, device=b.device).copy_(db)


def _down_grad_reference(
    x: Tensor, p: Tensor, rows: Tensor, order: Tensor, starts: Tensor, grad_dtype: torch.dtype
) -> Tensor:
    dtype = accumulate_dtype(x, p)
    mine = _one_hot(rows, starts.shape[0] - 1, dtype)
    return torch.einsum("mr,mk,mg->grk", p.to(dtype), x.to(dtype), mine)


def _down_grad_build(device, route, x, dy, t, a, b, scales):
    return {"x": x, "p": t, **route._asdict(), "grad_dtype": torch.float32}


@op(
    reference=_down_grad_reference,
    module="lora_routed_grad_kernels",
    cases=lambda: _cases(_down_grad_build),
    cost=lambda x, p, rows, order, starts, grad_dtype: Cost(
        2.0 * x.numel() * p.shape[1], float(x.numel() * x.element_size() + p.numel() * p.element_size())
    ),
    fake=lambda x, p, rows, order, starts, grad_dtype: x.new_empty(
        starts.shape[0] - 1, p.shape[1], x.shape[1], dtype=grad_dtype
    ),
)
def routed_down_grad(
    x: Tensor, p: Tensor, rows: Tensor, order: Tensor, starts: Tensor, grad_dtype: torch.dtype
) -> Tensor:
    """Returns da [G, R, K] in ``grad_dtype``: per adapter the sum over its rows of p_m x_mᵀ; x [M, K], p [M, R]."""
    adapters, dtype = starts.shape[0] - 1, accumulate_dtype(x)
    spread = _spread(p, rows, adapters).to(dtype)
    da = _sum_over_rows(spread, x, rows, adapters)
    return da.view(adapters, p.shape[1], x.shape[1]).to(grad_dtype)
