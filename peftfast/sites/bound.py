"""Low-rank adapters on one linear layer, one or one for every run of samples, with everything looked up beforehand that
no input changes.

At small batches a training step waits for Python, so the usual call of a layer is made of few steps: dictionary lookups
that see whoever replaced a Parameter, a hook or a scaling since, and the autograd Function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.autocast import autocast_dtype
from peftfast.ops.lora import lora_part
from peftfast.ops.plan import Part, Plan, branch_dtype, plan_of
from peftfast.sites.called import Holders
from peftfast.sites.site import Site, is_plain, is_untouched
from peftfast_kernels.decode import Operand

#: The dict in which a Parameter is kept, and its key there.
Cell = tuple[dict[str, Any], str]


class BoundLora:
    """Calling it gives the layer's output, or None where `part` does.

    Args:
        product: (x, autocast's dtype) -> weight and bias, None where calling the module is more than x Wᵀ + bias.
        down, up: where the factors are kept. holders: the modules that keep them, if they are not bare.
        kept: what the layer keeps besides tensors. dropouts: of its adapters; `name` is this one's.
        weighted: see `LinearSite.bind`.
    """

    __slots__ = ("product", "down", "up", "kept", "dropouts", "name", "holders", "weighted", "_made")

    def __init__(
        self,
        product: Callable[[Tensor, torch.dtype | None], tuple[Operand, Tensor | None] | None],
        down: Cell,
        up: Cell,
        kept: Mapping[str, Any],
        dropouts: Mapping[str, nn.Module],
        name: str,
        holders: Holders | None,
        weighted: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.product, self.down, self.up = product, down, up
        self.kept, self.dropouts, self.name, self.holders, self.weighted = kept, dropouts, name, holders, weighted
        #: The last operand and the plan for it: one attribute, so that threads never see halves of two.
        self._made: tuple[Operand | None, Plan | None] = (None, None)

    def __call__(self, x: Tensor) -> Tensor | None:
        part = self.part(x)
        return None if part is None else lora_part(x, part)

    def part(self, x: Tensor, drops: bool = True) -> Part | None:
        """What x is to be multiplied by, None where this call is not a plain one; `drops` False leaves dropout out."""
        holders, weighted = self.holders, self.weighted
        if holders is not None and not holders.are_plain():
            return None
        a, b = self.down[0].get(self.down[1]), self.up[0].get(self.up[1])
        scale = self.kept["scaling"][self.name]
        if a is None or b is None or not is_plain(a, b) or isinstance(scale, Tensor):
            return None
        if weighted is not None:
            a = weighted(a)
        autocast = autocast_dtype(x)
        base = self.product(x, autocast)
        if base is None:
            return None
        operand, bias = base
        dropout = self.dropouts[self.name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and drops and dropout.training else 0.0
        branch = branch_dtype(x, a, autocast)
        known, plan = self._made
        if operand is not known or plan.branch is not branch or plan.scale != scale or plan.dropout != p:
            plan = plan_of(operand, branch, scale, p)
            if not torch.jit.is_tracing():  # in a trace, sizes are tensors of the trace
                self._made = (operand, plan)
        return Part(operand, bias, a, b, plan)


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
            and not torch.is_autocast_enabled(x.device.type)
        ):
            runs = x if x.dim() == 3 and x.shape[0] == down.shape[0] else x.reshape(down.shape[0], -1, x.shape[-1])
            y = F.linear(runs, weight, self.kept["bias"])  # nobody else has it, so it may be written to
            y.baddbmm_(torch.bmm(runs, down), up, alpha=scale)
            return y if runs is x else y.view(*x.shape[:-1], y.shape[-1])
        return self.site.adapt_each(x, self.site.base(x), self.a, self.b, scale)
