"""KaSA: y = W' x + s B diag(d) A drop(x), where W' is W without its r smallest singular components (Wang et al., arXiv
2412.06071).

W itself stays as it is. What W' lacks is a product of rank r, which the layer keeps beside the adapter and takes off
the output, so that disabling, deleting and unloading give the untouched base, adapters of other methods can stand
beside this one, and a quantised weight is not rounded a second time. Of several KaSA adapters the base lacks what the
one of the largest rank leaves out, once, as if it had been truncated for one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.autocast import without_autocast
from peftfast.method import register_method, sample_by_sample
from peftfast.methods.combination import Combination
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import drawn_through, wide_weight
from peftfast.methods.lora.lora import (
    Lora,
    check_linear,
    describe_change,
    factors,
    pair_of,
    scaling_of,
    widened,
)
from peftfast.ops.orthogonality import orthogonality
from peftfast.sharding import as_copies, is_distributed, put_together
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.bound import BoundLora

DIAGONAL = "lora_diag"
#: under what name a layer keeps what W' lacks
DROPPED = "kasa_dropped"

#: V [r, K] and -U S [N, r] of the components of W with the smallest singular values, the largest of these first: what
#: their product adds to W takes them out.
Components = tuple[Tensor, Tensor]


class _Dropped(nn.Module):
    """Keeps `Components` and moves them with the model. They are no buffers, which data-parallel training would send to
    all processes in every step and state dicts would have to hold.

    Attributes:
        stale: they are of a base weight that another one has taken the place of.
    """

    stale = False

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["components"] = None

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        if self.components is not None:
            moved = tuple(map(fn, self.components))
            # without values, they are those of the weight that the model gets later, from a file or by `to_empty`
            self.__dict__["components"] = None if moved[0].is_meta else moved
        return super()._apply(fn, recurse)


@register_method
class Kasa(Lora):
    """Several active adapters act one after the other, on a base that is truncated once."""

    variant: ClassVar[str | None] = "kasa_config"
    pads: ClassVar[bool] = False
    acts_when_zero: ClassVar[bool] = True
    routed = sample_by_sample

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        return {**super().settings(site, cfg, key), DROPPED: _Dropped()}

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        check_linear(site, "KaSA", "kasa_config")
        pair = super().slots(site, cfg, settings)
        r, directions = settings["r"], min(site.weight.shape)
        if r >= directions:
            raise ValueError(
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({directions}), so that "
                "something of the base weight is left"
            )
        return {**pair, DIAGONAL: Slot((pair["lora_A"].shape[0],))}

    def reads_base(self, cfg: LoraConfig) -> bool:
        return True

    def repeats_init(self, cfg: LoraConfig) -> bool:
        """See `Repeated`: what is left out of the base is in no file."""
        return True

    def init(self, site: Site, adapter: Adapter) -> None:
        super().init(site, adapter)
        diagonal = adapter[DIAGONAL]
        diagonal.copy_(torch.randn(diagonal.shape, dtype=drawn_through(site, diagonal), device=site.weight.device))
        adapter.setting(DROPPED).__dict__["components"] = None  # an initialisation may have changed the base
        _components(site, adapter)

    def base_replaced(self, adapter: Adapter) -> None:
        """See `Based`."""
        adapter.setting(DROPPED).__dict__["stale"] = True

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        a, b = factors(adapter)
        return adapter[DIAGONAL].unsqueeze(1) * a, b

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        apart = [one for one in active if one.dropout or one.through(site) is not site]
        lacking = self._lacking(site, active, self._merged(active[0]))
        if not apart:
            y = site.adapt(x, y, *self._together(active, lacking), 1.0, 0.0)
        else:
            y = site.base(x) if y is None else y
            dtype, (wide_x, wide) = y.dtype, widened(x, y, factors(apart[0])[0])
            for adapter in apart:
                wide = self._adapt(adapter.through(site), site, wide_x, wide, adapter)
            rest = [one for one in active if one not in apart]
            if rest or lacking is not None:
                wide = site.adapt(wide_x, wide, *self._together(rest, lacking), 1.0, 0.0)
            y = wide.to(dtype)
        return y

    def _adapt(self, own: Site, site: Site, x: Tensor, y: Tensor, adapter: Adapter) -> Tensor:
        """One adapter's change, without what is left out of the base."""
        a, b = factors(adapter)
        if own is site:
            return site.adapt(x, y, *self.pair(adapter), adapter.scale, adapter.dropout)
        return own.adapt(x, y, a, b, adapter.scale, adapter.dropout, between=adapter[DIAGONAL])

    def _together(self, adapters: Sequence[Adapter], lacking: Components | None) -> tuple[Tensor, Tensor]:
        """All changes as one pair of factors: one product, rounded once."""
        downs = [adapter[DIAGONAL].mul(adapter.scale).unsqueeze(1) * factors(adapter)[0] for adapter in adapters]
        ups = [factors(adapter)[1] for adapter in adapters]
        if lacking is not None:
            downs.append(lacking[0])
            ups.append(lacking[1])
        with without_autocast(downs[0]):
            return torch.cat(downs), torch.cat(ups, dim=1)

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """See `Bindable`: for one adapter without dropout."""
        (adapter, *others) = active
        if others or adapter.cfg.lora_bias or self._merged(adapter):
            return None

        def weighted(part: Any) -> Any:
            if part.plan.dropout:  # what the base lacks is not dropped
                return None
            a, b = self._together(active, self._lacking(site, active))
            return part._replace(a=a, b=b, plan=part.plan._replace(scale=1.0))

        return site.bind(adapter, weighted)

    def _merged(self, adapter: Adapter) -> list[Adapter]:
        """Those of this method that are inside the weight, which has been truncated with them."""
        return [other for other in adapter.merged if other.method is self]

    @staticmethod
    def _lacking(
        site: Site, adapters: Sequence[Adapter], inside: Sequence[Adapter] = (), weight: Tensor | None = None
    ) -> Components | None:
        """What the base still has and `adapters` leave out; `inside` have been taken care of."""
        down, up = _components(site, adapters[0], weight)
        for adapter in adapters[1:]:
            other = _components(site, adapter, weight)
            if len(other[0]) > len(down):
                down, up = other
        count = len(down)
        for adapter in inside:  # the smallest components, which all leave out, come last
            count = min(count, len(down) - len(_components(site, adapter)[0]))
        if count <= 0:
            return None
        return (down, up) if count == len(down) else (down[:count], up[:, :count])

    def before_merging(self, site: Site, base: Dense, adapters: Sequence[Adapter]) -> Dense:
        """See `Refining`."""
        lacking, wide = self._lacking(site, adapters, weight=put_together(base.weight)), base.weight.dtype
        down, up = (as_copies(part.to(wide), base.weight) for part in lacking)
        return base._replace(weight=site.with_delta(base.weight, down, up, 1.0))

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """See `Additive`: of twice the rank, for the base as it is."""
        a, b = super().as_product(adapter)
        site, weight = adapter.site, None
        if is_distributed(site.module._parameters.get("weight")) and not adapter.merged:
            weight = wide_weight(site)  # by all processes, of which some may have kept what their samples needed
        down, up = (as_copies(part.to(a.dtype), a) for part in _components(site, adapter, weight))
        return torch.cat([a, down]), torch.cat([b, up], dim=1)

    def describe(self, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        a, b = pair_of(tensors)
        said = describe_change(a * tensors[DIAGONAL].to(a).unsqueeze(1), b, scaling_of(cfg, key))
        return f"{said}; the base without its {len(a)} smallest singular values"

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        raise TypeError(
            "KaSA (kasa_config) does not support add_weighted_adapter: how much of the base is left out follows from "
            "the rank, which a combination changes. Combine what peftfast.save_as_lora makes of the adapters."
        )


def _components(site: Site, adapter: Adapter, weight: Tensor | None = None) -> Components:
    """What the base lacks with this adapter, computed where nobody has needed it yet.

    Args:
        weight: W [N, K] without adapters in it; None: what the module has.

    Raises:
        RuntimeError: the base's weight has no values yet, or has other adapters inside.
    """
    keeper = adapter.setting(DROPPED)
    # while adapters are inside, what came in the weight's place is theirs, and goes when they are taken out
    if keeper.components is not None and (not keeper.stale or weight is None and adapter.merged):
        return keeper.components
    if weight is None:
        if adapter.merged:
            raise RuntimeError(
                f"Adapter {adapter.name} leaves out a part of the base weight of {adapter.key}, which contains "
                f"{', '.join(other.name for other in adapter.merged)} now. Please unmerge first."
            )
        weight = wide_weight(site)
    dtype = factors(adapter)[0].dtype
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        r = int(adapter.setting("r"))
        components = vh[-r:].to(dtype).contiguous(), (u[:, -r:] * -s[-r:]).to(dtype).contiguous()
    if type(components[0]) is Tensor and not components[0].is_meta:
        keeper.__dict__.update(components=components, stale=False)
    return components


def kasa_loss(adapters: Sequence[Adapter]) -> Tensor | float:
    """The sum over layers of beta ‖d‖² + gamma (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖) (equations 9 to 11), a scalar in fp32 or wider
    with gradients; 0.0 without adapters."""
    total: Tensor | float = 0.0
    by_config: dict[int, list[Adapter]] = {}
    for adapter in adapters:
        by_config.setdefault(id(adapter.cfg), []).append(adapter)
    for group in by_config.values():
        weights = group[0].cfg.kasa_config
        pairs = [factors(adapter) for adapter in group]
        # the mean over all factors
        together = orthogonality([a for a, _ in pairs], [b for _, b in pairs]) * (2 * len(pairs))
        diagonals = [put_together(adapter[DIAGONAL]) for adapter in group]
        squares = [d.to(torch.promote_types(d.dtype, torch.float32)).square().sum() for d in diagonals]
        small = torch.stack([square.to(together.device) for square in squares]).sum()
        total = total + weights.beta * small + weights.gamma * together
    return total
