"""A call of a layer: which adapters act on which sample, and in what order."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.method import AdapterMethod
from peftfast.rows.control import Control
from peftfast.rows.mix import Group, Mix, Verdicts
from peftfast.rows.routing import Routing
from peftfast.sites import Site
from peftfast.sites.bound import BoundLora

#: Methods in the order in which they act, each with its active adapters.
Steps = list[tuple[AdapterMethod, list[Adapter]]]


class CalledLayer:
    """Mixin of the layers."""

    base_layer: nn.Module
    site: Site
    adapters: dict[str, Adapter]
    active_adapters: list[str]
    merged: bool
    control: Control
    block: Any
    store: dict[Any, Any]
    _disable_adapters: bool
    _plan: tuple[Steps, BoundLora | None] | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output with the active adapters; extra arguments go to the base module."""
        routing = self._routing
        if routing is not None and not self._disable_adapters:
            return routing.reaching(self._routed(routing, x, args, kwargs), self)
        # a compiler that read the plan would guard on whether an eager call has made it yet
        steps, bound = (self._steps(), None) if torch.compiler.is_compiling() else self._plan or self._make_plan()
        if not steps:
            if self._disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.block is not None and not args and not kwargs:
            y = self.block(self, x)
            if y is not None:
                return y
        if bound is not None and not args and not kwargs:
            y = bound(x)
            if y is not None:
                return y
        y = self.site.base(x, *args, **kwargs) if args or kwargs else None
        for method, adapters in steps:
            y = method.forward(self.site, x, y, adapters)
        return y

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What torch calls in place of `forward` in `torch.jit.trace`, which is not to find what other calls have
        looked up."""
        self.__dict__["_plan"] = None
        return super()._slow_forward(*args, **kwargs)

    def _routed(self, routing: Routing, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Every sample with its own adapter; which ones are active does not matter."""
        if routing.slots is not None:
            return routing.slots.layer_forward(self, routing, x, args, kwargs)
        if torch.compiler.is_compiling():  # one that read what is kept would guard on whether it has been made yet
            mix = Mix(self.adapters, routing.names, tuple)
        else:
            verdicts = self.control.verdicts(routing)
            mix = verdicts.mixes.get(ref(self))
            if mix is None:
                mix = verdicts.mixes[ref(self)] = Mix(self.adapters, routing.names)
            elif mix.single is not None and routing.arranges(x) and not args and not kwargs:
                y = self._short(routing, x, mix.single, verdicts)
                if y is not None:
                    return y
        adapters = mix.adapters
        y = self.base_layer(x, *args, **kwargs) if args or kwargs or not adapters else None
        if not adapters:
            return y
        if routing.uniform:  # as many samples as there may be, all with the one adapter
            return adapters[0].method.forward(self.site, x, y, adapters)
        rows = routing.rows(x, mix.present, self.store, adapters[0].key)
        for run, own, positions in mix.steps:
            y = run(self.site, x, y, own, rows if positions is None else rows.only(positions, len(adapters)))
        return y

    def _short(self, routing: Routing, x: Tensor, group: Group, verdicts: Verdicts) -> Tensor | None:
        """The output by what is kept of all adapters of `routing`, None where it takes the long way."""
        kept = group.kept
        if kept is None or not kept.quick or torch.is_grad_enabled():
            return None
        kept = verdicts.current(group)
        if kept is None:
            return None
        return kept.short(self.site, x, routing)

    def _make_plan(self) -> tuple[Steps, BoundLora | None]:
        """What a call does until adapters are added, activated, merged or disabled: its steps, and their short form."""
        steps = self._steps()
        if torch.jit.is_tracing():  # which traces twice and compares: looking up once would show
            return steps, None
        bind = getattr(steps[0][0], "bind", None) if len(steps) == 1 else None
        self._plan = plan = (steps, None if bind is None else bind(self.site, steps[0][1]))
        return plan

    def _steps(self) -> Steps:
        """The active adapters that are not inside the weight already, in order, neighbours of one method together."""
        active: list[Adapter] = []
        if not self._disable_adapters:
            names, inside = self.active_adapters, self._merged
            active = [self.adapters[n] for n in names if n in self.adapters and n not in inside]
        for adapter in active:
            # a compiler cannot follow this into a checkpointed block, and where a tensor hangs is known by then
            if not torch.compiler.is_compiling():
                adapter.locate()
        # methods that change the input must see it before anybody has multiplied it
        active.sort(key=lambda adapter: getattr(adapter.method, "order", 0))
        steps: Steps = []
        for adapter in active:  # itertools.groupby, in a form that compilers can follow
            if steps and steps[-1][0] is adapter.method:
                steps[-1][1].append(adapter)
            else:
                steps.append((adapter.method, [adapter]))
        return steps
