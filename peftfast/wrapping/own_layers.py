"""Adapters in layers that users write themselves, which `_register_custom_module` of a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftfast.config import PeftConfig, plain_name
from peftfast.errors import warn
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.own import LoraLayer
from peftfast.modes import modes_kept
from peftfast.sites.site import has_site
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.patterns import pattern_value


def own_layer_classes(
    inventory: Inventory, cfg: PeftConfig, keys: Sequence[str]
) -> tuple[dict[str, type], dict[str, type]]:
    """Which of the modules `keys` are to get a layer of the user's own, and its class: those whose class derives from
    one of the library's layers, and all others."""
    mapping = getattr(cfg, "_custom_modules", None) or {}
    found: dict[str, type] = {}
    for key in keys:
        present = inventory.module(key)
        if isinstance(present, BaseTunerLayer):
            continue
        if isinstance(present, LoraLayer):
            if not hasattr(cfg, "_custom_modules"):
                raise ValueError(
                    f"{key} has a layer of a user's own, which takes LoRA's adapters and no {plain_name(cfg.peft_type)}"
                )
            found[key] = type(present)
            continue
        cls = next((cls for kind, cls in mapping.items() if isinstance(present, kind)), None)
        if cls is not None:
            if not issubclass(cls, LoraLayer):
                raise TypeError(
                    f"{key}: {cls.__name__}, which the config registers for {type(present).__name__}, derives neither "
                    "from peft.tuners.lora.LoraLayer nor from one of the library's layers"
                )
            if issubclass(cls, BaseTunerLayer) and hasattr(cls, "update_layer"):
                raise TypeError(
                    f"{key}: {cls.__name__} has an update_layer, which nothing calls in a layer that derives from one "
                    "of the library's; a layer that makes its adapters itself derives from torch.nn.Module and "
                    "peft.tuners.lora.LoraLayer"
                )
            found[key] = cls
            if not has_site(present):
                warn(f"Unsupported layer type '{type(present)}' encountered, proceed at your own risk.")
    derived = {key: cls for key, cls in found.items() if issubclass(cls, BaseTunerLayer)}
    return derived, {key: cls for key, cls in found.items() if key not in derived}


def settings_of(cfg: Any, key: str) -> dict[str, Any]:
    """What a layer of the user's own is told by keyword, beside its module and the adapter's name."""
    return {
        "r": pattern_value(cfg.rank_pattern, key, cfg.r),
        "lora_alpha": pattern_value(cfg.alpha_pattern, key, cfg.lora_alpha),
        "config": cfg,
        "target_name": key,
    }


def add_to_own_layer(
    inventory: Inventory,
    key: str,
    cls: type,
    name: str,
    cfg: Any,
    device: torch.device | str | None,
    trains: bool,
) -> None:
    """Add an adapter, frozen and inactive, to a layer of the user's own, which is made where there is none yet: in
    training mode if it `trains`, in its module's otherwise."""
    layer = inventory.extras.get(key)
    if layer is None:
        module = inventory.module(key)
        layer = cls(module, name, **settings_of(cfg, key))
        if not trains:
            with modes_kept(module):
                layer.train(module.training)
        inventory.extras[key] = layer
        inventory.replace(key, layer)
    else:
        layer.update_layer(name, **settings_of(cfg, key))
    layer._adapters.add(name)
    base = next(layer.base_layer.parameters(), None)
    device = base.device if device is None and base is not None else device
    for live in layer.adapter_state_dict_load_map(name).values():
        path, _, attribute = live.rpartition(".")
        owner = layer.get_submodule(path)
        tensor = getattr(owner, attribute)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(tensor.detach().to(device), requires_grad=False))
