"""The layers around a MultiheadAttention and the linear layer inside it whose weight it reads, as PEFT nests them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig
from peftfast.errors import enumerate_some
from peftfast.layers.layer import BaseTunerLayer, register_layer
from peftfast.layers.parameter import ChangingLayer
from peftfast.method import AdapterMethod
from peftfast.sites.attention import AttentionSite, OutProjectionSite, attend
from peftfast.sites.parameter import in_turn


class OutProjectionLayer(ChangingLayer):
    """Around `out_proj`, which is read and not called: its weight has the adapters in it."""

    site: OutProjectionSite

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer, OutProjectionSite(base_layer))

    @property
    def weight(self) -> Tensor:
        return self.parameter()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with in_turn(self.base_layer):
            return torch.func.functional_call(self.base_layer, {"weight": self.weight}, tuple(args), dict(kwargs))


@register_layer(AttentionSite)
class AttentionLayer(ChangingLayer):
    """PEFT's `lora.MultiheadAttention`. Attributes are the module's, except that `in_proj_weight` and `out_proj.weight`
    have the adapters in them: torch's TransformerEncoderLayer reads them in evaluation, and so do others."""

    site: AttentionSite

    def __init__(self, base_layer: nn.MultiheadAttention, site: AttentionSite) -> None:
        super().__init__(base_layer, site)
        base_layer.out_proj = OutProjectionLayer(base_layer.out_proj)

    def counterparts(self) -> tuple[str, ...]:
        return ("tuners.lora.layer.MultiheadAttention",)

    def inside(self) -> Mapping[str, BaseTunerLayer]:
        return {"base_layer.out_proj": self.base_layer.out_proj}

    def add_adapter(
        self, name: str, method: AdapterMethod, cfg: PeftConfig, key: str, *, initialise: bool = True, **options: Any
    ) -> Adapter:
        """Create the tensors of an adapter here and in `out_proj`, by the same patterns."""
        out: OutProjectionLayer = self.base_layer.out_proj
        options["initialise"] = initialise
        twice = not self.adapters
        if twice:
            out.add_adapter(name, method, cfg, key, **options)
        adapter = super().add_adapter(name, method, cfg, key, **options)
        if not twice:
            out.add_adapter(name, method, cfg, key, **options)
        elif initialise and not adapter[adapter.pair[0]].is_meta:
            # PEFT draws the first adapter's factors of out_proj before those of in_proj and once more after them
            with torch.no_grad():
                method.init(out.site, out.adapters[name])
        return adapter

    @property
    def in_proj_weight(self) -> Tensor:
        return self.parameter()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out_proj, routing = self.base_layer.out_proj, self._routing
        y = attend(self.base_layer, self.in_proj_weight, out_proj.weight, args, kwargs)
        if routing is None or self._disable_adapters:
            return y
        return (routing.named or routing).reaching(y, self, out_proj)

    def _mixed(self, key: str, names: Iterable[str]) -> Exception:
        return TypeError(
            f"lora.MultiheadAttention does not support mixed adapter batches: {key} has the same weights for all rows, "
            f"and this batch asks for {enumerate_some(names)}. Give it to one adapter after another."
        )

    def _restore_weights(self) -> None:
        """Nothing to do: no weight is ever taken out. Scripts for PEFT call it before loading."""
