"""Models made ready for hot-swapping after they were compiled: room for other ranks and scalings."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import nn

from peftfast.adapter import Adapter
from peftfast.errors import warn
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.combine import padded
from peftfast.methods.lora.config import LoraConfig
from peftfast.rules import integer, optional
from peftfast.wrapping.patterns import pattern_of


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | dict[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Make adapters of other ranks and scalings swappable, and scales settable, without a new graph: scalings become
    tensors that are written in place, factors are padded to `target_rank`, which configs then say. Call it before
    `torch.compile`.

    Args:
        target_rank: the largest rank that will be swapped in; None: ranks stay.
        config: config(s) whose rank becomes `target_rank`.
        check_compiled: "error", "warn" or "ignore" a model that is compiled already.

    Raises:
        ValueError: compiled already, no adapters, a larger rank present. TypeError: a config of another kind, a rank
            that is no integer. Nothing was changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        if check_compiled == "error":
            raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
        if check_compiled == "warn":
            warn(
                "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
                "result in re-compilation, hurting performance. Call the function before compiling the model."
            )
    inner = getattr(model, "_orig_mod", model)
    layers = [m for m in inner.modules() if isinstance(m, BaseTunerLayer) and "scaling" in m.__dict__]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    target_rank = optional(integer(1)).enforce(target_rank, "target_rank")
    configs = list(config.values()) if isinstance(config, dict) else [] if config is None else [config]
    for cfg in configs:
        if not isinstance(cfg, LoraConfig):
            raise TypeError(f"config must be a LoraConfig, or a dict of them by adapter name, got {config!r}")
    pairs = [(layer, adapter) for layer in layers for adapter in layer.adapters.values()]
    for layer, adapter in pairs if target_rank is not None else ():
        _check_room(layer, adapter, target_rank)
    with torch.no_grad():
        for layer, adapter in pairs:
            value = layer.scaling[adapter.name]
            layer.scaling[adapter.name] = torch.as_tensor(float(value), device=layer.site.weight.device)
            if target_rank is not None:
                slots = layer.site.low_rank_slots(target_rank)
                down, up = (adapter[s] for s in slots)
                sizes = [slot.shape[axis] for axis, slot in enumerate(slots.values())]
                down.data = padded(down.data, 0, sizes[0], runs_of(layer))
                up.data = padded(up.data, 1, sizes[1])
                layer.r[adapter.name] = target_rank
                _resize_holders(layer, adapter, sizes[0])
    for cfg in configs if target_rank is not None else ():
        cfg.r = target_rank
        cfg.rank_pattern = dict.fromkeys(cfg.rank_pattern or {}, target_rank)
    if target_rank is not None:
        for name in dict.fromkeys(adapter.name for _, adapter in pairs):
            own = [adapter for _, adapter in pairs if adapter.name == name]
            cfg, pattern = own[0].cfg, own[0].cfg.rank_pattern
            record_settings(cfg, own)
            cfg.rank_pattern = dict.fromkeys(pattern or {}, target_rank)  # as in PEFT: they stay, and say what is so


def _check_room(layer: BaseTunerLayer, adapter: Adapter, target_rank: int) -> None:
    """ValueError if the factors cannot be padded to this rank."""
    rank = rank_of(layer, adapter)
    if rank > target_rank:
        raise ValueError(
            f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
            f"({rank}). This is not possible."
        )
    if not pads(adapter):
        raise ValueError(
            f"{adapter.key}: Trying to pad the adapter to the target rank {target_rank}, but factors of this "
            "kind cannot be padded. Leave target_rank out."
        )
    if target_rank % layer.site.groups:
        raise ValueError(
            f"{adapter.key}: Trying to pad a {type(layer.get_base_layer()).__name__} LoRA adapter with "
            f"groups={layer.site.groups} to target rank {target_rank}, but the target rank is not divisible by "
            f"{layer.site.groups}. Please choose a target rank that is divisible by {layer.site.groups}."
        )


def _resize_holders(layer: BaseTunerLayer, adapter: Adapter, rank: int) -> None:
    """The sizes that the modules around the factors report."""
    down, up = adapter.pair
    for slot, names in ((down, ("out_features", "out_channels")), (up, ("in_features", "in_channels"))):
        if adapter.slots[slot].holder is not None:
            holder = getattr(layer, slot)[adapter.name]
            for name in names:
                if name in holder.__dict__:
                    setattr(holder, name, rank)


def pads(adapter: Adapter) -> bool:
    """See `method.Unpadded`."""
    return getattr(adapter.method, "pads", True)


def runs_of(layer: BaseTunerLayer) -> int:
    """Of how many runs the down factor's ranks consist. In the up factor ranks are the slowest, whatever is beside
    them."""
    return layer.site.experts * layer.site.groups


def rank_of(layer: BaseTunerLayer, adapter: Adapter) -> int:
    return adapter[adapter.pair[0]].shape[0] // layer.site.experts


def record_settings(config: LoraConfig, adapters: list[Adapter]) -> None:
    """Make the config say what the tensors are, padding included, so that the adapter can be saved."""
    ranks = {a.key: int(a.setting("r")) for a in adapters}
    root = math.sqrt if config.use_rslora else float
    alphas = {a.key: float(a.settings_of("_initial_scaling")[a.name]) * root(ranks[a.key]) for a in adapters}
    alphas = {k: round(v) if abs(v - round(v)) < 1e-6 * max(1.0, abs(v)) else v for k, v in alphas.items()}
    config.r, config.lora_alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    config.rank_pattern = pattern_of(ranks, config.r)
    config.alpha_pattern = pattern_of(alphas, config.lora_alpha)
