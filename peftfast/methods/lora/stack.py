"""The factors of several LoRAs as one tensor each, ranks padded with zeros: what a mixed batch multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.autocast import without_autocast
from peftfast.ops.routed import runs_segmented
from peftfast.rows.mix import Verdicts
from peftfast.rows.routing import Routing, Rows
from peftfast.sharding import is_distributed
from peftfast.sites import Site
from peftfast.sites.site import is_foreign
from peftfast.watch import ContentWatch, Place, TensorWatch


def factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The down and the up factor as they are kept, whatever the site calls them."""
    down, up = adapter.pair
    return adapter[down], adapter[up]


#: Makes the pair that a module is adapted by of an adapter.
Pair = Callable[[Adapter], tuple[Tensor, Tensor]]

#: Bytes of a layer's stacked factors up to which a second copy of them, in another order, is not missed.
SMALL = 1 << 20


def watch_of(
    adapters: Sequence[Adapter], tensors: Sequence[Tensor], scales: Sequence[Any], more: Sequence[Place] = ()
) -> ContentWatch | None:
    """What sees changes of the factors of some adapters of one layer, which are `tensors` now, of their `scales`, and
    of `more`; None where one is kept elsewhere or does not count writes."""
    cells = [adapter.cell(slot) for adapter in adapters for slot in adapter.pair]
    found = [*tensors, *scales, *(value for _, _, value in more)]
    written = TensorWatch.of([one for one in found if isinstance(one, Tensor)])
    if None in cells or written is None:
        return None
    scaling = adapters[0].settings_of("scaling")
    kept = [(adapters[0].kept, "scaling", scaling), *((*c, t) for c, t in zip(cells, tensors, strict=True))]
    named = [(scaling, a.name, s) for a, s in zip(adapters, scales, strict=True)]
    return ContentWatch([*kept, *named, *more], written)


class FactorStack(NamedTuple):
    """Of G adapters whose largest rank is R."""

    a: Tensor  # [G, R, ...]
    b: Tensor  # [G, N, R, ...], in memory as [G, R, N, ...], which the batched product is fastest with
    scale: Tensor  # [G]
    factor: float | None = None  # the scale of all of them, where it is one number


class Remembered:
    """The stack of some adapters of one layer, and what must not have changed for it to be still right."""

    def __init__(self, adapters: Sequence[Adapter], pair: Pair = factors) -> None:
        self.kept = [t for adapter in adapters for t in factors(adapter)]
        self.count = len(adapters)
        pairs = [pair(adapter) for adapter in adapters]
        self._pairs: list[tuple[Tensor, Tensor]] | None = pairs  # until the stack is made of them
        first, second = pairs[0]
        #: Whether one batched product can do it: one dtype and device, no bias, ranks that zeros can be added to (the
        #: up factor of a grouped convolution has the rank of one group), tensors that can be put together.
        self.alike = all(
            a.dtype == first.dtype
            and b.dtype == second.dtype
            and a.device == first.device
            and len(a) == b.shape[1]
            and is_distributed(a) == is_distributed(b)
            and not is_foreign(a, b)
            for a, b in pairs
        ) and not any(adapter.cfg.lora_bias for adapter in adapters)
        self.dropping = [adapter for adapter in adapters if isinstance(adapter.setting("lora_dropout"), nn.Dropout)]
        self.scales = [adapter.scale for adapter in adapters]
        self.tensor_scales = [scale for scale in self.scales if isinstance(scale, Tensor)]  # are written in place
        self.watch: ContentWatch | None = None  # None: changes cannot be seen
        self.stack: FactorStack | None = None
        self.call: Callable[[Tensor], Tensor] | None = None
        #: The last order of one sample an adapter, and the call with factors in that order if it came twice.
        self.ordered: tuple[tuple[int, ...], Callable[[Tensor], Tensor] | None] = ((), None)

    @property
    def quick(self) -> bool:
        return not (self.dropping and any(a.dropout for a in self.dropping)) and not runs_segmented(self.stack.a)

    def short(self, site: Site, x: Tensor, routing: Routing) -> Tensor:
        if routing.order is not None and len(routing.host) == self.count and self._is_small():
            # decoding asks for one order again and again: rather than x every time, the factors are moved once
            order, call = self.ordered
            if order != routing.host:
                self.ordered = (routing.host, None)
            else:
                if call is None:
                    with torch.inference_mode(False), torch.no_grad():
                        call = _bound(site, FactorStack(*_picked(self.stack, routing.index), self.stack.factor))
                    self.ordered = (order, call)
                return call(x)
        if self.call is None:
            self.call = _bound(site, self.stack)
        return routing.arranged(x, self.call)

    def _is_small(self) -> bool:
        return self.stack.a.nbytes + self.stack.b.nbytes <= SMALL

    def wants_grad(self) -> bool:
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.kept)

    def build(self) -> FactorStack:
        pairs, self._pairs = self._pairs, None
        rank = max(a.shape[0] for a, _ in pairs)
        like = pairs[0][0]
        with without_autocast(like):
            return FactorStack(
                torch.stack([_padded(a, rank) for a, _ in pairs]),
                torch.stack([_padded(b.transpose(0, 1), rank) for _, b in pairs]).transpose(1, 2),
                as_tensor(self.scales, like),
                float(self.scales[0]) if not self.tensor_scales and len(set(self.scales)) == 1 else None,
            )


def remembered(adapters: Sequence[Adapter], verdicts: Verdicts | None, pair: Pair = factors) -> Remembered:
    """What is known about these adapters together, with their stack in it.

    Where no gradient is wanted the stack is kept from forward to forward and made again when a factor was written to,
    replaced or rescaled. Writing through `.data` leaves no trace to find: after that, call
    `model.base_model.forget_stacks()`.

    Args:
        verdicts: whether what is kept still holds; None: nothing is kept, and `adapters` may be any sequence. So in a
            graph, also of layers that are compiled inside of a model whose routing has some.
    """
    if verdicts is None or torch.compiler.is_compiling():
        known = Remembered(adapters, pair)
        known.stack = known.build() if known.alike else None
        return known
    known = adapters.kept
    if known is not None and not known.wants_grad() and verdicts.current(adapters) is known:
        return known
    known = Remembered(adapters, pair)
    if not known.alike:
        return known
    if known.wants_grad():
        adapters.kept = None  # of before the optimizer's step, which may leave no trace
        known.stack = known.build()
    else:
        known.watch = watch_of(adapters, known.kept, known.scales)
        with torch.inference_mode(False), torch.no_grad():
            known.stack = known.build()
        if known.watch is not None:
            adapters.kept = known
    return known


def _bound(site: Site, stack: FactorStack) -> Callable[[Tensor], Tensor]:
    a, b, scale, factor = stack
    return site.bind_runs(a, b, scale if factor is None else factor)


def _padded(t: Tensor, rank: int) -> Tensor:
    missing = rank - t.shape[0]
    return t if missing == 0 else F.pad(t, [0, 0] * (t.dim() - 1) + [0, missing])


def as_tensor(values: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers, some of them tensors already, as one tensor of the dtype and device of `like`."""
    if _has_values_at_hand(like) and not any(isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=like.dtype)
    # filled on the device: a copy from the host would wait for it, in every layer of a mixed training step
    return torch.stack(
        [v.to(like.device, like.dtype) if isinstance(v, Tensor) else like.new_full((), v) for v in values]
    )


def _has_values_at_hand(like: Tensor) -> bool:
    return like.is_cpu


def chosen(stack: FactorStack, rows: Rows) -> tuple[Tensor, Tensor, Tensor | float]:
    """One triple of factors for every sample that has an adapter (or for every run of them).

    With `rows.host` None, samples of the base model get some adapter's factors; a number that no adapter has gets a
    scale of NaN.
    """
    if rows.host is None:
        count = stack.scale.shape[0]
        a, b, scale = _picked(stack, rows.index.clamp(0, count - 1))
        return a, b, torch.where(rows.index < count, scale, float("nan"))
    if rows.run:
        used = rows.used // rows.run
        whole = used == stack.scale.shape[0]
        a, b, scale = stack[:3] if whole else (t[:used] for t in stack[:3])
    else:
        a, b, scale = _picked(stack, rows.positions)
    return a, b, scale if stack.factor is None else stack.factor


def _picked(stack: FactorStack, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b = stack.b.transpose(1, 2).index_select(0, index).transpose(1, 2)  # keeps the layout
    return stack.a.index_select(0, index), b, stack.scale.index_select(0, index)


def apply_stack(site: Site, x: Tensor, y: Tensor, stack: FactorStack, rows: Rows, gate: Tensor | None = None) -> Tensor:
    """The output `y` of the base with every sample's own factors added to it, at a site with `gates` on those tokens
    that `gate` [..., 1] lets through."""
    if rows.host is not None and not rows.used:
        return y
    gates = () if gate is None else (gate,)
    if site.segmented(x):
        return site.adapt_rows(x, y, *stack[:3], rows, *gates)
    mine = chosen(stack, rows)
    if rows.host is None:
        out = site.adapt_each(x, y, *mine, *gates)
        return torch.where((rows.index < 0).view(-1, *(1,) * (y.dim() - 1)), y, out)
    taken = rows.taken
    if taken is None:
        return site.adapt_each(x, y, *mine, *gates)
    out = site.adapt_each(x[taken], y[taken], *mine, *(gate[taken] for gate in gates))
    if isinstance(taken, slice):
        return torch.cat([y[: taken.start], out, y[taken.stop :]])
    return y.index_copy(0, taken, out)
