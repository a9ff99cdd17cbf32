"""DoRA: y = (m / ‖W + s B A‖) (W + s B A) x with a trained magnitude m per output feature (Liu et al., arXiv
2402.09353). The norm is treated as a constant by the gradient, as the paper suggests in section 4.3.

Neither B A nor W + s B A is ever built as a whole, save for grouped convolutions (see `ConvSite.adapted_norm`). The
norm is computed anew in every forward, because writes to the factors through `.data` leave no trace that a cache could
see; inside `helpers.DoraCaching` layers in eval mode keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.method import register_method, sample_by_sample
from peftfast.methods.combination import Combination
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import initialise, rank_of_factors, wide_weight
from peftfast.methods.lora.lora import Lora, factors
from peftfast.methods.lora.stack import watch_of
from peftfast.sharding import is_distributed
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.site import is_foreign
from peftfast.watch import ContentWatch

MAGNITUDE = "lora_magnitude_vector"


class _Kept(NamedTuple):
    """A norm, and what it depends on."""

    norm: Tensor
    module: nn.Module
    watch: ContentWatch


class _Magnitude(nn.Module):
    """Holds the magnitudes under the name that files and other libraries expect."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.__dict__["_kept"] = None  # a `_Kept`, see `cache_norms`

    def train(self, mode: bool = True) -> _Magnitude:
        self.__dict__["_kept"] = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}


_caching = False


def cache_norms(enabled: bool) -> bool:
    """Let layers in eval mode keep their norms as long as factors and weight are the same tensors with the same
    versions, so that generation reads each weight once per token; what was set before. Writes to factors through
    `.data` in eval mode are not seen while this is on."""
    global _caching
    before, _caching = _caching, enabled
    return before


@register_method
class Dora(Lora):
    """Several active adapters act one after the other, each on the output so far."""

    variant: ClassVar[str | None] = "use_dora"
    acts_when_zero: ClassVar[bool] = True
    few_roundings: ClassVar[bool] = True
    routed = sample_by_sample

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        magnitude = Slot(site.vector_shape("magnitude"), holder=_Magnitude, bare_in_file=True)
        return {**site.low_rank_slots(rank_of_factors(site, cfg, settings["r"])), MAGNITUDE: magnitude}

    def reads_base(self, cfg: LoraConfig) -> bool:
        return True

    def init(self, site: Site, adapter: Adapter) -> None:
        initialise(site, *factors(adapter), adapter)
        self.init_untied(site, adapter)

    def init_untied(self, site: Site, adapter: Adapter) -> None:
        """See `Tieable`: rows of a table and rows of a head's weight are not the same features."""
        a, b = (f.detach() for f in factors(adapter))
        if b.is_cpu and not (b.any() and a.any()):  # one rank is as zero as all; a GPU would compile a kernel for it
            a, b = a[: site.groups], b[:, :1]
        adapter[MAGNITUDE].copy_(site.adapted_norm(a, b, adapter.scale).view(adapter[MAGNITUDE].shape))

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        for adapter in active:
            own = adapter.through(site)  # which finds factors that hang elsewhere by now
            a, b = factors(adapter)
            if own is not site and a.dim() == 2:
                norm = _norm_by_calls(own, adapter)
            else:
                norm = _kept_norm(site, adapter) if _caching else _norm(site, adapter)
            g = adapter[MAGNITUDE].flatten().to(norm.dtype) / norm
            y = own.magnify(x, y, a, b, g, adapter.scale, adapter.dropout)
        return y

    def combine(
        self, site: Site, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination, into: Adapter
    ) -> Mapping[str, Tensor]:
        """Factors as LoRA combines them; magnitudes by their changes from the weight's own norm, which PEFT drops."""
        tensors = dict(super().combine(site, adapters, weights, how, into))
        start = site.output_norm(wide_weight(site))
        changes = [
            w * (a[MAGNITUDE].detach().flatten().to(start) - start) for a, w in zip(adapters, weights, strict=True)
        ]
        tensors[MAGNITUDE] = (start + sum(changes)).view(adapters[0][MAGNITUDE].shape)
        return tensors

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """None: the magnitudes change all of the weight."""
        return None

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        a, b = (f.to(dense.weight.dtype) for f in factors(adapter))
        changed = site.with_delta(base.weight, a, b, float(adapter.scale), base.spare)
        # as in forward, the norm is that of the weight without other adapters
        norm = site.output_norm(changed)
        if dense is not base:
            changed = site.with_delta(dense.weight, a, b, float(adapter.scale))
        g = adapter[MAGNITUDE].flatten().to(norm) / norm
        return dense._replace(weight=site.scale_weight(changed, {"output": g}, not is_distributed(changed)))


def _norm(site: Site, adapter: Adapter) -> Tensor:
    """‖W + s B A‖ per output feature, in fp32 or wider, without a graph."""
    a, b = (f.dequantize() if is_foreign(f) else f.detach() for f in factors(adapter))
    return site.adapted_norm(a, b, adapter.scale)


@torch.no_grad()
def _norm_by_calls(site: Site, adapter: Adapter) -> Tensor:
    """The same where the factors' modules are called, which then know more of B A than their weights."""
    delta = site.delta(*factors(adapter))
    wide = torch.promote_types(delta.dtype, torch.float32)
    return site.output_norm(site.weight.dense(wide) + adapter.scale * delta.to(wide))


def _kept_norm(site: Site, adapter: Adapter) -> Tensor:
    holder = adapter.setting(MAGNITUDE)
    if holder.training:
        return _norm(site, adapter)
    kept = holder._kept
    if kept is None or kept.module is not site.module or not kept.watch.holds():
        with torch.inference_mode(False), torch.no_grad():  # later forwards with gradients may use it
            norm = _norm(site, adapter)
        base, own = site.module._parameters, adapter.kept
        # merging into a packed weight leaves no other trace
        more = [(base, "weight", base.get("weight")), (own, "_merged", own["_merged"])]
        watch = watch_of([adapter], factors(adapter), [adapter.scale], more) if "weight" in base else None
        if watch is None:
            return norm
        holder.__dict__["_kept"] = kept = _Kept(norm, site.module, watch)
    return kept.norm
