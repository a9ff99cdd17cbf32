"""Adapters made from adapters: weighted combinations of every kind, and differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig
from peftfast.errors import enumerate_some, warn
from peftfast.layers.saved_modules import ModulesToSaveWrapper
from peftfast.layers.sharded import beside
from peftfast.method import method_for
from peftfast.methods.combination import KINDS, Combination, named_together
from peftfast.sharding import copy_whole, put_together
from peftfast.sites import Site
from peftfast.wrapping.adding import add_adapter, check_name
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.targets import make_matcher, shortest_suffixes


@runtime_checkable
class Combinable(Protocol):
    """What a method offers whose adapters can be made from others."""

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        """Fields in which the result's config differs from the first adapter's, targets aside."""
        ...

    def combine(
        self, site: Site, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination, into: Adapter
    ) -> Mapping[str, Tensor]:
        """What the slots of the new adapter `into` get at one site, by their names."""
        ...

    # Optional: fields_by_name(cfg, keys), other fields of a config that go by the names of targets, for targets that
    # are the full names `keys` from now on; a method without it has none.


def add_weighted_adapter(
    inventory: Inventory, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: Combination
) -> None:
    """Add an adapter, frozen and inactive, that is a combination of others. Nothing is changed if it cannot be made.

    Modules kept by `modules_to_save` are combined, statistics included, as the module plus the weighted sum of the
    copies' differences from it.

    Raises:
        ValueError: an adapter that is not there, weights that are not one for each, an unknown kind, adapters of
            different methods. TypeError: a method that has no combination, a kind that lacks its density.
    """
    check_name(adapter_name)
    if adapter_name in inventory.configs:
        warn(f"Adapter {adapter_name!r} exists already; add_weighted_adapter leaves it as it is.")
        return
    adapters, weights = [adapters] if isinstance(adapters, str) else list(adapters), _numbers(weights)
    method, how = _checked(inventory, adapters, weights, how)
    layers = inventory.layers
    keys = [key for key in inventory.names if key in layers and any(n in layers[key].adapters for n in adapters)]
    modules = [key for key in keys if not inventory.is_nested(key)]
    fields = method.combined_fields([inventory.adapters(n) for n in adapters], how)
    cfg = _combined_config(inventory, adapters, modules, fields)
    add_adapter(inventory, adapter_name, cfg, modules=modules)
    try:
        with torch.no_grad():
            for layer in [one for key in keys for one in (layers[key], *layers[key].inside().values())]:
                made = layer.adapters[adapter_name]
                own = layer.own_slots(made)
                if not own:
                    continue  # what it has is made where it is kept
                here = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.adapters]
                whole = [beside(layer, n, None) for n, _ in here]
                tensors = method.combine(layer.site, whole, [w for _, w in here], how, made)
                for slot, tensor in tensors.items():
                    if slot.partition(".")[0] in own:
                        copy_whole(made[slot], tensor)
            for wrapper in inventory.extras.values():
                if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
                    _combine_copies(wrapper, adapters, weights, adapter_name)
    except BaseException:
        inventory.delete(adapter_name)
        raise


def subtract(inventory: Inventory, minuend: str, subtrahend: str, adapter_name: str) -> None:
    """Add the adapter whose change of the weights is that of `minuend` without that of `subtrahend`, exactly: the
    factors side by side (task vectors, Ilharco et al., arXiv 2212.04089)."""
    add_weighted_adapter(inventory, [minuend, subtrahend], [1.0, -1.0], adapter_name, Combination("cat"))


def _checked(
    inventory: Inventory, adapters: list[str], weights: list[float], how: Combination
) -> tuple[Combinable, Combination]:
    inventory.check_known(adapters, "does not exist")
    if not adapters:
        raise ValueError("Found no adapter matching the names in []")
    if len(weights) != len(adapters):
        raise ValueError(f"Each adapter needs one weight, got {adapters} and {weights}")
    if len(adapters) == 1 and how.kind in KINDS:  # nothing to prune against: scaled, without a density
        how = replace(how, kind="linear")
    how.check()
    configs = [inventory.configs[n] for n in adapters]
    methods = [method_for(c) for c in configs]
    if len(set(methods)) > 1:
        kinds = [f"{n} is {type(m).__name__.lower()}" for n, m in zip(adapters, methods, strict=True)]
        message = f"Only adapters of one method can be combined: {', '.join(kinds)}. "
        if any(getattr(c, "use_dora", False) for c in configs):
            message += "A DoRA's magnitudes (use_dora=True) scale the whole weight, which no LoRA can express. "
        together = list(dict.fromkeys(adapters))
        raise ValueError(
            f"{message}To use them together, activate them at once, model.base_model.set_adapter({together}), or merge "
            f"them into the base, model.merge_adapter({together})"
        )
    method = methods[0]
    if not isinstance(method, Combinable):
        raise TypeError(f"{method.family} does not support add_weighted_adapter: its adapters cannot be combined")
    for name, cfg in zip(adapters, configs, strict=True):
        if getattr(cfg, "trainable_token_indices", None):
            raise ValueError(
                f"Adapter {name} trains token rows (trainable_token_indices), which have no weighted combination"
            )
    present = [a for n in adapters for a in inventory.adapters(n)]
    meta = [a.key for a in present if any(t.is_meta for t in a.parameters().values())]
    if meta:
        raise ValueError(f"Adapters have not been loaded yet: tensors are on the meta device at {enumerate_some(meta)}")
    return method, how


def _numbers(weights: Sequence[float]) -> list[float]:
    try:
        numbers = [math.nan if isinstance(w, str) else float(w) for w in weights]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"Each adapter needs one weight, a finite number; got {weights!r}")
    return numbers


#: Fields that keep modules out which `target_modules` names.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _combined_config(
    inventory: Inventory, adapters: Sequence[str], keys: Sequence[str], fields: Mapping[str, Any]
) -> PeftConfig:
    configs = [inventory.configs[n] for n in adapters]
    together = named_together([c.target_modules for c in configs])
    cfg = copy.deepcopy(configs[0])
    saved = list(dict.fromkeys(n for c in configs for n in getattr(c, "modules_to_save", None) or ()))
    cfg.target_modules = together
    parameters = [c.target_parameters for c in configs if getattr(c, "target_parameters", None)]
    if parameters:
        cfg.target_parameters = copy.copy(parameters[0])  # those of all adapters of a model are the same
    if saved:
        cfg.modules_to_save = saved
    tied = [{k for k in keys if n in inventory.layers[k].merger.sources} for n in adapters]
    parted = any(own != tied[0] for own in tied)  # so the sums differ too, in modules that share a weight
    if parted:
        cfg.ensure_weight_tying = False
    for name, value in fields.items():
        setattr(cfg, name, value)
    narrowing = any(getattr(c, name, None) not in (None, []) for c in configs for name in _NARROWING)
    if together is None or ((narrowing or parted) and list(filter(make_matcher(cfg), inventory.names)) != list(keys)):
        _name_exactly(cfg, inventory, keys)
    return cfg


def _name_exactly(cfg: PeftConfig, inventory: Inventory, keys: Sequence[str]) -> None:
    """Let `cfg` mean the modules `keys` of this model and no others: what the adapters leave out, each for itself,
    cannot be said of all of them together."""
    for name in _NARROWING:
        if hasattr(cfg, name):
            setattr(cfg, name, None)
    method = method_for(cfg)
    if hasattr(type(method), "fields_by_name"):
        for name, value in method.fields_by_name(cfg, keys).items():
            setattr(cfg, name, value)
        cfg.target_modules = set(keys)
    else:
        cfg.target_modules = shortest_suffixes(keys, inventory.names)


def _combine_copies(
    wrapper: ModulesToSaveWrapper, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    own = _floating(wrapper.original_module)
    copies = [(w, _floating(wrapper.modules_to_save[n])) for n, w in zip(adapters, weights, strict=True)
              if n in wrapper._adapters]  # fmt: skip
    statistics = dict(wrapper.original_module.named_buffers())
    for name, target in _floating(wrapper.modules_to_save[adapter_name]).items():
        wide = torch.promote_types(target.dtype, torch.float32)
        base, *others = (put_together(tensors[name].detach()).to(wide) for tensors in (own, *(c for _, c in copies)))
        value = base + sum(w * (other - base) for (w, _), other in zip(copies, others, strict=True))
        if name in statistics:
            least = torch.stack([base, *others]).amin(0)
            if bool((least >= 0).all()):  # variances, which negative weights must not make negative
                value = torch.maximum(value, least)
        target.copy_(value)


def _floating(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers that are learnt in training as well (BatchNorm's statistics)."""
    return {n: t for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_floating_point()}
