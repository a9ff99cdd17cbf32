"""Which Parameters a config means by `target_parameters`, and what an adapter of theirs cannot be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import close_matches, enumerate_some
from peftfast.keys import ends_of
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.method import AdapterMethod
from peftfast.sharding import is_unit_of_fsdp2
from peftfast.sites.parameter import ParameterSite
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.targets import say_misfits

#: Fields that act on a module's input or output, of which a Parameter has none, with the values that do nothing.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "lora_dropout": (0.0,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_dora": (False,),
    "variant": (None,),
    "init_lora_weights": (True, False, "gaussian"),
}

#: Module name -> names of its Parameters that are adapted, in the order in which it registers them.
Targets = dict[str, list[str]]


def plan_parameters(
    inventory: Inventory, cfg: PeftConfig, method: AdapterMethod, modules: Sequence[str], saved: Sequence[str]
) -> Targets:
    """What `target_parameters` matches.

    Args:
        modules: names that `target_modules` matched. saved: those that `modules_to_save` did.

    Raises:
        ValueError: something about it that no adapter of a Parameter can do.
    """
    wanted = set(getattr(cfg, "target_parameters", None) or ())
    _check_conflicts(inventory, modules)
    if not wanted:
        return {}
    _check_others(inventory, wanted)
    found = matching_parameters(inventory, wanted)
    if found:
        _check_settings(cfg, method, modules)
    check_adaptable(inventory, found, modules, saved)
    return found


def matching_parameters(inventory: Inventory, wanted: Collection[str]) -> Targets:
    """The Parameters that have one of these names, or whose names end in one.

    Raises:
        ValueError: the model itself, not a module of it, has one.
    """
    suffixes = tuple(f".{name}" for name in wanted)
    top = [n for n, _ in inventory.model.named_parameters(recurse=False) if f".{n}".endswith(suffixes)]
    if top:
        raise ValueError(f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{top[0]}').")
    found: Targets = {}
    for key, name in _parameters(inventory):
        if f"{key}.{name}" in wanted or f"{key}.{name}".endswith(suffixes):
            found.setdefault(key, []).append(name)
    return found


def check_adaptable(
    inventory: Inventory, targets: Targets, modules: Sequence[str] = (), saved: Sequence[str] = ()
) -> None:
    """ValueError where a Parameter of `targets` cannot be adapted, or not beside what is adapted already."""
    for key, names in targets.items():
        _check_module(inventory, key, names, modules, saved)
        for name in names:
            _check_parameter(inventory.base_module(key), key, name)


def full_names(targets: Targets) -> list[str]:
    return [f"{key}.{name}" for key, names in targets.items() for name in names]


def _parameters(inventory: Inventory) -> Iterator[tuple[str, str]]:
    """(module, name) of every Parameter that is no adapter's."""
    for key in inventory.names:
        module = inventory.base_module(key)
        for name, _ in module.named_parameters(recurse=False):
            yield key, name
        for name in getattr(module, "parametrizations", ()):
            yield key, name


def _check_settings(cfg: PeftConfig, method: AdapterMethod, modules: Sequence[str]) -> None:
    if not hasattr(method, "changes"):
        raise ValueError(f"target_parameters: {type(cfg).__name__} has no adapters of Parameters, only LoRA has")
    for field, idle in _IDLE.items():
        value = getattr(cfg, field)
        if field == "fan_in_fan_out" and modules:
            continue  # says how their weights lie, and is corrected where it does not
        if value not in idle:
            raise ValueError(
                f"lora.ParamWrapper does not work with {field}={value!r} (a Parameter is adapted, not a module's "
                f"output); it has to be {' or '.join(map(repr, idle))} where target_parameters match. Matched here are "
                f"{sorted(cfg.target_parameters)}."
            )


def _check_others(inventory: Inventory, wanted: set[str]) -> None:
    """Which Parameter a tensor is for follows from how layers are nested, which has to be the same for all adapters."""
    for name, other in inventory.configs.items():
        theirs = set(getattr(other, "target_parameters", None) or ())
        if theirs and theirs != wanted:
            raise ValueError(
                "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                f"parameters, but got {sorted(wanted)} for the new adapter and {sorted(theirs)} for adapter '{name}'."
            )


def _check_conflicts(inventory: Inventory, modules: Sequence[str]) -> None:
    nested = [key for key in modules if inventory.nest(key)]
    if nested:
        raise ValueError(
            f"target_modules match {enumerate_some(nested)}, of which another adapter adapts Parameters "
            "(target_parameters); a module is adapted in one of the two ways"
        )


def _check_module(
    inventory: Inventory, key: str, names: Sequence[str], modules: Sequence[str], saved: Sequence[str]
) -> None:
    present = inventory.module(key)
    if key in modules or (isinstance(present, BaseTunerLayer) and not inventory.nest(key)):
        raise ValueError(
            f"Trying to wrap an `nn.Parameter` of layer '{key}' of type {type(inventory.base_module(key)).__name__}, "
            "which is not a valid target. Make sure that this layer is not also targeted with `target_modules`. For "
            "some models, default targets are chosen where none are given; set `target_modules=[]` to prevent it."
        )
    kept = [s for s in saved if key == s or key.startswith(f"{s}.")]
    if kept or isinstance(present, StandIn):
        raise ValueError(f"target_parameters match {names} of {key}, which modules_to_save trains in full")
    nest = inventory.nest(key)
    adapted = [layer.site.parameter for layer in nest]
    if any(layer.is_needed for layer in nest) and adapted != list(names):
        raise ValueError(f"Adapters of {key} adapt its {adapted}; the new adapter has to as well, and got {names}")


def _check_parameter(module: nn.Module, key: str, name: str) -> None:
    if name in getattr(module, "parametrizations", ()):
        raise ValueError(f"{key}.{name} is computed by a parametrization; remove it before adapting the Parameter")
    value: Tensor = getattr(module, name)
    if not value.is_floating_point() or value.element_size() < 2:
        raise ValueError(f"{key}.{name} is stored as {value.dtype}; Parameters are adapted in 16 bits or more only")
    if is_unit_of_fsdp2(module):
        raise ValueError(
            f"{key}.{name}: FSDP2 has taken {key} apart by itself and puts it together for this module's calls alone, "
            "in the place of what an adapter makes of the Parameter. Add the adapter before fully_shard"
        )
    try:
        ParameterSite(module, name)
    except ValueError as e:
        raise ValueError(f"{key}.{name}: {e}") from e


def report_parameters(cfg: PeftConfig, targets: Targets, inventory: Inventory, strict: bool) -> None:
    """Say which entries of `target_parameters` matched nothing."""
    names = full_names(targets)
    unmatched = set(cfg.target_parameters).difference(*map(ends_of, names))
    all_names = [f"{key}.{name}" for key, name in _parameters(inventory)]
    lines = []
    for target in sorted(unmatched):
        known = {
            n.split(".", n.count(".") - target.count("."))[-1] for n in all_names if n.count(".") >= target.count(".")
        }
        lines.append(f"target_parameters: {target!r} matched no Parameter.{close_matches(target, known)}")
    say_misfits(lines, strict)
