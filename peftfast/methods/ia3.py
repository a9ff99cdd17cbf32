"""IA3: one trained vector per module multiplies its output, or, in feed-forward modules, its input (Liu et al., arXiv
2205.05638)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, PeftType, checked, register_config, setting
from peftfast.errors import PeftWarning, warn
from peftfast.keys import ends_of
from peftfast.method import register_method
from peftfast.methods.combination import Combination, named_together
from peftfast.rows.routing import Rows
from peftfast.rules import boolean, either, optional, sequence, text
from peftfast.sites import Dense, Site, Slot
from peftfast.wrapping import default_targets
from peftfast.wrapping.targets import model_type

_NAMES = optional(either(text(), sequence(text())))
VECTOR = "ia3_l"


@register_config(PeftType.IA3)
@checked
class IA3Config(PeftConfig):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al., arXiv 2205.05638).

    Args:
        target_modules: module names (suffixes), one regex for full names, "all-linear", or None: chosen for the
            model's architecture. exclude_modules: same forms; wins over targets.
        feedforward_modules: those of the targets whose input is scaled instead of their output; None: chosen for the
            model's architecture.
        fan_in_fan_out: base weights stored as (in, out); set by itself for transformers' Conv1D.
        modules_to_save: names of modules trained in full and saved with the adapter.
        init_ia3_weights: start from ones, which change nothing; False: from random vectors.
    """

    target_modules: list[str] | str | None = setting(_NAMES, default=None)
    exclude_modules: list[str] | str | None = setting(_NAMES, default=None)
    feedforward_modules: list[str] | str | None = setting(_NAMES, default=None)
    fan_in_fan_out: bool = setting(boolean(), default=False)
    modules_to_save: list[str] | None = setting(optional(sequence(text())), default=None)
    init_ia3_weights: bool = setting(boolean(), default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "feedforward_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))

    def validate(self) -> None:
        super().validate()
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, (set, list, tuple)) and isinstance(inputs, (set, list, tuple)):
            outside = sorted(set(inputs) - set(targets))
            if outside:
                raise ValueError(
                    f"`feedforward_modules` should be a subset of `target_modules`; {outside} are not among "
                    f"{sorted(targets)}"
                )

    def is_feedforward(self, key: str) -> bool:
        """Whether the module of this name has its input scaled."""
        inputs = self.feedforward_modules
        if isinstance(inputs, str):
            return re.fullmatch(inputs, key) is not None
        return any(key.endswith(name) for name in inputs or ())


@register_method
class IA3:
    """Several active adapters on one module are the product of their vectors."""

    peft_type: ClassVar[str] = PeftType.IA3
    prefix: ClassVar[str] = "ia3_"
    family: ClassVar[str] = "ia3"
    peft_layer: ClassVar[str] = "tuners.ia3.layer.IA3Layer"
    default_targets: ClassVar[Mapping[str, Any]] = default_targets.IA3
    condense_targets: ClassVar[bool] = False  # feedforward_modules has to stay a subset of the targets
    refused_by_mamba: ClassVar[bool] = False  # PEFT refuses only what is like LoRA there
    scales: ClassVar[bool] = True
    order: ClassVar[int] = -1  # scaled inputs have to be there before anybody multiplies them

    def claims(self, cfg: PeftConfig) -> bool:
        return isinstance(cfg, IA3Config)

    def resolve(self, cfg: IA3Config, model: nn.Module) -> None:
        """Fill in `feedforward_modules`, which PEFT's table lists beside the targets."""
        if cfg.feedforward_modules is not None:
            return
        row = default_targets.IA3_FEEDFORWARD.get(model_type(model))
        targets = cfg.target_modules
        if row is None:
            warn(
                f"No default feedforward_modules are known for model type {model_type(model)!r}; the outputs of all "
                "target modules are scaled. Pass `feedforward_modules` ([] for none) to choose yourself.",
                PeftWarning,
            )
            row = []
        if isinstance(targets, str):
            cfg.feedforward_modules = set(row)
        else:  # by the names the targets have, of which they must stay a subset
            cfg.feedforward_modules = {t for t in targets if not set(row).isdisjoint(ends_of(t))}

    def settings(self, site: Site, cfg: IA3Config, key: str) -> Mapping[str, Any]:
        return {"scaled_side": "input" if cfg.is_feedforward(key) else "output"}

    def slots(self, site: Site, cfg: IA3Config, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        return {VECTOR: Slot(site.vector_shape(settings["scaled_side"]))}

    def init(self, site: Site, adapter: Adapter) -> None:
        if adapter.cfg.init_ia3_weights:
            adapter[VECTOR].fill_(1.0)
        else:
            adapter[VECTOR].normal_()

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        return _scaled(site, x, y, _product(active, "input"), _product(active, "output"), _all)

    def routed(self, site: Site, x: Tensor, y: Tensor | None, adapters: Sequence[Adapter], rows: Rows) -> Tensor:
        # one table of vectors a side, ones for the base model (-1, the last row) and for the other side
        vectors = []
        for side in ("input", "output"):
            own = {i: a[VECTOR] for i, a in enumerate(adapters) if _side(a) == side}
            if not own:
                vectors.append(None)
                continue
            one = torch.ones_like(next(iter(own.values())))
            unknown = torch.full_like(one, float("nan"))  # a number that no adapter has
            table = torch.stack([*(own.get(i, one) for i in range(len(adapters))), unknown, one])
            vectors.append(table[rows.index])
        return _scaled(site, x, y, *vectors, _each)

    def describe(self, cfg: IA3Config, key: str, tensors: Mapping[str, Tensor]) -> str:
        s = tensors[VECTOR].flatten().float()
        said = [f"{len(s)} features of its {'input' if cfg.is_feedforward(key) else 'output'}"]
        for what, chosen, order in (("grow", s > 1, s), ("shrink", s < 1, -s)):
            count = int(chosen.sum())
            if count:
                most = order.topk(min(count, 3)).indices.tolist()
                said.append(f"{count} {what}, most " + ", ".join(f"{i} (x {float(s[i]):.3g})" for i in most))
        return "; ".join(said)

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        return _multiplied(site, dense, [adapter], dense.weight.dtype)

    def merged_together(self, site: Site, dense: Dense, adapters: Sequence[Adapter]) -> Dense:
        """See `Joint`."""
        return _multiplied(site, dense, adapters, site.weight.merge_dtype)

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        together = named_together([layers[0].cfg.feedforward_modules for layers in adapters])
        if together is None:
            raise ValueError("feedforward_modules is a pattern in one adapter and a list in another")
        return {"feedforward_modules": together}

    def fields_by_name(self, cfg: IA3Config, keys: Sequence[str]) -> Mapping[str, Any]:
        return {"feedforward_modules": {key for key in keys if cfg.is_feedforward(key)}}

    def combine(
        self, site: Site, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination, into: Adapter
    ) -> Mapping[str, Tensor]:
        """The weighted sum of the vectors, which is what combining IA3 adapters means in PEFT."""
        sides = {_side(a) for a in adapters}
        if len(sides) > 1:
            names = ", ".join(a.name for a in adapters)
            raise ValueError(f"{adapters[0].key}: some of the adapters {names} scale its input, others its output")
        return {VECTOR: sum(w * a[VECTOR].detach() for a, w in zip(adapters, weights, strict=True))}


def _multiplied(site: Site, dense: Dense, adapters: Sequence[Adapter], dtype: torch.dtype) -> Dense:
    """A weight and a bias with what all of the adapters multiply them by, in this dtype."""
    products = {side: _product(adapters, side, dtype) for side in dict.fromkeys(map(_side, adapters))}
    dense = dense._replace(weight=site.scale_weight(dense.weight, products, dense.spare))
    if dense.bias is None or "output" not in products:
        return dense
    return dense._replace(bias=dense.bias * products["output"].flatten())


def _side(adapter: Adapter) -> str:
    return adapter.setting("scaled_side")


def _product(active: Sequence[Adapter], side: str, dtype: torch.dtype | None = None) -> Tensor | None:
    vectors = [a[VECTOR] if dtype is None else a[VECTOR].to(dtype) for a in active if _side(a) == side]
    return reduce(torch.mul, vectors) if vectors else None


def _scaled(
    site: Site,
    x: Tensor,
    y: Tensor | None,
    inputs: Tensor | None,
    outputs: Tensor | None,
    multiply: Callable[[Site, Tensor, Tensor, str], Tensor],
) -> Tensor:
    """The module with the features of its input and of its output multiplied by vectors."""
    if inputs is not None:
        if y is not None:
            raise TypeError(
                f"{type(site.module).__name__}: its input is scaled by IA3 (feedforward_modules), so it cannot be "
                "called with further arguments or after another method; take it out of feedforward_modules"
            )
        x = multiply(site, x, inputs, "input")
    y = site.base(x) if y is None else y
    return y if outputs is None else multiply(site, y, outputs, "output")


def _all(site: Site, v: Tensor, s: Tensor, side: str) -> Tensor:
    """One vector for all samples."""
    return site.scale_input(v, s) if side == "input" else site.scale_output(v, s)


def _each(site: Site, v: Tensor, s: Tensor, side: str) -> Tensor:
    """One vector a sample."""
    own = site.vector_shape(side)
    channels_first = len(own) > 2  # [1, C, 1, ...] against [N, 1], [1, K] or [K]
    shape = (len(s), *own[1:]) if channels_first else (len(s), *(1,) * (v.dim() - 2), -1)
    return (v * s.reshape(shape)).to(v.dtype)
