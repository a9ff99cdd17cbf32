"""y[i] = x[i] W[e]ᵀ + s · x[i] A[e]ᵀ B[e]ᵀ for rows sorted by their expert e: only what is routed is multiplied, and no
expert's W + s B A is ever formed.

Saved for the backward pass: the rows, t = s · x Aᵀ [S, r], and the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.ops.function import apply, gradients_of, second_order

#: Up to so many runs of rows a loop over them takes less time on a CPU than the grouped product.
_LOOPED = 8
#: What `grouped_mm` multiplies faster than a loop does.
_GROUPED = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}


class Groups:
    """Pairs of a token and one of its experts, in the experts' order.

    Args:
        experts: [T, k] int64, the experts of every token. count: how many experts there are.

    Attributes:
        order: [S] int64, S = T k: the position in `experts.flatten()` of every pair. experts: [S], its expert.
    """

    def __init__(self, experts: Tensor, count: int) -> None:
        self.experts, self.order = torch.sort(experts.reshape(-1), stable=True)
        self.count = count
        numbers = torch.arange(count, device=experts.device)
        self._ends = torch.searchsorted(self.experts, numbers, right=True).to(torch.int32)  # on the device, no waiting
        self._runs: list[tuple[int, int, int]] | None = None
        self._hit: tuple[Groups, Tensor | None] | None = None

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of every expert that has rows. The host waits for the device."""
        if self._runs is None:
            ends = self._ends.tolist()
            self._runs = [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > s]
        return self._runs

    @property
    def hit(self) -> tuple[Groups, Tensor | None]:
        """The same rows with only the experts that have any, numbered from 0 on, and those experts [count]; `self` and
        None, where that would be most of them or the host does not know."""
        if self._hit is None:
            self._hit = (self, None)
            if self.experts.is_cpu and 0 < 4 * len(self.runs) <= self.count:
                new = Groups.__new__(Groups)
                new.experts, new.order, new.count = self.experts, self.order, len(self.runs)
                new._runs = [(i, s, t) for i, (_, s, t) in enumerate(self.runs)]
                new._ends = torch.tensor([t for _, _, t in self.runs], dtype=torch.int32)
                self._hit = (new, torch.tensor([e for e, _, _ in self.runs]))
        return self._hit

    def _takes(self, x: Tensor, w: Tensor) -> bool:
        """Whether torch's grouped product multiplies these, and does it faster than a loop."""
        if x.dtype is not w.dtype or x.dtype not in _GROUPED.get(x.device.type, ()):
            return False
        return not (x.is_cpu and len(self.runs) <= _LOOPED) and _is_aligned(x) and _is_aligned(w)

    def _in_step(self, x: Tensor, w: Tensor) -> bool:
        """Whether row i is expert i's, as where one token is decoded and only its experts are numbered."""
        return x.shape[0] == w.shape[0] == len(self.runs) and x.dtype is w.dtype

    def mm(self, x: Tensor, w: Tensor) -> Tensor:
        """[S, N]: every row of x [S, K] times its expert's w [count, K, N], which may be of another dtype."""
        if self._takes(x, w):
            return F.grouped_mm(x, w, offs=self._ends)
        if self._in_step(x, w):
            return torch.bmm(x.unsqueeze(1), w).squeeze(1)
        y = x.new_empty(x.shape[0], w.shape[2])
        for e, s, t in self.runs:
            torch.mm(x[s:t], w[e] if w.dtype is x.dtype else w[e].to(x.dtype), out=y[s:t])
        return y

    def add_mm(self, y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """`mm` added to y in place."""
        if not y.is_cpu and self._takes(x, w):
            return y.add_(self.mm(x, w))
        if self._in_step(x, w):
            y.unsqueeze(1).baddbmm_(x.unsqueeze(1), w)
            return y
        for e, s, t in self.runs:
            torch.addmm(y[s:t], x[s:t], w[e], out=y[s:t])
        return y

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """[count, M, N]: xᵀ y over the rows of each expert, for x [S, M] and y [S, N]."""
        if self._takes(x.t(), y):
            return F.grouped_mm(x.t(), y, offs=self._ends)
        out = x.new_zeros(self.count, x.shape[1], y.shape[1])
        for e, s, t in self.runs:
            torch.mm(x[s:t].t(), y[s:t], out=out[e])
        return out


def _is_aligned(t: Tensor) -> bool:
    """What `grouped_mm` asks of an operand: one dimension dense, everything else at multiples of 16 bytes."""
    *outer, rows, columns = t.stride()
    dense, other = (columns, rows) if columns == 1 else (rows, columns)
    return dense == 1 and all(s * t.element_size() % 16 == 0 for s in (other, *outer))


def _composed(x: Tensor, a: Tensor, b: Tensor, w: Tensor, groups: Groups, scale: float) -> Tensor:
    """The formula of `_ExpertsLinear` in torch's own operations."""
    hit, _ = groups.hit
    rows = []
    for (e, s, t), (i, _, _) in zip(groups.runs, hit.runs, strict=True):
        branch = (x[s:t].to(a.dtype) @ a[i].t()) @ b[i].t() * scale
        rows.append(((x[s:t] @ w[e].to(x.dtype)).to(a.dtype) + branch).to(x.dtype))
    return torch.cat(rows)


def _again(ctx: Any, dy: Tensor) -> tuple:
    """The gradients, in operations that torch can differentiate."""
    x, _, a, b, w = ctx.saved_tensors
    if a is None:
        return torch.cat([dy[s:t] @ w[e].t().to(dy.dtype) for e, s, t in ctx.groups.runs]), *(None,) * 5
    y = _composed(x, a, b, w, ctx.groups, ctx.scale)
    return (*gradients_of(y, (x, a, b), ctx.needs_input_grad[:3], dy), None, None, None)


class _ExpertsLinear(torch.autograd.Function):
    """`w` is frozen; a [count, r, K] and b [count, N, r], of the branch's dtype, are numbered as `groups.hit` numbers
    experts, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, w: Tensor, groups: Groups, scale: float
    ) -> Tensor:
        y, t = _product(x, a, b, w, groups, scale)
        ctx.groups, ctx.scale = groups, scale
        ctx.save_for_backward(None if a is None else x, t, a, b, w)
        return y

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, w = ctx.saved_tensors
        groups, (hit, _) = ctx.groups, ctx.groups.hit
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        dx = groups.mm(dy, w.transpose(1, 2)) if need_x else None
        if a is None:
            return dx, None, None, None, None, None
        branch, kind = a.dtype, dy.dtype
        dy = dy.to(branch)
        p = hit.mm(dy, b).mul_(ctx.scale) if need_x or need_a else None
        dx = hit.add_mm(dx.to(branch), p, a).to(kind) if need_x else None
        da = hit.outer(p, x.to(branch)) if need_a else None
        db = hit.outer(dy, t) if need_b else None
        return dx, da, db, None, None, None


def _product(
    x: Tensor, a: Tensor | None, b: Tensor | None, w: Tensor, groups: Groups, scale: float
) -> tuple[Tensor, Tensor | None]:
    y = groups.mm(x, w)
    if a is None:
        return y, None
    hit, _ = groups.hit
    t = hit.mm(x.to(a.dtype), a.transpose(1, 2)).mul_(scale)
    return hit.add_mm(y.to(a.dtype), t, b.transpose(1, 2)).to(x.dtype), t


def experts_linear(x: Tensor, w: Tensor, groups: Groups, change: tuple[Tensor, Tensor, Any] | None) -> Tensor:
    """Every row times its own expert's weight, and factors.

    Args:
        x: [S, K], sorted as `groups` is, in the dtype of the product and of the result.
        w: frozen, [E, K, N] (a view of [E, N, K] where it is stored so).
        change: a and b as `per_expert` takes them, and s. Gradients arrive in their layout and dtypes.

    Returns:
        [S, N] in x's dtype.
    """
    a, b, scale = (None, None, 1.0) if change is None else change
    if a is not None:
        _, experts = groups.hit
        # half-precision products of a few columns are slow on a CPU; elsewhere the grouped product wants them
        branch = torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype
        if experts is None:  # a cast first makes less to move
            a, b = a.to(branch), b.to(branch)
        a, b = (f.to(branch) for f in per_expert(a, b, groups.count, experts))
    if not torch.is_grad_enabled():
        return _product(x, a, b, w, groups, scale)[0]
    return apply(_ExpertsLinear, x, a, b, w, groups, scale)


def per_expert(a: Tensor, b: Tensor, count: int, experts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors as they are kept, a [E·r, K] with the expert the slowest and b [N, r·E] with the expert the fastest, as
    [E, r, K] and [E, N, r]; of some `experts` only, if given."""
    a = a.view(count, -1, a.shape[1])
    columns = b.view(-1, count)  # [N·r, E]
    if experts is not None:
        a, columns = a.index_select(0, experts), columns.index_select(1, experts)
    return a, columns.t().contiguous().view(columns.shape[1], b.shape[0], -1)
