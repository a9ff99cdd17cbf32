"""y[i] = x[i] W[e]ᵀ + s · x[i] A[e]ᵀ B[e]ᵀ for rows sorted by their expert e: only what is routed is multiplied, and no
expert's W + s B A is ever formed. Rows may have different adapters' factors, or none.

Saved for the backward pass: the rows, t = s · x Aᵀ [S, r], and the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.ops.function import apply, fresh, gradients_of, second_order

#: Up to so many runs of rows a loop over them takes less time on a CPU than the grouped product.
_LOOPED = 8
#: With fewer rows a run than this, a grouped product and a sum take less time on a CPU than a loop that adds.
_THIN = 4
#: What `grouped_mm` multiplies faster than a loop does, on GPUs of `_GROUPING`.
_GROUPED = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
#: Major compute capabilities for which torch has a grouped product; on others it loops, and makes the host wait.
_GROUPING = (9, 10)


class LowRank(NamedTuple):
    """A change s · B A of a Parameter: a [E·r, K] with the expert the slowest and b [N, r·E] with it the fastest."""

    a: Tensor
    b: Tensor
    scale: Any


class Runs:
    """Rows in runs, one for each of some matrices; a matrix may have no rows.

    Args:
        count: how many matrices there are. ends: int32 [count], the row after the last one of each.
        runs: (matrix, first row, row after the last) of all that have rows, where the host knows.
    """

    def __init__(self, count: int, ends: Tensor, runs: list[tuple[int, int, int]] | None = None) -> None:
        self.count, self._ends, self._runs = count, ends, runs

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(matrix, first row, row after the last) of all that have rows. The host waits for the device."""
        if self._runs is None:
            ends = _on_host(self._ends)
            self._runs = [(e, s, t) for e, (s, t) in enumerate(zip([0, *ends], ends, strict=False)) if t > s]
        return self._runs

    def _takes(self, x: Tensor, w: Tensor) -> bool:
        """Whether torch's grouped product multiplies these, and does it faster than a loop."""
        if x.dtype is not w.dtype or x.dtype not in _GROUPED.get(x.device.type, ()):
            return False
        if x.is_cuda and _capability(x.device) not in _GROUPING:
            return False
        return not (x.is_cpu and len(self.runs) <= _LOOPED) and _is_aligned(x) and _is_aligned(w)

    def _in_step(self, x: Tensor, w: Tensor) -> bool:
        """Whether row i is matrix i's, as where one token is decoded and only its experts are numbered."""
        return x.shape[0] == w.shape[0] == len(self.runs) and x.dtype is w.dtype

    def mm(self, x: Tensor, w: Tensor) -> Tensor:
        """[S, N]: every row of x [S, K] times the w [count, K, N] of its run, which may be of another dtype."""
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
        # where a GPU multiplies all groups at once, the host need not know how long they are
        if not (x.is_cuda and self._takes(x, w)) and self._in_step(x, w):
            y.unsqueeze(1).baddbmm_(x.unsqueeze(1), w)
            return y
        if not (y.is_cpu and len(self.runs) * _THIN <= x.shape[0]) and self._takes(x, w):
            return y.add_(self.mm(x, w))
        for e, s, t in self.runs:
            torch.addmm(y[s:t], x[s:t], w[e], out=y[s:t])
        return y

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """[count, M, N]: xᵀ y over the rows of each run, for x [S, M] and y [S, N]."""
        if self._takes(x.t(), y):
            out = F.grouped_mm(x.t(), y, offs=self._ends)
            if x.is_cuda and _capability(x.device) == 10:  # where no rows may give something (pytorch#172439)
                none = torch.diff(self._ends, prepend=self._ends.new_zeros(1)) == 0
                out.masked_fill_(none[:, None, None], 0.0)
            return out
        out = x.new_zeros(self.count, x.shape[1], y.shape[1])
        for e, s, t in self.runs:
            torch.mm(x[s:t].t(), y[s:t], out=out[e])
        return out


def _on_host(numbers: Tensor) -> list[int]:
    if numbers.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Which experts are routed to has to be known to the host for these dtypes and ranks, and always with an "
            "adapter a row, so that no CUDA graph can be captured; run this model without capturing it"
        )
    return numbers.tolist()


class Branch(NamedTuple):
    """How rows meet the factors that are gathered for them."""

    runs: Runs  # numbered as the factors are
    scale: Any  # a number, or [S', 1]
    rows: Tensor | None = None  # [S'], the rows that have factors, in the order of the runs; None: all, as they are

    def own(self, x: Tensor) -> Tensor:
        """The rows that have factors."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def add_mm(self, y: Tensor, t: Tensor, w: Tensor) -> Tensor:
        """y with t times the w of its run added to the rows that have one; may be in place."""
        if self.rows is None:
            return self.runs.add_mm(y.to(t.dtype), t, w).to(y.dtype)
        own = self.runs.add_mm(y.index_select(0, self.rows).to(t.dtype), t, w)
        return y.index_copy_(0, self.rows, own.to(y.dtype))


class Groups(Runs):
    """Pairs of a token and one of its experts, in the experts' order.

    Args:
        experts: [T, k] int64, the experts of every token. count: how many experts there are.

    Attributes:
        order: [S] int64, S = T k: the position in `experts.flatten()` of every pair. experts: [S], its expert.
    """

    def __init__(self, experts: Tensor, count: int) -> None:
        self.experts, self.order = torch.sort(experts.reshape(-1), stable=True)
        numbers = torch.arange(count, device=experts.device)
        # on the device, no waiting
        super().__init__(count, torch.searchsorted(self.experts, numbers, right=True).to(torch.int32))
        self._hit: tuple[Runs, Tensor | None] | None = None

    @property
    def hit(self) -> tuple[Runs, Tensor | None]:
        """The same rows with only the experts that have any, numbered from 0 on, and those experts [count]; `self` and
        None, where that would be most of them or the host does not know."""
        if self._hit is None:
            self._hit = (self, None)
            if self.experts.is_cpu and 0 < len(self.runs) and _is_few(len(self.runs), self.count):
                experts = [e for e, _, _ in self.runs]
                self._hit = (_runs_of([t - s for _, s, t in self.runs], self._ends), torch.tensor(experts))
        return self._hit

    def gather(self, change: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor, Branch]:
        """Factors a [count, r, K] and b [count, N, r] of a change in `dtype`, and how rows meet them."""
        runs, experts = self.hit
        a, b, scale = change
        if experts is None:  # a cast first makes less to move
            a, b = a.to(dtype), b.to(dtype)
        a, b = per_expert(a, b, self.count, experts)
        return a.to(dtype), b.to(dtype), Branch(runs, scale)


class _Share(NamedTuple):
    """What a change of `MixedGroups` has part in."""

    change: int
    experts: slice  # among all pairs of a change and an expert
    rows: int


class MixedGroups(Groups):
    """Groups in which every token has a change of its own, or none. Only those pairs of a change and an expert that
    tokens are routed to are looked at, whatever else there is. The host waits for the device once.

    Args:
        owners: [T] int64, for every token the position of its change; what no change has means none.
        changes: how many there are.
    """

    def __init__(self, experts: Tensor, count: int, owners: Tensor, changes: int) -> None:
        super().__init__(experts, count)
        owner = owners.index_select(0, self.order // experts.shape[1])
        none = changes * count
        pair = torch.where((owner >= 0) & (owner < changes), owner * count + self.experts, none)
        pair, rows = torch.sort(pair, stable=True)
        pair, lengths = torch.unique_consecutive(pair, return_counts=True)
        self._pair_experts = pair % count
        found, sizes = _on_host(pair), _on_host(lengths)
        if found and found[-1] == none:
            found.pop()
            rows = rows[: -sizes.pop()]
        self._rows = rows  # those that have a change, by change and then by expert
        self._pairs = _runs_of(sizes, self._ends)
        self._shares: list[_Share] = []
        start = 0
        for change, own in groupby(found, lambda number: number // count):
            stop = start + len(list(own))
            self._shares.append(_Share(change, slice(start, stop), sum(sizes[start:stop])))
            start = stop

    def gather(
        self, change: Sequence[LowRank], dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None, Branch | None]:
        """The same of a change for each position. Smaller ranks are padded with zeros. None where no row has any, and
        none trains: what trains gets a gradient of zero then, because processes that have other rows reduce it."""
        shares = self._shares
        if torch.is_grad_enabled():
            trained = {i for i, (a, b, _) in enumerate(change) if a.requires_grad or b.requires_grad}
            without = trained.difference(share.change for share in shares)
            shares = sorted([*shares, *(_Share(i, slice(0, 0), 0) for i in without)], key=lambda share: share.change)
        if not shares:
            return None, None, None
        pairs = [self._pair_experts[share.experts] for share in shares]
        factors = [factor for share in shares for factor in change[share.change][:2]]
        if torch.is_grad_enabled():
            a, b = apply(_Picked, pairs, self.count, dtype, *factors)
        else:
            a, b = _picked(pairs, self.count, dtype, factors)
        scales = [change[share.change][2] for share in shares]
        scale = scales[0]
        if len(scales) > 1 and (any(isinstance(s, Tensor) for s in scales) or len(set(scales)) > 1):
            scale = torch.cat([_column(s, share.rows, a) for s, share in zip(scales, shares, strict=True)])
        return a, b, Branch(self._pairs, scale, self._rows)


def _column(scale: Any, rows: int, like: Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        return scale.to(like.device, like.dtype).expand(rows, 1)
    return like.new_full((rows, 1), scale)


def _picked(
    experts: Sequence[Tensor], count: int, dtype: torch.dtype, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """a [H, R, K] and b [H, N, R] of some experts [h] each of several pairs of factors, one pair's after another's."""
    downs, ups = factors[::2], factors[1::2]
    ranks = [a.shape[0] // count for a in downs]
    make = torch.empty if len(set(ranks)) == 1 else torch.zeros
    total, rank = sum(map(len, experts)), max(ranks)
    a = make(total, rank, downs[0].shape[1], dtype=dtype, device=downs[0].device)
    b = make(total, ups[0].shape[0], rank, dtype=dtype, device=downs[0].device)
    start = 0
    for own, r, down, up in zip(experts, ranks, downs, ups, strict=True):
        stop = start + len(own)
        _pick(down.view(count, r, -1), own, a[start:stop, :r])
        _pick(up.view(-1, r, count).permute(2, 0, 1), own, b[start:stop, :, :r])
        start = stop
    return a, b


class _Picked(torch.autograd.Function):
    """`_picked`, differentiable."""

    @staticmethod
    def forward(
        ctx: Any, experts: Sequence[Tensor], count: int, dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.experts, ctx.count, ctx.like = experts, count, [(f.shape, f.dtype) for f in factors]
        return _picked(experts, count, dtype, factors)

    @staticmethod
    def backward(ctx: Any, da: Tensor, db: Tensor) -> tuple:
        grads: list[Tensor | None] = []
        start = 0
        for i, own in enumerate(ctx.experts):
            (shape, dtype), (up_shape, up_dtype) = ctx.like[2 * i : 2 * i + 2]
            r, stop = shape[0] // ctx.count, start + len(own)
            need_a, need_b = ctx.needs_input_grad[2 * i + 3 : 2 * i + 5]
            grad_a = grad_b = None
            if need_a:
                grad_a = da.new_zeros(shape, dtype=dtype)
                grad_a.view(ctx.count, r, -1).index_copy_(0, own, da[start:stop, :r].to(dtype))
            if need_b:
                grad_b = db.new_zeros(up_shape, dtype=up_dtype)
                grad_b.view(-1, r, ctx.count).permute(2, 0, 1).index_copy_(0, own, db[start:stop, :, :r].to(up_dtype))
            grads += [grad_a, grad_b]
            start = stop
        return None, None, None, *grads


def _pick(stack: Tensor, numbers: Tensor, out: Tensor) -> None:
    if stack.dtype is out.dtype and out.is_contiguous():
        torch.index_select(stack, 0, numbers, out=out)
    else:
        out.copy_(stack.index_select(0, numbers))


def _is_few(some: int, count: int) -> bool:
    """Whether picking some experts' factors moves less than using all of them."""
    return 4 * some <= count


def _runs_of(lengths: Sequence[int], like: Tensor) -> Runs:
    """Runs of these many rows each, on the device of `like`."""
    ends = list(accumulate(lengths))
    runs = [(i, t - n, t) for i, (n, t) in enumerate(zip(lengths, ends, strict=True)) if n]
    return Runs(len(ends), torch.tensor(ends, dtype=torch.int32, device=like.device), runs)


@cache
def _capability(device: torch.device) -> int:
    """The major compute capability of a GPU; 0 of others than NVIDIA's."""
    return 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]


def _is_aligned(t: Tensor) -> bool:
    """What `grouped_mm` asks of an operand: one dimension dense, everything else at multiples of 16 bytes."""
    if t.data_ptr() % 16:
        return False
    *outer, rows, columns = t.stride()
    dense, other = (columns, rows) if columns == 1 else (rows, columns)
    return dense == 1 and all(s * t.element_size() % 16 == 0 for s in (other, *outer))


def _composed(x: Tensor, a: Tensor, b: Tensor, w: Tensor, groups: Groups, branch: Branch) -> Tensor:
    """The formula of `_ExpertsLinear` in torch's own operations."""
    y = torch.cat([x[s:t] @ w[e].to(x.dtype) for e, s, t in groups.runs]).to(a.dtype)
    own = branch.own(x).to(a.dtype)
    change = torch.cat([(own[s:t] @ a[i].t()) @ b[i].t() for i, s, t in branch.runs.runs]) * branch.scale
    return (y + change if branch.rows is None else y.index_add(0, branch.rows, change)).to(x.dtype)


def _again(ctx: Any, dy: Tensor) -> tuple:
    """The gradients, in operations that torch can differentiate."""
    x, _, a, b, w = ctx.saved_tensors
    if a is None:
        return torch.cat([dy[s:t] @ w[e].t().to(dy.dtype) for e, s, t in ctx.groups.runs]), *(None,) * 5
    y = _composed(x, a, b, w, ctx.groups, ctx.branch)
    return (*gradients_of(y, (x, a, b), ctx.needs_input_grad[:3], dy), None, None, None)


class _ExpertsLinear(torch.autograd.Function):
    """`w` is frozen; a [count, r, K] and b [count, N, r], of the branch's dtype, are numbered as `branch.runs` numbers
    matrices, or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, w: Tensor, groups: Groups, branch: Branch | None
    ) -> Tensor:
        y, t = _product(x, a, b, w, groups, branch)
        ctx.groups, ctx.branch = groups, branch
        ctx.save_for_backward(None if a is None else x, t, a, b, w)
        return fresh(y)

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, t, a, b, w = ctx.saved_tensors
        groups, branch = ctx.groups, ctx.branch
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        dy = dy.contiguous()
        dx = groups.mm(dy, w.transpose(1, 2)) if need_x else None
        if a is None:
            return dx, None, None, None, None, None
        dy = branch.own(dy).to(a.dtype)
        p = branch.runs.mm(dy, b).mul_(branch.scale) if need_x or need_a else None
        dx = branch.add_mm(dx, p, a) if need_x else None
        da = branch.runs.outer(p, branch.own(x).to(a.dtype)) if need_a else None
        db = branch.runs.outer(dy, t) if need_b else None
        return dx, da, db, None, None, None


def _product(
    x: Tensor, a: Tensor | None, b: Tensor | None, w: Tensor, groups: Groups, branch: Branch | None
) -> tuple[Tensor, Tensor | None]:
    y = groups.mm(x, w)
    if a is None:
        return y, None
    t = branch.runs.mm(branch.own(x).to(a.dtype), a.transpose(1, 2)).mul_(branch.scale)
    return branch.add_mm(y, t, b.transpose(1, 2)), t


def experts_linear(x: Tensor, w: Tensor, groups: Groups, change: LowRank | Sequence[LowRank] | None) -> Tensor:
    """Every row times its own expert's weight, and factors.

    Args:
        x: [S, K], sorted as `groups` is, in the dtype of the product and of the result.
        w: frozen, [E, K, N] (a view of [E, N, K] where it is stored so).
        change: what `groups` gathers factors of: one for all rows, or of `MixedGroups` one for each of its positions.
            Gradients arrive in their layout and dtypes.

    Returns:
        [S, N] in x's dtype.
    """
    a = b = branch = None
    if change is not None:
        # half-precision products of a few columns are slow on a CPU; elsewhere the grouped product wants them
        a, b, branch = groups.gather(change, torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype)
    if not torch.is_grad_enabled():
        return _product(x, a, b, w, groups, branch)[0]
    return apply(_ExpertsLinear, x, a, b, w, groups, branch)


def per_expert(a: Tensor, b: Tensor, count: int, experts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors as they are kept, a [E·r, K] with the expert the slowest and b [N, r·E] with the expert the fastest, as
    [E, r, K] and [E, N, r]; of some `experts` only, if given."""
    a = a.view(count, -1, a.shape[1])
    columns = b.reshape(-1, count)  # [N·r, E]; a slot of a pool keeps b transposed
    if experts is not None:
        a, columns = a.index_select(0, experts), columns.index_select(1, experts)
    return a, columns.t().contiguous().view(columns.shape[1], b.shape[0], -1)
