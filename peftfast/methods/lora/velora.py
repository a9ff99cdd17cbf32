"""VeLoRA: a LoRA whose training keeps, of every group of an input's features, one number (Miles et al., arXiv
2405.17991).

What it computes, merges and saves is a LoRA's; what training keeps and how A is differentiated is in `ops/velora.py`.
Where the factors' modules have to be called, because of hooks on them or other modules in their place, the gradient is
LoRA's own and the input is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.method import register_method
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import drawn_through
from peftfast.methods.lora.lora import check_linear, factors, up_bias, widened
from peftfast.methods.lora.trained_otherwise import TrainedOtherwise
from peftfast.ops.velora import direction, mean_direction, velora_linear_add
from peftfast.sites import Site, Slot
from peftfast.sites.site import is_plain

#: the direction on which groups of features are projected
EMBED = "lora_velora_embed"
_INITIALISED, _INIT_TYPE = "lora_velora_initialized", "lora_velora_init_type"
_GROUPS, _SCALE = "lora_velora_num_groups", "lora_velora_scale"


@register_method
class Velora(TrainedOtherwise):
    """What of a file a pool has no use for is in `only_for_training`."""

    variant: ClassVar[str | None] = "velora_config"
    only_for_training = (EMBED,)

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        own = cfg.velora_config
        return {
            **super().settings(site, cfg, key),
            _GROUPS: own.num_groups,
            _INIT_TYPE: own.init_type,
            _SCALE: own.scale,
            _INITIALISED: False,
        }

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        check_linear(site, "VeLoRA", "velora_config")
        size = -(-site.weight.shape[1] // settings[_GROUPS])
        embed = Slot((size,), buffer=True, trainable=False, fill=0.0)
        return {**super().slots(site, cfg, settings), EMBED: embed}

    def init(self, site: Site, adapter: Adapter) -> None:
        super().init(site, adapter)
        if adapter.setting(_INIT_TYPE) == "random":
            _draw(site, adapter)

    @staticmethod
    def trains(adapter: Adapter) -> bool:
        """Whether this call keeps compressed inputs for the backward pass."""
        return adapter.training and torch.is_grad_enabled() and factors(adapter)[0].requires_grad

    def forward_training(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        y = site.base(x) if y is None else y
        dtype = y.dtype
        if len(active) > 1:
            x, y = widened(x, y, factors(active[0])[0])
        for adapter in active:
            own, (a, b) = adapter.through(site), factors(adapter)
            if not adapter.holders.are_plain() or not self.trains(adapter) or not is_plain(x, y, a, b):
                y = own.adapt(x, y, a, b, adapter.scale, adapter.dropout)
            else:
                if isinstance(scale := adapter.scale, Tensor):  # a scale that may change inside a compiled graph
                    b, scale = b * scale.to(b.dtype), 1.0
                y = velora_linear_add(
                    y, x, a, b, scale, adapter.dropout, lambda rows, of=adapter: _project(site, of, rows),
                    adapter.setting(_SCALE),
                )  # fmt: skip
                if adapter.cfg.lora_bias:
                    y = site.add_to_output(y, up_bias(adapter) * adapter.scale)
        return y.to(dtype)


def _project(site: Site, adapter: Adapter, rows: Tensor) -> Tensor:
    """The direction for these rows, which becomes the adapter's where that is what its `init_type` says."""
    kind, embed = adapter.setting(_INIT_TYPE), adapter[EMBED]
    if kind == "random":
        if not _is_initialised(adapter):
            _draw(site, adapter)
        return embed
    if kind == "batch_average_once" and _is_initialised(adapter):
        return embed
    found = mean_direction(rows, len(embed))
    embed.copy_(found)
    adapter.change(_INITIALISED, True)
    return embed if kind == "batch_average_once" else found


def _is_initialised(adapter: Adapter) -> bool:
    """Whether there is a direction, made here or loaded."""
    if not adapter.setting(_INITIALISED) and not torch.compiler.is_compiling() and bool(adapter[EMBED].any()):
        adapter.change(_INITIALISED, True)
    return adapter.setting(_INITIALISED)


@torch.no_grad()
def _draw(site: Site, adapter: Adapter) -> None:
    embed = adapter[EMBED]
    drawn = torch.randn(embed.shape, dtype=drawn_through(site, embed), device=embed.device)
    embed.copy_(direction(drawn).to(drawn.dtype))
    adapter.change(_INITIALISED, True)
