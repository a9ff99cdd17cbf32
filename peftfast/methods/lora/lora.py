"""LoRA: y = W x + s B A drop(x), with s = alpha / r or alpha / sqrt(r) (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.autocast import is_autocasting, without_autocast
from peftfast.config import PeftConfig, PeftType
from peftfast.method import register_method, sample_by_sample
from peftfast.methods.combination import Combination
from peftfast.methods.lora.combine import combined, combined_fields, rank_keeping, svd_of_sum
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import check_ready, initialise, rank_of_factors, restarted, start_bias
from peftfast.methods.lora.stack import Pair, apply_stack, factors, remembered
from peftfast.ops.composed import composed_lora
from peftfast.ops.experts import LowRank
from peftfast.ops.plan import Part
from peftfast.rows.routing import Rows
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.bound import BoundLora
from peftfast.sites.parameter import ParameterSite
from peftfast.sites.site import is_foreign
from peftfast.wrapping import default_targets
from peftfast.wrapping.expert_targets import retarget_experts
from peftfast.wrapping.patterns import pattern_value

#: under what name a layer lists an adapter's slots that do not train
FROZEN = "frozen_peft_weight_names"


@register_method
class Lora:
    """Several active LoRAs on one module are one wider LoRA."""

    peft_type: ClassVar[str] = PeftType.LORA
    prefix: ClassVar[str] = "lora_"
    family: ClassVar[str] = "lora"
    peft_layer: ClassVar[str] = "tuners.lora.layer.LoraLayer"  # what isinstance checks of other libraries look for
    default_targets: ClassVar[Mapping[str, Any]] = default_targets.LORA
    variant: ClassVar[str | None] = None  # the field of the config that asks for it

    #: adapter -> A [r, ...] and B [N, r, ...] that its module is adapted by: as they are kept, or made of that
    pair = staticmethod(factors)

    def claims(self, cfg: PeftConfig) -> bool:
        # others' configs may derive from LoraConfig: by its type an AdaLoraConfig is none
        return isinstance(cfg, LoraConfig) and cfg.peft_type == self.peft_type and cfg.variant == self.variant

    def retarget(self, cfg: LoraConfig, model: nn.Module) -> None:
        retarget_experts(cfg, model)

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        r = pattern_value(cfg.rank_pattern, key, cfg.r)
        frozen = {FROZEN: (list(site.low_rank_slots(r))[-1],)} if cfg.init_lora_weights == "mica" else {}
        return frozen | {
            "r": r,
            "lora_alpha": pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha),
            "scaling": scaling_of(cfg, key),
            "lora_dropout": nn.Dropout(cfg.lora_dropout) if cfg.lora_dropout > 0.0 else nn.Identity(),
            "use_rslora": cfg.use_rslora,
            "use_dora": cfg.use_dora,
            "lora_bias": cfg.lora_bias,
        }

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        slots = dict(site.low_rank_slots(rank_of_factors(site, cfg, settings["r"]), bias=cfg.lora_bias))
        for name in settings.get(FROZEN, ()):
            slots[name] = replace(slots[name], trainable=False)
        return slots

    def check_init(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> None:
        """See `Prepared`."""
        check_ready(site, cfg, settings["r"])

    def init(self, site: Site, adapter: Adapter) -> None:
        a, b = factors(adapter)
        initialise(site, a, b, adapter)
        if adapter.cfg.lora_bias:
            start_bias(site, up_bias(adapter), b, adapter.cfg)

    def restart(self, site: Site, adapter: Adapter, init: bool | str) -> None:
        """Fill the factors as `init_lora_weights` of True or "gaussian" does."""
        a, b = factors(adapter)
        restarted(site, a, b, init, adapter.setting("r"))
        if adapter.cfg.lora_bias:
            up_bias(adapter).zero_()

    def tied_slots(self, site: Site) -> Mapping[str, str]:
        """A head multiplies by the transposed table, so its factors are the table's, transposed and exchanged."""
        own = site.low_rank_slots(1)
        if "lora_embedding_A" in own:
            return {name: name for name in own}
        return {"lora_A": "lora_embedding_B", "lora_B": "lora_embedding_A"}

    def reads_base(self, cfg: LoraConfig) -> bool:
        """Whether `init` reads the base weight, which must not have adapters inside then."""
        return self.changes_base(cfg) or cfg.init_lora_weights == "mica"

    def changes_base(self, cfg: LoraConfig) -> bool:
        return cfg.base_changed_by is not None

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        sites = [adapter.through(site) for adapter in active]
        if len(active) == 1:
            (adapter,) = active
            y = sites[0].adapt(x, y, *self.pair(adapter), adapter.scale, adapter.dropout)
        elif site.groups == 1 and all(own is site for own in sites) and (one := _stacked(self.pair, active)):
            y = site.adapt(x, y, *one)
        else:
            y = self.one_by_one(site, sites, x, y, active)
        return y

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """See `Bindable`: for the one plain adapter of a layer that most models have."""
        if len(active) != 1 or len(active[0].slots) != 2:
            return None
        (adapter,) = active
        if adapter.cfg.lora_bias:
            return site.bind(adapter, partial(_with_bias, adapter), partial(_few_with_bias, adapter))
        return site.bind(adapter)

    def changes(self, site: ParameterSite, active: Sequence[Adapter]) -> list[LowRank]:
        """See `Parametric`."""
        return [LowRank(*self.pair(adapter), adapter.scale) for adapter in active]

    def describe(self, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        a, b = pair_of(tensors)
        r = pattern_value(cfg.rank_pattern, key, cfg.r)
        if cfg.target_parameters and len(a) > r:  # of a stack of matrices, in a layout that the file does not say
            return f"rank {r} in each of {len(a) // r} matrices"
        return describe_change(a, b, scaling_of(cfg, key)) + ", with magnitudes" * cfg.use_dora

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """See `Additive`."""
        a, b = self.pair(adapter)
        return a, b * adapter.scale

    def one_by_one(
        self,
        site: Site,
        sites: Sequence[Site],
        x: Tensor,
        y: Tensor | None,
        active: Sequence[Adapter],
        gates: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Sums, also that of the input's gradient, in the factors' dtype, rounded to the activations' once.

        Args:
            gates: one for every adapter, for a site with `gates`.
        """
        y = site.base(x) if y is None else y
        dtype = y.dtype
        x, y = widened(x, y, factors(active[0])[0])
        for adapter, own, gate in zip(active, sites, gates or [None] * len(active), strict=True):
            y = own.adapt(x, y, *self.pair(adapter), adapter.scale, adapter.dropout, gate)
        return y.to(dtype)

    def routed(
        self,
        site: Site,
        x: Tensor,
        y: Tensor | None,
        adapters: Sequence[Adapter],
        rows: Rows,
        gate: Tensor | None = None,
    ) -> Tensor:
        known = remembered(adapters, rows.verdicts, self.pair)
        dropout = {adapter.dropout for adapter in adapters} if known.dropping else {0.0}
        host = rows.host if gate is None else None
        many_each = host is not None and len(host) > 4 * len(adapters) and not rows.run and not site.segmented(x)
        if many_each or not known.alike or len(dropout) > 1:
            # with a gate, which `forward` makes for all samples, every adapter gets all of them
            return sample_by_sample(self, site, x, y, adapters, rows if gate is None else Rows(rows.index, None))
        y = site.base(x) if y is None else y
        x = site.drop(x, dropout.pop())
        return apply_stack(site, x, y, known.stack, rows, gate)

    def for_slot(
        self, site: Site, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """See `Slotted`."""
        settings = self.settings(site, cfg, key)
        slots = self.slots(site, cfg, settings)
        if len(slots) != 2 or cfg.lora_bias or set(tensors) != set(slots):
            more = list(slots)[2:]
            has = ", ".join(dict.fromkeys([*tensors, *more, *(["lora_bias"] if cfg.lora_bias else [])]))
            hint = "; peftfast.save_as_lora makes a pair of factors of it" if more else ""
            raise ValueError(f"a slot holds a pair of factors, this adapter has {has} at {key}{hint}")
        (a, down), (b, up) = ((tensors[name], slots[name]) for name in slots)
        if a.shape[1:] != down.shape[1:] or b.shape[0] != up.shape[0] or a.shape[0] != b.shape[1]:
            raise ValueError(f"factors {list(a.shape)} and {list(b.shape)} do not fit {key}")
        return a, b, settings["scaling"]

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        return combined_fields(adapters, how)

    def combine(
        self, site: Site, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination, into: Adapter
    ) -> Mapping[str, Tensor]:
        pairs = [self.pair(adapter) for adapter in adapters]
        return combined(site, adapters, pairs, weights, how, into.setting("r"))

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        a, b = (f.to(dense.weight.dtype) for f in self.pair(adapter))
        bias = adapter.scale * up_bias(adapter).to(dense.weight.dtype) if adapter.cfg.lora_bias else None
        return _added(site, dense, a, b, float(adapter.scale), bias)

    def merged_together(self, site: Site, dense: Dense, adapters: Sequence[Adapter]) -> Dense:
        """See `Joint`."""
        wide = site.weight.merge_dtype
        pairs = [tuple(f.to(wide) for f in self.pair(adapter)) for adapter in adapters]
        rank = sum(len(a) for a, _ in pairs) // site.experts
        one = combined(site, adapters, pairs, [1.0] * len(adapters), Combination("cat"), rank)
        down, up = adapters[0].pair
        return _added(site, dense, one[down], one[up], 1.0, one.get(f"{up}.bias"))


def _added(site: Site, dense: Dense, a: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Dense:
    """A weight with the product of factors, and a bias with another one."""
    dense = dense._replace(weight=site.with_delta(dense.weight, a, b, scale, dense.spare))
    if bias is None:
        return dense
    if dense.bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    return dense._replace(bias=dense.bias + bias)


def widened(x: Tensor, y: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output in the factors' dtype, for sums of several that are rounded once; under autocast as they are."""
    if is_autocasting(y):
        return x, y
    wide = torch.promote_types(y.dtype, factor.dtype)
    return x.to(wide) if x.is_floating_point() else x, y.to(wide)


def check_linear(site: Site, variant: str, field: str) -> None:
    """ValueError for a module that is no linear layer."""
    if "lora_A" not in site.low_rank_slots(1) or hasattr(site.module, "kernel_size"):
        raise ValueError(
            f"{variant} is defined for linear layers, not for a {type(site.module).__name__}; leave it out of "
            f"target_modules or set {field}=None"
        )


def scaling_of(cfg: LoraConfig, key: str) -> float:
    """What the product of the factors is multiplied by in the module `key`."""
    r = pattern_value(cfg.rank_pattern, key, cfg.r)
    return pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha) / (math.sqrt(r) if cfg.use_rslora else r)


def pair_of(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The down and the up factor among a module's tensors by slot, as matrices in fp32 or wider."""
    a, b = (next(t for slot, t in tensors.items() if slot.endswith(end)) for end in ("_A", "_B"))
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.flatten(1).to(wide), b.flatten(1).to(wide)


def describe_change(a: Tensor, b: Tensor, scale: float) -> str:
    """Rank and size of scale · B A, and in how many directions most of it lies."""
    _, s, _ = svd_of_sum([(a, b)], [scale])
    norm = float(torch.linalg.vector_norm(s.double()))
    if not norm:
        return f"rank {len(a)}, no change"
    return f"rank {len(a)}, change of norm {norm:.3g}, nine tenths of it in {rank_keeping(s, 0.9)}"


def _same_scale(adapters: Sequence[Adapter]) -> bool:
    scales = [adapter.scale for adapter in adapters]
    return not any(isinstance(scale, Tensor) for scale in scales) and len(set(scales)) == 1


def _stacked(pair: Pair, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor, float, float] | None:
    """Arguments of `site.adapt` for the sum of several: A stacked on the rank; scales that differ go into B. None where
    every adapter drops inputs of its own, where scaling B first would round half-precision factors, and where factors
    cannot be stacked."""
    if any(adapter.dropout for adapter in adapters):
        return None
    pairs, alike = [pair(adapter) for adapter in adapters], _same_scale(adapters)
    if not alike and pairs[0][1].dtype.itemsize < 4 or any(is_foreign(*both) for both in pairs):
        return None
    with without_autocast(pairs[0][0]):  # which refuses to put tensors of another half precision together
        downs, ups = zip(*pairs, strict=True)
        if not alike:
            ups = [b * adapter.scale for b, adapter in zip(ups, adapters, strict=True)]
        return torch.cat(downs, dim=0), torch.cat(ups, dim=1), adapters[0].scale if alike else 1.0, 0.0


def _with_bias(adapter: Adapter, part: Part) -> Part | None:
    """The part with s times the up factor's bias in the layer's own. None where their sum would be rounded to half
    precision, which a bias is only where autocast rounds each of them."""
    own, plan = up_bias(adapter), part.plan
    if plan.dtype.itemsize < 4 and own.dtype.itemsize <= plan.branch.itemsize:
        return None
    bias = own * adapter.scale if part.bias is None else torch.add(part.bias, own, alpha=adapter.scale)
    return part._replace(bias=bias.to(plan.dtype))


def _few_with_bias(adapter: Adapter, x: Tensor, part: Part) -> Tensor:
    whole = _with_bias(adapter, part)
    return composed_lora(x, part, up_bias=up_bias(adapter)) if whole is None else composed_lora(x, whole)


def up_bias(adapter: Adapter) -> Tensor:
    """The bias of the up factor, where the config asks for one (`lora_bias`)."""
    return adapter[f"{adapter.pair[1]}.bias"]
