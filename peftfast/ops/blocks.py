"""Several low-rank linears as one autograd Function: those that read one input, and a gated MLP.

Siblings, y_i = x W_iᵀ + bias_i + s_i drop_i(x) A_iᵀ B_iᵀ: x is saved once; without dropout all A_i see it in one read,
so do their gradients, and dx is accumulated inside the products instead of being summed afterwards.

Gated MLP, down(act(gate(x)) * up(x)): saved are x, gate and up; the activation and the product are computed again in
the backward pass (as Unsloth's and Liger's do), which is 4 of 6 tensors of the intermediate size less than autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast.ops.casts import compute_copy
from peftfast.ops.function import apply, first_order
from peftfast.ops.lora import draw_seed, factor_grads
from peftfast.ops.plan import Part, Plan
from peftfast_kernels.decode import Operand, weight_nk
from peftfast_kernels.gated import gated, gated_grad
from peftfast_kernels.lora_down import lora_down, lora_dt
from peftfast_kernels.lora_gemm import lora_gemm, lora_gemm_t


class _Factors(NamedTuple):
    """What the linears of a block multiply by, one entry each."""

    plans: tuple[Plan, ...]
    a: list[Tensor]  # in the branch's dtype
    b: list[Tensor]
    seeds: Sequence[Tensor | None]
    weights: list[Operand]

    @property
    def drops(self) -> bool:
        return any(plan.dropout > 0.0 for plan in self.plans)

    def of(self, *which: int) -> _Factors:
        return _Factors(*([column[i] for i in which] for column in self))  # type: ignore[arg-type]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _down(rows: Tensor, f: _Factors) -> tuple[list[Tensor], Tensor | None]:
    """t_i = drop_i(x) A_iᵀ; where no masks differ from one read of x, and then the stacked A as well."""
    if f.drops or len(f.a) == 1:
        return [
            lora_down(rows, a, seed, plan.dropout) for a, seed, plan in zip(f.a, f.seeds, f.plans, strict=True)
        ], None  # fmt: skip
    a = torch.cat(f.a)
    return list(lora_down(rows, a, None, 0.0).split([one.shape[0] for one in f.a], dim=1)), a


def _linear(rows: Tensor, i: int, t: Tensor, bias: Tensor | None, f: _Factors) -> Tensor:
    plan = f.plans[i]
    return lora_gemm(rows, f.weights[i], None if bias is None else bias.to(plan.dtype), t, f.b[i], plan.scale)


def _t_gradients(dys: Sequence[Tensor], f: _Factors) -> tuple[list[Tensor], Tensor | None]:
    """p_i = s_i dy_i B_i, and all of them side by side [M, Σ r_i] where no masks differ and there are several."""
    ps = [lora_dt(dy, b, plan.scale) for dy, b, plan in zip(dys, f.b, f.plans, strict=True)]
    return ps, None if f.drops or len(ps) == 1 else torch.cat(ps, dim=1)


def _input_gradient(
    dys: Sequence[Tensor], ps: Sequence[Tensor], stacked: Tensor | None, stacked_a: Tensor | None, f: _Factors
) -> Tensor:
    """Σ dy_i W_i + drop_i'(p_i A_i) [M, K]."""
    if f.drops:
        dx = None
        for i, (dy, p) in enumerate(zip(dys, ps, strict=True)):
            part = lora_gemm_t(dy, f.weights[i], p, f.a[i], f.seeds[i], f.plans[i].dropout)
            dx = part if dx is None else dx.add_(part)
        return dx
    p, a = (ps[0], f.a[0]) if stacked is None else (stacked, torch.cat(f.a) if stacked_a is None else stacked_a)
    dx = lora_gemm_t(dys[0], f.weights[0], p, a, None, 0.0)
    for dy, w in zip(dys[1:], f.weights[1:], strict=True):
        dx.addmm_(dy, weight_nk(w, dx.dtype))
    return dx


def _factor_gradients(
    dys: Sequence[Tensor],
    ts: Sequence[Tensor],
    rows: Tensor | None,
    ps: Sequence[Tensor],
    stacked: Tensor | None,
    f: _Factors,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """dB_i = s_i dy_iᵀ t_i, and dA_i = p_iᵀ drop_i(x) where x is given: from one read of it where no masks differ."""
    dbs, das = [], []
    for i, (dy, t, p, seed, plan) in enumerate(zip(dys, ts, ps, f.seeds, f.plans, strict=True)):
        if stacked is None:
            db, da = factor_grads(dy, t, rows, p, seed, plan, db_dtype, da_dtype)
        else:  # the first call brings all dA
            db, da = factor_grads(dy, t, rows if i == 0 else None, stacked, None, plan, db_dtype, da_dtype)
        dbs.append(db)
        das.append(da)
    return dbs, das if rows is None or stacked is None else list(das[0].split([p.shape[1] for p in ps]))


class _Shared:
    """What both Functions keep and read back: the flat arguments (a..., b..., bias..., seed..., stored...)."""

    @staticmethod
    def unpack(plans: tuple[Plan, ...], counts: tuple[int, ...], flat: Sequence[Any]) -> tuple:
        n = len(plans)
        a, b, bias, seeds = (flat[i * n : (i + 1) * n] for i in range(4))
        stored, start = [], 4 * n
        for plan, count in zip(plans, counts, strict=True):
            stored.append(plan.weight(flat[start : start + count]))
            start += count
        return a, b, bias, seeds, stored

    @staticmethod
    def factors(plans: tuple[Plan, ...], counts: tuple[int, ...], flat: Sequence[Any]) -> tuple[_Factors, list]:
        """The factors in the branch's dtype, and those copies that live longer than the call anyway."""
        a, b, _, seeds, weights = _Shared.unpack(plans, counts, flat)
        copies = [compute_copy(f, plan.branch) for fs in (a, b) for f, plan in zip(fs, plans, strict=True)]
        n = len(plans)
        made = [copy for copy, _ in copies]
        return _Factors(plans, made[:n], made[n:], seeds, weights), [copy if keep else None for copy, keep in copies]

    @staticmethod
    def again(ctx: Any, flat: Sequence[Any]) -> _Factors:
        """In the backward pass."""
        a, b, _, seeds, weights = _Shared.unpack(ctx.plans, ctx.counts, flat)
        n = len(ctx.plans)
        branches = [plan.branch for plan in ctx.plans] * 2
        made = [f.to(d) if c is None else c for f, c, d in zip((*a, *b), ctx.copies, branches, strict=True)]
        return _Factors(ctx.plans, made[:n], made[n:], seeds, weights)


def _siblings(
    x: Tensor, f: _Factors, bias: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], list[Tensor], Tensor | None]:
    """The outputs [..., N_i], all t_i, and the stacked A if there is one."""
    rows = _rows(x).to(f.plans[0].dtype)
    ts, a = _down(rows, f)
    ys = (_linear(rows, i, t, one, f) for i, (t, one) in enumerate(zip(ts, bias, strict=True)))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys), ts, a


def _mlp(x: Tensor, act: str, f: _Factors, bias: Sequence[Tensor | None]) -> tuple[Tensor, tuple]:
    """The output [..., N], and gate, up, t_gate, t_up, t_down, and the stacked A of the two if there is one."""
    rows = _rows(x).to(f.plans[0].dtype)
    (t_gate, t_up), a = _down(rows, f.of(0, 1))
    gate = _linear(rows, 0, t_gate, bias[0], f)
    up = _linear(rows, 1, t_up, bias[1], f)
    hidden = gated(gate, up, act)
    (t_down,), _ = _down(hidden, f.of(2))
    y = _linear(hidden, 2, t_down, bias[2], f)
    return y.view(*x.shape[:-1], y.shape[1]), (gate, up, t_gate, t_up, t_down, a)


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plans: tuple[Plan, ...], counts: tuple[int, ...], *flat: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plans, ctx.counts = plans, counts
        f, ctx.copies = _Shared.factors(plans, counts, flat)
        n = len(plans)
        ys, ts, a = _siblings(x, f, flat[2 * n : 3 * n])
        ctx.save_for_backward(x, a, *ts, *flat[: 2 * n], *(None,) * n, *flat[3 * n :])
        return ys

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor | None) -> tuple:
        plans, n = ctx.plans, len(ctx.plans)
        x, a, *rest = ctx.saved_tensors
        ts, flat = rest[:n], rest[n:]
        f = _Shared.again(ctx, flat)
        used = [i for i, dy in enumerate(dys) if dy is not None]
        f = f.of(*used)
        dys_rows = [_rows(dys[i]) for i in used]
        ps, stacked = _t_gradients(dys_rows, f)
        needs = ctx.needs_input_grad
        dx = None
        if needs[0]:
            dx = _input_gradient(dys_rows, ps, stacked, a if len(used) == n else None, f).to(x.dtype).view(x.shape)
        rows = _rows(x).to(plans[0].dtype) if any(needs[3 : 3 + n]) else None
        found = _factor_gradients(dys_rows, [ts[i] for i in used], rows, ps, stacked, f, flat[n].dtype, flat[0].dtype)
        dbs, das = (dict(zip(used, grads, strict=True)) for grads in found)
        dbias = [dys_rows[used.index(i)].sum(0) if i in used and needs[3 + 2 * n + i] else None for i in range(n)]
        return (
            dx, None, None, *(das.get(i) for i in range(n)), *(dbs.get(i) for i in range(n)), *dbias,
            *(None for _ in flat[3 * n :]),
        )  # fmt: skip


class _GatedMlp(torch.autograd.Function):
    """Order of the three linears everywhere: gate, up, down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str, plans: tuple[Plan, ...], counts: tuple[int, ...], *flat: Any) -> Tensor:
        ctx.plans, ctx.counts, ctx.act = plans, counts, act
        f, ctx.copies = _Shared.factors(plans, counts, flat)
        y, kept = _mlp(x, act, f, flat[6:9])
        ctx.save_for_backward(x, *kept, *flat[:6], *(None,) * 3, *flat[9:])
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple:
        plans, needs = ctx.plans, ctx.needs_input_grad
        x, gate, up, t_gate, t_up, t_down, a, *flat = ctx.saved_tensors
        f = _Shared.again(ctx, flat)
        dy = _rows(dy)
        last, db_dtype, da_dtype = f.of(2), flat[3].dtype, flat[0].dtype
        ps, _ = _t_gradients([dy], last)
        hidden, d_gate, d_up = gated_grad(_input_gradient([dy], ps, None, None, last), gate, up, ctx.act)
        rows = hidden if needs[6] else None
        (db_down,), (da_down,) = _factor_gradients([dy], [t_down], rows, ps, None, last, db_dtype, da_dtype)
        del hidden, rows
        dbias = [None, None, dy.sum(0) if needs[12] else None]
        pair = f.of(0, 1)
        ps, stacked = _t_gradients([d_gate, d_up], pair)
        dx = None
        if needs[0]:
            dx = _input_gradient([d_gate, d_up], ps, stacked, a, pair).to(x.dtype).view(x.shape)
        rows = _rows(x).to(plans[0].dtype) if needs[4] or needs[5] else None
        dbs, das = _factor_gradients([d_gate, d_up], [t_gate, t_up], rows, ps, stacked, pair, db_dtype, da_dtype)
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
    flat += [draw_seed(x, plan.dropout) for plan in plans]
    for part in parts:
        flat += part.w.tensors
    return plans, counts, flat


def fit_together(parts: Sequence[Part]) -> bool:
    """Whether one Function can compute these: one dtype of the products, one of the factors."""
    first = parts[0]
    return all(
        p.w.dtype == first.w.dtype and p.a.dtype == first.a.dtype and p.b.dtype == first.b.dtype for p in parts[1:]
    )


def lora_siblings(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of linears that share the input x [..., K]; `fit_together(parts)` must hold."""
    plans, counts, flat = _arguments(x, parts)
    if not torch.is_grad_enabled():
        n = len(plans)
        return _siblings(x, _Shared.factors(plans, counts, flat)[0], flat[2 * n : 3 * n])[0]
    return apply(_Siblings, x, plans, counts, *flat)


def gated_mlp(x: Tensor, gate: Part, up: Part, down: Part, activation: str) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [..., K], gate and up [K -> I], down [I -> N]; `activation` is one of
    `peftfast_kernels.gated.ACTIVATIONS`; `fit_together` must hold for the three."""
    plans, counts, flat = _arguments(x, (gate, up, down))
    if not torch.is_grad_enabled():
        return _mlp(x, activation, _Shared.factors(plans, counts, flat)[0], flat[6:9])[0]
    return apply(_GatedMlp, x, activation, plans, counts, *flat)
