"""Low-rank adapters on one linear layer, one or one for every run of samples, with everything looked up beforehand that
no input changes.

At small batches a training step waits for Python, so the usual call of a layer is made of few steps: asking whether
anybody has replaced a Parameter, a hook or a scaling since the call before, and the autograd Function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.autocast import is_autocasting
from peftfast.ops.composed import composed_lora
from peftfast.ops.lora import circumstances, way_of
from peftfast.ops.plan import Part, Plan, Way, branch_dtype, plan_of
from peftfast.sites.called import Holders
from peftfast.sites.site import Site, is_plain, is_untouched
from peftfast.watch import Watch

if TYPE_CHECKING:
    from peftfast.sites.linear import LinearSite

#: The dict in which a Parameter is kept, and its key there.
Cell = tuple[dict[str, Any], str]
#: What was looked up -> what is multiplied by instead; None: not in this call.
Weighted = Callable[[Part], Part | None]


class Look(NamedTuple):
    """What a call found, and what has to be as it was for the next one to find the same."""

    part: Part  # with the factors as they are kept
    way: Way
    elements: int  # of the input; `way` depends on it
    circumstances: tuple
    kinds: tuple
    dropout: nn.Dropout | None  # None where nothing is ever dropped
    watch: Watch | None  # None where not everything can be watched

    def holds(self, x: Tensor) -> bool:
        """Whether looking again for x, or another input of its kind, would find the same part."""
        part, dropout = self.part, self.dropout
        return (
            self.circumstances == circumstances(x)
            and self.kinds == _kinds(part)
            and (dropout.p if dropout is not None and dropout.training else 0.0) == part.plan.dropout
            and self.watch.holds()
        )

    def values(self) -> tuple[Tensor, Tensor, tuple]:
        """The factors as they are kept, and what else has to be as it is for the same input to give the same output."""
        part = self.part
        return part.a, part.b, (*_writes(part.a, part.b), part.plan, self.circumstances)


def _kinds(part: Part) -> tuple:
    """What `module.to` and `requires_grad_` change in place."""
    weight = part.w.tensors[0]
    return part.a.dtype, weight.dtype, weight.requires_grad


def _writes(*tensors: Tensor) -> list[int]:
    """How often each was written to; inference tensors do not count."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


class BoundLora:
    """Calling it gives the layer's output, or None where this call is not a plain one.

    Args:
        site: whose module's class computes x Wᵀ + bias.
        down, up: where the factors are kept. holders: the modules that keep them, if they are not bare.
        kept: what the layer keeps besides tensors. dropouts: of its adapters; `name` is this one's.
        weighted, few, when: see `LinearSite.bind`.
    """

    __slots__ = (
        "site",
        "down",
        "up",
        "kept",
        "dropouts",
        "name",
        "holders",
        "weighted",
        "few",
        "when",
        "alters",
        "_last",
    )

    def __init__(
        self,
        site: LinearSite,
        down: Cell,
        up: Cell,
        kept: Mapping[str, Any],
        dropouts: Mapping[str, nn.Module],
        name: str,
        holders: Holders | None,
        weighted: Weighted | None = None,
        few: Way | None = None,
        when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self.site, self.down, self.up = site, down, up
        self.kept, self.dropouts, self.name, self.holders = kept, dropouts, name, holders
        self.weighted, self.few, self.when = weighted, few, when
        self.alters = not (weighted is None and few is None and when is None)
        self._last: Look | None = None  # one attribute, so that threads never see halves of two

    def __call__(self, x: Tensor) -> Tensor | None:
        last = self.found(x)
        if last is None:
            return None
        if not self.alters:
            return last.way(x, last.part)
        chosen = self.chosen(x, last)
        return None if chosen is None else chosen[1](x, chosen[0])

    def chosen(self, x: Tensor, last: Look) -> tuple[Part, Way] | None:
        """What x is to be multiplied by, and how: what `weighted`, `few` and `when` make of what was found for it."""
        if not self.alters:
            return last[:2]
        if self.when is not None and not self.when(x):
            return None
        if self.few is not None and last.way is composed_lora:
            return last.part, self.few
        part = last.part if self.weighted is None else self.weighted(last.part)
        return None if part is None else (part, last.way)

    def found(self, x: Tensor) -> Look | None:
        """What was found last, if that still holds, or is found now; None where this call is not a plain one."""
        last = self._last
        if last is None or not last.holds(x):
            self._last = None  # which may have been all that kept a large weight
            last = self._look(x)
            if last is None:
                return None
            if last.watch is not None:
                self._last = last
        elif last.elements != x.numel():
            self._last = last = last._replace(way=way_of(x, last.part), elements=x.numel())
        return last

    @property
    def plan(self) -> Plan | None:
        """That of the call before; None where nothing is kept of it."""
        last = self._last
        return None if last is None else last.part.plan

    def part(self, x: Tensor, drops: bool = True) -> Part | None:
        """What x is to be multiplied by, None where this call is not a plain one; `drops` False leaves dropout out."""
        last = self.found(x)
        if last is None or self.when is not None and not self.when(x):
            return None
        part = last.part if self.weighted is None else self.weighted(last.part)
        if part is None:
            return None
        return part if drops or not part.plan.dropout else part._replace(plan=part.plan._replace(dropout=0.0))

    def _look(self, x: Tensor) -> Look | None:
        (downs, down), (ups, up), holders, scales = self.down, self.up, self.holders, self.kept["scaling"]
        if holders is not None and not holders.are_plain():
            return None
        a, b, scale, dropout = downs.get(down), ups.get(up), scales[self.name], self.dropouts[self.name]
        if a is None or b is None or not is_plain(a, b) or isinstance(scale, Tensor):
            return None
        around = circumstances(x)
        base = self.site.product(x, around[0])
        if base is None:
            return None
        w, bias = base
        drops = dropout if isinstance(dropout, nn.Dropout) else None
        p = drops.p if drops is not None and drops.training else 0.0
        part = Part(w, bias, a, b, plan_of(w, branch_dtype(x, a, around[0]), scale, p))
        watch, lasting = None, self.site.weight.lasting(w)
        if lasting is not None and not torch.jit.is_tracing():  # in a trace, sizes are tensors of the trace
            entries = [
                *lasting, (downs, down, a), (ups, up, b), (self.site.module._parameters, "bias", bias),
                (self.kept, "scaling", scales), (scales, self.name, scale), (self.dropouts, self.name, dropout),
            ]  # fmt: skip
            modules = [self.site.module]
            if holders is not None:
                entries, modules = entries + holders.entries, modules + holders.modules
            watch = Watch(entries, modules)
        return Look(part, way_of(x, part), x.numel(), around, _kinds(part), drops, watch)


class BoundRuns:
    """The layer's output with factors of their own for S equal runs of samples. Without gradients.

    Args:
        kept: where the layer keeps weight and bias, if its output is x Wᵀ + bias; empty otherwise.
        a, b, scale: as in `Site.adapt_each`.
    """

    __slots__ = ("site", "kept", "a", "b", "scale", "down", "up")

    def __init__(self, site: Site, kept: Mapping[str, Any], a: Tensor, b: Tensor, scale: Tensor | float) -> None:
        self.site, self.kept, self.a, self.b, self.scale = site, kept, a, b, scale
        self.down, self.up = a.transpose(1, 2), b.transpose(1, 2)

    def __call__(self, x: Tensor) -> Tensor:
        weight, down, up, scale = self.kept.get("weight"), self.down, self.up, self.scale
        if (
            weight is not None
            and x.dtype is weight.dtype is down.dtype is up.dtype
            and not isinstance(scale, Tensor)
            and is_plain(x, weight)
            and is_untouched(self.site.module)
            and not is_autocasting(x)
        ):
            runs = x if x.dim() == 3 and x.shape[0] == down.shape[0] else x.reshape(down.shape[0], -1, x.shape[-1])
            y = F.linear(runs, weight, self.kept["bias"])  # nobody else has it, so it may be written to
            y.baddbmm_(torch.bmm(runs, down), up, alpha=scale)
            return y if runs is x else y.view(*x.shape[:-1], y.shape[-1])
        return self.site.adapt_each(x, self.site.base(x), self.a, self.b, scale)
