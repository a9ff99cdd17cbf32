"""Adapter layers by the kind of their module, under the names by which code written for PEFT tells them apart, and from
which users derive their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from peftfast.config import PeftConfig
from peftfast.layers.layer import BaseTunerLayer, register_layer
from peftfast.sites import Site
from peftfast.sites.conv import ConvSite
from peftfast.sites.embedding import EmbeddingSite
from peftfast.sites.linear import LinearSite


class _OfKind(BaseTunerLayer):
    """A layer whose module is taken for one of this kind, whatever its class.

    Args:
        site: None: one of the kind.
        adapter_name, config, r, lora_alpha, settings: what PEFT's layers are made with, for the adapter to begin with.
            A class that a user has derived and registered gets it from the model, as all others, by `add_adapter`.
    """

    site_of: ClassVar[Callable[[nn.Module], Site]]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: PeftConfig | None = None,
        r: int = 0,
        lora_alpha: float = 1,
        *,
        site: Site | None = None,
        **settings: Any,
    ) -> None:
        site = type(self).site_of(base_layer) if site is None else site
        alone = adapter_name is not None and config is not None and type(self).__module__ == __name__
        if alone and getattr(config, "fan_in_fan_out", False):
            site.weight.transposed = True
        super().__init__(base_layer, site)
        if alone:
            self._begin(adapter_name, config, r, lora_alpha)


@register_layer(LinearSite)
class Linear(_OfKind):
    site_of = LinearSite


@register_layer(EmbeddingSite)
class Embedding(_OfKind):
    site_of = EmbeddingSite


class Conv1d(_OfKind):
    site_of = ConvSite


class Conv2d(_OfKind):
    site_of = ConvSite


class Conv3d(_OfKind):
    site_of = ConvSite


@register_layer(ConvSite)
def _conv(module: nn.Module, site: Site) -> BaseTunerLayer:
    kinds = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}
    return next(layer for kind, layer in kinds.items() if isinstance(module, kind))(module, site=site)
