"""Ranks of a LoRA that is already there: factors of another size, or none."""

from __future__ import annotations

from torch import nn

from peftfast.layers.layer import BaseTunerLayer
from peftfast.wrapping.inventory import Inventory


def resize_adapter(inventory: Inventory, name: str, keys: list[str]) -> None:
    """Make the factors of an adapter anew at these modules, as its config now says; trainability stays."""
    for key in keys:
        layer: BaseTunerLayer = inventory.layers[key]
        old = layer.adapters[name]
        first: nn.Parameter = next(layer.trainable(old))
        method, cfg, dtype, device, trained = old.method, old.cfg, first.dtype, first.device, first.requires_grad
        active, disabled = layer.active_adapters, layer._disable_adapters
        layer.forget(name)
        device = layer.site.weight.device if device.type == "meta" else device
        layer.add_adapter(name, method, cfg, key, dtype=dtype, device=device)
        for module in layer.modules():
            module.training = layer.training
        layer.set_requires_grad(name, trained)
        layer.activate(active)
        layer._disable_adapters = disabled


def drop_adapter(inventory: Inventory, name: str, keys: list[str]) -> None:
    """Take an adapter off these modules; a module without any is itself again."""
    for key in keys:
        inventory.layers[key].forget(name)
        inventory.unwrap(key)
