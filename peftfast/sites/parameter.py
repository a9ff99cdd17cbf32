"""Parameters that a config names itself (`target_parameters`): a matrix, or a stack of one matrix an expert, that some
module uses in its forward in whatever way it likes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftfast.autocast import without_autocast
from peftfast.base.parameter import ParameterWeight
from peftfast.ops.experts import LowRank, per_expert
from peftfast.sharding import whole_shape
from peftfast.sites.experts import has_routed_form, routed_experts
from peftfast.sites.holders import linear_holder
from peftfast.sites.site import Slot, UsualSite

if TYPE_CHECKING:
    from peftfast.rows.routing import Rows

_TURNS: WeakKeyDictionary[nn.Module, AbstractContextManager] = WeakKeyDictionary()


def in_turn(module: nn.Module) -> AbstractContextManager:
    """While one thread runs a module with other tensors in the place of its Parameters, no other one may run it or read
    them."""
    if torch.compiler.is_compiling():  # a graph has the tensors, not the module
        return nullcontext()
    return _TURNS.setdefault(module, RLock())


class ParameterSite(UsualSite):
    """W [N, K] or [E, N, K], or [E, K, N] where the module says `is_transposed`. What is adapted is the Parameter while
    its module runs, not the module's output: see `run_changed`. So `adapt` has no meaning here, and a method is asked
    for its `changes`.

    Attributes:
        parameter: its name in the module. experts: E; 1 for a matrix.
    """

    adapts_output = False

    def __init__(self, module: nn.Module, parameter: str) -> None:
        self.parameter = parameter
        self.weight = ParameterWeight(module, parameter)
        shape = whole_shape(self.weight.value)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"lora.ParamWrapper was initialized with {len(shape)} dimensional Parameter, but only 2d and 3d are "
                "supported."
            )
        self.experts = shape[0] if len(shape) == 3 else 1
        self.transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
        #: Which of the two dimensions of a matrix the factor A reads.
        self.reads = "first" if self.transposed else "second"
        n, k = shape[-2:]
        self.in_features, self.out_features = (n, k) if self.transposed else (k, n)

    def low_rank_slots(self, rank: int, bias: bool = False) -> Mapping[str, Slot]:
        if bias:
            raise ValueError("lora_bias=True is not supported for Parameters (target_parameters)")
        rank, k, n = rank * self.experts, self.in_features, self.out_features
        return {
            "lora_A": Slot((rank, k), holder=partial(linear_holder, k, rank)),
            "lora_B": Slot((n, rank), holder=partial(linear_holder, rank, n)),
        }

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.factors(a, b)
        return (left @ right).flatten(0, 1)

    def with_delta(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, in_place: bool = False) -> Tensor:
        return (weight.add_ if in_place else weight.add)(self.delta(a, b), alpha=scale)

    def split(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of every expert, [E, r, K] and [E, N, r]."""
        return per_expert(a, b, self.experts)

    def joined(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`split`, undone."""
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two stacks whose product lies as the Parameter does."""
        a, b = self.split(a, b)
        return (a.transpose(1, 2), b.transpose(1, 2)) if self.transposed else (b, a)

    def together(self, parts: Sequence[LowRank]) -> LowRank:
        """Several changes as one, of the sum of their ranks."""
        if len(parts) == 1:
            return parts[0]
        with without_autocast(parts[0].a):
            a = torch.cat([p.a.view(self.experts, -1, self.in_features) for p in parts], dim=1)
            b = torch.cat([(p.b * p.scale).view(self.out_features, -1, self.experts) for p in parts], dim=1)
        return LowRank(a.flatten(0, 1), b.flatten(1), 1.0)

    def changed(self, part: LowRank) -> Tensor:
        """The Parameter with the change in it, in its dtype."""
        value = self.weight.value
        a, b, scale = part
        if isinstance(scale, Tensor):
            b, scale = b * scale, 1.0
        if value.is_meta and not a.is_meta:
            raise RuntimeError(
                f"{self.parameter} of {type(self.module).__name__} is offloaded, and what is needed is W + s B A. Keep "
                "this module on a device."
            )
        with without_autocast(value):  # the module expects the dtype that it stores
            if value.dim() == 2:  # small enough for a copy in the factors' dtype, which leaves one rounding
                wide = torch.promote_types(value.dtype, a.dtype)
                left, right = self.factors(a.to(wide), b.to(wide))
                return torch.addmm(value.to(wide), left[0], right[0], alpha=scale).to(value.dtype)
            left, right = self.factors(a.to(value.dtype), b.to(value.dtype))
            return torch.baddbmm(value, left, right, alpha=scale)


def run_changed(
    module: nn.Module,
    changes: Mapping[ParameterSite, Sequence[LowRank]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """`module(*args, **kwargs)` with some of its Parameters changed. Experts of which only some are needed compute the
    change of those; any other module gets W + s B A for the time of the call."""
    parts = {site: site.together(found) for site, found in changes.items()}
    named = {site.parameter: part for site, part in parts.items()}
    if has_routed_form(module, {name: [part] for name, part in named.items()}, args, kwargs):
        return routed_experts(module, named, *args) if named else module(*args)
    with in_turn(module):
        if not parts:
            return module(*args, **kwargs)
        whole = {site.parameter: site.changed(part) for site, part in parts.items()}
        return torch.func.functional_call(module, whole, tuple(args), dict(kwargs))


def run_mixed(
    module: nn.Module,
    changes: Mapping[ParameterSite, Sequence[LowRank]],
    rows: Callable[[Tensor], Rows],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any | None:
    """`module(*args, **kwargs)` with changes of its own for every sample. A module of matrices that takes and gives
    samples, as routers do, runs once an adapter, on its samples. None where neither is possible.

    Args:
        changes: for every adapter, in the order in which `rows` counts them. rows: the samples of an input.
    """
    named = {site.parameter: each for site, each in changes.items()}
    count = len(next(iter(named.values())))
    if has_routed_form(module, named, args, kwargs):
        own = rows(args[0])
        y = routed_experts(module, named, *args, own.index)
        return y if own.host is not None else own.without_unknown(y, count)
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if torch.compiler.is_compiling() or any(site.weight.value.dim() != 2 for site in changes):
        return None
    if len(args) != 1 or len(given) != 1 or given[0] is not args[0] or not given[0].dim():
        return None

    def call(position: int, x: Tensor) -> Any:
        own = {} if position < 0 else {site: [each[position]] for site, each in changes.items()}
        return run_changed(module, own, (x,), kwargs)

    return _in_turns(call, rows(args[0]), args[0], count)


def _in_turns(call: Callable[[int, Tensor], Any], rows: Rows, x: Tensor, count: int) -> Any | None:
    """`call` for one adapter's samples after another's, -1 for the base; what it gives are samples, or several of them
    in a tuple. None where that is not so."""
    parts = []
    for position in rows.turns(count):
        own = rows.own(position, x)
        y = call(position, own)
        each = y if isinstance(y, tuple) else (y,)
        if not all(isinstance(t, Tensor) and t.dim() and t.shape[0] == own.shape[0] for t in each):
            return None
        parts.append([(position, t) for t in each])
    results = tuple([rows.joined(tensors, count) for tensors in zip(*parts, strict=True)])
    return results if isinstance(y, tuple) else results[0]
