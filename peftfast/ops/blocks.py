"""Several low-rank linears as one autograd Function: those that read one input, and a gated MLP.

Siblings, y_i = x W_iᵀ + bias_i + s_i drop_i(x) A_iᵀ B_iᵀ: x is saved once, every step is one call for all of them
(`peftfast_kernels.siblings`), and dx is accumulated inside the products instead of being summed afterwards.

Gated MLP, down(act(gate(x)) * up(x)): saved are x, gate and up; the activation and the product are computed again in
the backward pass (as Unsloth's and Liger's do), which is 4 of 6 tensors of the intermediate size less than autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops.casts import compute_copies, copies_again
from peftfast.ops.function import apply, as_dtype, as_rows, fresh, gradients_of, second_order, shaped_as
from peftfast.ops.lora import draw_seeds, formula
from peftfast.ops.plan import Part, Plan
from peftfast_kernels.decode import Operand
from peftfast_kernels.gated import ACTIVATIONS, gated, gated_grad
from peftfast_kernels.siblings import siblings_down, siblings_dt, siblings_factor_grads
from peftfast_kernels.siblings_gemm import siblings_gemm, siblings_gemm_t


class _Factors(NamedTuple):
    """What the linears of a block multiply by, one entry each."""

    plans: tuple[Plan, ...]
    a: list[Tensor]  # in the branch's dtype
    b: list[Tensor]
    seeds: list[Tensor | None]
    weights: list[Operand]

    @property
    def drops(self) -> list[float]:
        return [plan.dropout for plan in self.plans]

    @property
    def scales(self) -> list[float]:
        return [plan.scale for plan in self.plans]

    def of(self, *which: int) -> _Factors:
        return _Factors(*([column[i] for i in which] for column in self))  # type: ignore[arg-type]


def _down(rows: Tensor, f: _Factors) -> list[Tensor]:
    """t_i = drop_i(x) A_iᵀ."""
    return siblings_down(rows, f.a, f.seeds, f.drops)


def _outputs(rows: Tensor, ts: list[Tensor], bias: Sequence[Tensor | None], f: _Factors) -> list[Tensor]:
    """y_i = x W_iᵀ + bias_i + s_i t_i B_iᵀ."""
    cast = [None if one is None else one.to(plan.dtype) for one, plan in zip(bias, f.plans, strict=True)]
    return siblings_gemm(rows, f.weights, cast, ts, f.b, f.scales)


def _input_gradient(dys: list[Tensor], ps: list[Tensor], f: _Factors) -> Tensor:
    """Σ dy_i W_i + drop_i'(p_i A_i) [M, K]."""
    return siblings_gemm_t(dys, f.weights, ps, f.a, f.seeds, f.drops)


def _factor_gradients(
    dys: list[Tensor], ts: list[Tensor], x: Tensor, ps: list[Tensor], f: _Factors, need_a: bool, need_b: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """dA_i = p_iᵀ drop_i(x) and dB_i = s_i dy_iᵀ t_i in these dtypes, as far as they are needed."""
    n = len(dys)
    none = [None] * n
    if not (need_a or need_b):
        return none, none
    rows = as_rows(x).to(f.plans[0].dtype) if need_a else None
    da_dtype, db_dtype = dtypes
    grads = siblings_factor_grads(dys, ts, rows, ps, f.seeds, f.drops, f.scales, db_dtype, da_dtype)
    return grads[n:] if need_a else none, grads[:n]


# What both Functions keep and read back: the flat arguments (a..., b..., bias..., seed..., stored...).


def _unpack(plans: tuple[Plan, ...], counts: tuple[int, ...], flat: Sequence[Any]) -> tuple:
    n = len(plans)
    a, b, _, seeds = (flat[i * n : (i + 1) * n] for i in range(4))
    stored, start = [], 4 * n
    for plan, count in zip(plans, counts, strict=True):
        stored.append(plan.weight(flat[start : start + count]))
        start += count
    return a, b, list(seeds), stored


def _factors(plans: tuple[Plan, ...], counts: tuple[int, ...], flat: Sequence[Any]) -> tuple[_Factors, list]:
    """The factors in the branch's dtype, and what `copies_again` wants of each pair."""
    a, b, seeds, weights = _unpack(plans, counts, flat)
    each = [compute_copies(*pair, plan.branch) for *pair, plan in zip(a, b, plans, strict=True)]
    downs, ups, copies = map(list, zip(*each, strict=True))
    return _Factors(plans, downs, ups, seeds, weights), copies


def _factors_again(ctx: Any, flat: Sequence[Any]) -> _Factors:
    """In the backward pass."""
    a, b, seeds, weights = _unpack(ctx.plans, ctx.counts, flat)
    each = [copies_again(*one, plan.branch) for *one, plan in zip(ctx.copies, a, b, ctx.plans, strict=True)]
    downs, ups = map(list, zip(*each, strict=True))
    return _Factors(ctx.plans, downs, ups, seeds, weights)


def _siblings(x: Tensor, f: _Factors, bias: Sequence[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The outputs [..., N_i] and all t_i."""
    rows = as_rows(x).to(f.plans[0].dtype)
    ts = _down(rows, f)
    return tuple([shaped_as(y, x) for y in _outputs(rows, ts, bias, f)]), ts


def _mlp(x: Tensor, act: str, f: _Factors, bias: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output [..., N], and gate, up, t_gate, t_up, t_down."""
    rows, pair, last = as_rows(x).to(f.plans[0].dtype), f.of(0, 1), f.of(2)
    ts = _down(rows, pair)
    gate, up = _outputs(rows, ts, bias[:2], pair)
    hidden = gated(gate, up, act)
    t_down = _down(hidden, last)
    (y,) = _outputs(hidden, t_down, bias[2:], last)
    return shaped_as(y, x), (gate, up, *ts, *t_down)


def _siblings_again(ctx: Any, *dys: Tensor | None) -> tuple:
    n = len(ctx.plans)
    x, *rest = ctx.saved_tensors
    a, b, seeds, weights = _unpack(ctx.plans, ctx.counts, rest[n:])
    needs = ctx.needs_input_grad[3 : 3 + 3 * n]
    used = [dy is not None for dy in dys]
    pairs = zip(weights, a, b, seeds, ctx.plans, strict=True)
    ys = [formula(as_rows(x), *one) for one, use in zip(pairs, used, strict=True) if use]
    given = [as_rows(dy) for dy in dys if dy is not None]
    needed = [ctx.needs_input_grad[0], *(need and use for need, use in zip(needs, used * 2, strict=False))]
    grads = gradients_of(torch.cat(ys, dim=1).to(given[0].dtype), (x, *a, *b), needed, torch.cat(given, dim=1))
    dbias = [
        as_rows(dy).sum(0) if dy is not None and need else None for dy, need in zip(dys, needs[2 * n :], strict=True)
    ]
    return grads[0], None, None, *grads[1:], *dbias, *(None for _ in rest[4 * n :])


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plans: tuple[Plan, ...], counts: tuple[int, ...], *flat: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plans, ctx.counts = plans, counts
        f, ctx.copies = _factors(plans, counts, flat)
        n = len(plans)
        ys, ts = _siblings(x, f, flat[2 * n : 3 * n])
        ctx.save_for_backward(x, *ts, *flat[: 2 * n], *(None,) * n, *flat[3 * n :])
        return tuple(map(fresh, ys))

    @staticmethod
    @second_order(_siblings_again)
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        n = len(ctx.plans)
        x, *rest = ctx.saved_tensors
        ts, flat = rest[:n], rest[n:]
        f = _factors_again(ctx, flat)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        f = f.of(*used)
        dys_rows = [as_rows(dys[i]) for i in used]
        ps = siblings_dt(dys_rows, f.b, f.scales)
        needs = ctx.needs_input_grad
        dx = None
        if needs[0]:
            dx = torch.reshape(as_dtype(_input_gradient(dys_rows, ps, f), x.dtype), x.shape)
        need_a, need_b = any(needs[3 : 3 + n]), any(needs[3 + n : 3 + 2 * n])
        dtypes = (flat[0].dtype, flat[n].dtype)
        found = _factor_gradients(dys_rows, [ts[i] for i in used], x, ps, f, need_a, need_b, dtypes)
        das, dbs = (dict(zip(used, grads, strict=True)) for grads in found)
        dbias = [dys_rows[used.index(i)].sum(0) if i in used and needs[3 + 2 * n + i] else None for i in range(n)]
        return (
            dx, None, None, *(das.get(i) for i in range(n)), *(dbs.get(i) for i in range(n)), *dbias,
            *(None for _ in flat[3 * n :]),
        )  # fmt: skip


def _mlp_again(ctx: Any, dy: Tensor) -> tuple:
    x, _, _, _, _, _, *flat = ctx.saved_tensors
    a, b, seeds, weights = _unpack(ctx.plans, ctx.counts, flat)
    bias = flat[6:9]

    def linear(rows: Tensor, i: int) -> Tensor:
        y = formula(rows, weights[i], a[i], b[i], seeds[i], ctx.plans[i])
        return y if bias[i] is None else y + bias[i].to(y.dtype)

    rows = as_rows(x)
    y = linear(ACTIVATIONS[ctx.act].forward(linear(rows, 0)) * linear(rows, 1), 2)
    needs = ctx.needs_input_grad
    dx, *grads = gradients_of(y.to(dy.dtype), (x, *a, *b, *bias), (needs[0], *needs[4:13]), as_rows(dy))
    return dx, None, None, None, *grads, *(None for _ in flat[9:])


class _GatedMlp(torch.autograd.Function):
    """Order of the three linears everywhere: gate, up, down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str, plans: tuple[Plan, ...], counts: tuple[int, ...], *flat: Any) -> Tensor:
        ctx.plans, ctx.counts, ctx.act = plans, counts, act
        f, ctx.copies = _factors(plans, counts, flat)
        y, kept = _mlp(x, act, f, flat[6:9])
        ctx.save_for_backward(x, *kept, *flat)
        return fresh(y)

    @staticmethod
    @second_order(_mlp_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        needs = ctx.needs_input_grad
        x, gate, up, t_gate, t_up, t_down, *flat = ctx.saved_tensors
        f = _factors_again(ctx, flat)
        dy = as_rows(dy)
        last, dtypes = f.of(2), (flat[0].dtype, flat[3].dtype)
        ps = siblings_dt([dy], last.b, last.scales)
        hidden, d_gate, d_up = gated_grad(_input_gradient([dy], ps, last), gate, up, ctx.act)
        (da_down,), (db_down,) = _factor_gradients([dy], [t_down], hidden, ps, last, needs[6], needs[9], dtypes)
        del hidden
        dbias = [None, None, dy.sum(0) if needs[12] else None]
        pair = f.of(0, 1)
        ps = siblings_dt([d_gate, d_up], pair.b, pair.scales)
        dx = None
        if needs[0]:
            dx = torch.reshape(as_dtype(_input_gradient([d_gate, d_up], ps, pair), x.dtype), x.shape)
        need_a, need_b = needs[4] or needs[5], needs[7] or needs[8]
        das, dbs = _factor_gradients([d_gate, d_up], [t_gate, t_up], x, ps, pair, need_a, need_b, dtypes)
        for i, d in ((0, d_gate), (1, d_up)):
            dbias[i] = d.sum(0) if needs[10 + i] else None
        return (
            dx, None, None, None, *das, da_down, *dbs, db_down, *dbias, *(None for _ in flat[9:]),
        )  # fmt: skip


def _arguments(x: Tensor, parts: Sequence[Part]) -> tuple[tuple[Plan, ...], tuple[int, ...], list[Any]]:
    plans = tuple([part.plan for part in parts])
    counts = tuple([len(part.w.tensors) for part in parts])
    flat: list[Any] = [part.a for part in parts]
    flat += [part.b for part in parts]
    flat += [part.bias for part in parts]
    flat += draw_seeds(x, plans)
    for part in parts:
        flat += part.w.tensors
    return plans, counts, flat


def fit_together(parts: Sequence[Part]) -> bool:
    """Whether one Function can compute these: one dtype of the products, one of the factors."""
    return len({(part.w.dtype, part.a.dtype, part.b.dtype) for part in parts}) == 1


def lora_siblings(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of linears that share the input x [..., K]; `fit_together(parts)` must hold."""
    plans, counts, flat = _arguments(x, parts)
    if not torch.is_grad_enabled():
        n = len(plans)
        return _siblings(x, _factors(plans, counts, flat)[0], flat[2 * n : 3 * n])[0]
    return apply(_Siblings, x, plans, counts, *flat)


def gated_mlp(x: Tensor, gate: Part, up: Part, down: Part, activation: str) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [..., K], gate and up [K -> I], down [I -> N]; `activation` is one of
    `peftfast_kernels.gated.ACTIVATIONS`; `fit_together` must hold for the three."""
    plans, counts, flat = _arguments(x, (gate, up, down))
    if not torch.is_grad_enabled():
        return _mlp(x, activation, _factors(plans, counts, flat)[0], flat[6:9])[0]
    return apply(_GatedMlp, x, activation, plans, counts, *flat)
