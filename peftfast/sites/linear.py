"""Linear layers: `nn.Linear`, transformers' `Conv1D`, and quantised ones whose storage format is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.autocast import autocast_dtype, is_autocasting
from peftfast.base.dense import is_conv1d, was_conv1d
from peftfast.base.weight import base_weight, frozen, is_foreign_linear
from peftfast.errors import PeftWarning, warn
from peftfast.ops.composed import composes
from peftfast.ops.dora import dora_linear_add, weight_norm
from peftfast.ops.gate import gated
from peftfast.ops.host_bound import is_small
from peftfast.ops.lora import lora_linear, lora_linear_add
from peftfast.ops.plan import Way
from peftfast.ops.routed import RowRoute, routed_linear_add, row_route, runs_segmented
from peftfast.sites.bound import BoundLora, BoundRuns, Weighted
from peftfast.sites.holders import linear_holder
from peftfast.sites.site import (
    Slot,
    UsualSite,
    bias_at_hand,
    is_plain,
    is_untouched,
    is_written_over,
    probe_of,
    register_site,
)
from peftfast_kernels.decode import Operand

if TYPE_CHECKING:
    from peftfast.rows.routing import Rows


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer: `nn.Linear`, what derives from it, `Conv1D`, and those of other libraries."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_foreign_linear(module)


def is_quantised(module: nn.Module) -> bool:
    return is_linear(module) and base_weight(module).quantization is not None


def linear_with(weight: Tensor, like: nn.Module) -> nn.Module:
    """A dense layer with this weight [N, K] and the bias and mode of a packed one, of its kind before that; frozen."""
    n, k = weight.shape
    if was_conv1d(like):
        with torch.device("meta"):
            new, weight = like.source_cls(n, k), weight.t()
    else:
        new = nn.Linear(k, n, bias=False, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    new.bias = frozen(getattr(like, "bias", None))  # HQQ keeps a plain tensor
    return new.train(like.training)


@register_site("torch.nn.Linear", is_linear)
@register_site("transformers.pytorch_utils.Conv1D", is_conv1d)
class LinearSite(UsualSite):
    """y = x Wᵀ + bias with x [..., K] and y [..., N]."""

    gates = True

    def __init__(self, module: nn.Module) -> None:
        self.weight = base_weight(module)
        # a subclass may compute anything in its forward; only the classes themselves are known to be a plain product
        self._known_forward = type(module) in (nn.Linear, *self.weight.fusable_modules) or (
            type(module).__name__ == "Conv1D" and is_conv1d(module)
        )

    def put_around(self, module: nn.Module) -> None:
        super().put_around(module)
        self._known_forward = False

    def low_rank_slots(self, rank: int, bias: bool = False) -> Mapping[str, Slot]:
        n, k = self.weight.shape
        return {
            "lora_A": Slot((rank, k), holder=partial(linear_holder, k, rank)),
            "lora_B": Slot((n, rank), holder=partial(linear_holder, rank, n), bias=(n,) if bias else None),
        }

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = (self.module if self.around is None else self.around)(x, *args, **kwargs)
        if not isinstance(y, Tensor):  # routers of some models derive from nn.Linear
            kind = type(self.module).__name__
            raise TypeError(
                f"{kind} is a torch.nn.Linear whose output is no tensor but a {type(y).__name__}, which an adapter "
                "cannot change: leave modules of this class out of target_modules, for example with exclude_modules."
            )
        if x.requires_grad and not y.requires_grad and torch.is_grad_enabled() and self.weight.cuts_gradients:
            warn(
                f"{self.weight.name or type(self.module).__name__}: this {self.weight.quantization} weight multiplies "
                "without a derivative, so that what comes before it gets the gradient of the adapter alone, not that "
                "of the layer. Choose a format that trains (weight-only quantisation does).",
                PeftWarning,
            )
        return y

    def _checked(self, x: Tensor, y: Tensor, width: int) -> Tensor:
        """What a subclass's own forward gave. TypeError unless it has the shape of a product."""
        if y.shape != (*x.shape[:-1], width):
            raise TypeError(
                f"{type(self.module).__name__} is a torch.nn.Linear that gives {tuple(y.shape)} for an input of "
                f"{tuple(x.shape)}, which is no product with its weight of {tuple(self.weight.shape)}: leave modules "
                "of this class out of target_modules, for example with exclude_modules."
            )
        return y

    def adapt(
        self,
        x: Tensor,
        y: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float,
        gate: Tensor | None = None,
    ) -> Tensor:
        if not self._known_forward:
            y = self._checked(x, self.base(x) if y is None else y, b.shape[0])
        if isinstance(scale, Tensor):  # a scale that may change inside a compiled graph
            b, scale = b * scale.to(b.dtype), 1.0
        if not is_plain(x, a, b):
            return super().adapt(x, y, a, b, scale, dropout, gate)  # kernels cannot read these (DTensor)
        if y is None:
            base = self.product(x, autocast_dtype(x))
            if base is not None:
                return lora_linear(x, *base, a, b, scale, dropout, gate)
            y = self.base(x)
        return lora_linear_add(y, x, a, b, scale, dropout, gate)

    def bind(
        self,
        adapter: Any,
        weighted: Weighted | None = None,
        few: Way | None = None,
        when: Callable[[Tensor], bool] | None = None,
    ) -> BoundLora | None:
        """`adapt` for one adapter and y None, with everything looked up that no input changes; None: not for this one.

        Args:
            adapter: a `peftfast.adapter.Adapter` with a pair of factors.
            weighted: what is multiplied by instead, made of what has been looked up; None: not in this call.
            few: a way to do the same with the factors as they are kept, for few tokens on a CPU.
            when: whether it is all that is to be done with this input; None: always.
        """
        cells = [adapter.cell(slot) for slot in adapter.pair]
        holders = adapter.holders
        if not self._known_forward or None in cells or holders is not None and holders.foreign:
            return None
        dropouts = adapter.settings_of("lora_dropout")._modules
        return BoundLora(self, *cells, adapter.kept, dropouts, adapter.name, holders, weighted, few, when)

    def bind_runs(self, a: Tensor, b: Tensor, scale: Tensor | float) -> BoundRuns:
        """`adapt_each` of the module's own output with these factors, without gradients."""
        usual = self._known_forward and type(self.module) is nn.Linear
        return BoundRuns(self, self.module._parameters if usual else {}, a, b, scale)

    def probe(self) -> Tensor | None:
        if self._known_forward:
            return None
        return probe_of(self, 2, self.weight.shape[1])

    def product(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Operand, Tensor | None] | None:
        """Weight and bias, if calling the module with x, under autocast to `autocast`, is x Wᵀ + bias and no more."""
        module = self.module
        if not self._known_forward or not is_untouched(module):
            return None
        if torch.compiler.is_compiling() and is_written_over(module):
            return None
        # an attribute of a module is a slow lookup; sharded and parametrised modules need it
        kept = module._parameters
        bias = kept["bias"] if "bias" in kept else module.bias
        if is_plain(x, bias):
            w = self.weight.operand(x, autocast)
            if w is not None and w.tensors[0].device == x.device and is_plain(*w.tensors):
                return w, bias
        return None

    def adapt_each(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor | float, gate: Tensor | None = None
    ) -> Tensor:
        runs, shape = a.shape[0], y.shape
        if x.dim() != 3 or x.shape[0] != runs:
            x, y = x.reshape(runs, -1, x.shape[-1]), y.reshape(runs, -1, shape[-1])
        t = torch.bmm(x if x.dtype is a.dtype else x.to(a.dtype), a.transpose(1, 2))
        if gate is not None:
            t = gated(t, gate.reshape(runs, -1, 1))
        t, alpha = (t * scale.view(-1, 1, 1), 1.0) if isinstance(scale, Tensor) else (t, scale)
        if y.dtype is t.dtype is b.dtype and not is_autocasting(x):
            out = torch.baddbmm(y, t, b.transpose(1, 2), alpha=alpha)
        else:
            out = torch.add(y, torch.bmm(t, b.transpose(1, 2)), alpha=alpha).to(y.dtype)
        return out if out.shape == shape else torch.reshape(out, shape)

    def segmented(self, x: Tensor) -> bool:
        """Whether `adapt_rows` is how this input is best served."""
        return is_plain(x) and runs_segmented(x)

    def adapt_rows(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor, rows: Rows, gate: Tensor | None = None
    ) -> Tensor:
        """`adapt_each` by segmented kernels, every row by its own adapter's factors: a [G, r, K], b [G, N, r],
        scale [G]. Nothing is gathered, and nothing of the host's depends on the mix."""
        samples, adapters = rows.index.shape[0], a.shape[0]
        tokens = x.numel() // (samples * x.shape[-1]) if samples else 1
        known = rows.host is not None
        if gate is None:
            route = rows.derived(("route", adapters, tokens), lambda: row_route(rows.index, adapters, tokens, known))
        else:  # a token that its adapter leaves alone is one of the base model's

            def make() -> RowRoute:
                each = torch.where(gate.reshape(-1), rows.index.repeat_interleave(tokens), -1)
                return row_route(each, adapters, 1, known)

            route = rows.latest(("gated route", adapters), gate, make)
        return routed_linear_add(y, x, a, b, scale, route)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, t: Tensor, b: Tensor) -> Tensor:
        return F.linear(t, b)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, a

    def vector_shape(self, side: str) -> tuple[int, ...]:
        n, k = self.weight.shape
        return {"input": (1, k), "output": (n, 1), "magnitude": (n,)}[side]

    def on_weight(self, s: Tensor, side: str) -> Tensor:
        return s.reshape(1, -1) if side == "input" else s.reshape(-1, 1)

    def magnify(
        self, x: Tensor, y: Tensor | None, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
    ) -> Tensor:
        bias = bias_at_hand(self.module)
        if dropout > 0.0 or composes(x) or not is_plain(x, a, b, bias):
            return super().magnify(x, y, a, b, g, scale, dropout)
        y = self.base(x) if y is None else y
        if not torch.compiler.is_compiling() and is_small(x) and is_small(y):
            # more launches than the Function's, but derived without Python; what is kept is small as well
            return super().magnify(x, y, a, b, g, scale, dropout)
        return dora_linear_add(y, x, a, b, g, bias, scale)

    def adapted_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return weight_norm(self.weight.readable(), a, b, scale)
