"""Replacing an adapter's weights by another's, in place: names stay, compiled graphs stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, PeftType, plain_name, require_config
from peftfast.errors import AdapterMismatchWarning, check_present, warn
from peftfast.files.entry import Entry
from peftfast.files.experts import migrate_experts
from peftfast.files.fit import aligned, holds, is_alike
from peftfast.files.io import check_arguments, read_adapter
from peftfast.files.state import adapter_entries, without_own_embeddings
from peftfast.keys import strip_wrappers
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.walk import base_of
from peftfast.many.swappable import pads, rank_of, record_settings, runs_of
from peftfast.method import AdapterMethod, method_for, retarget
from peftfast.methods.lora.combine import padded
from peftfast.methods.lora.config import VARIANTS, LoraConfig
from peftfast.sharding import copy_whole, is_distributed, to_shards

#: Fields that change the output and are neither in the weights nor in the scaling, which every swap sets anew.
_MUST_AGREE = ("use_rslora", "lora_dropout", *VARIANTS)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """ValueError if an adapter of `config1` cannot take the place of one of `config0`."""
    require_config(config0, "config0")
    require_config(config1, "config1")
    kinds = [plain_name(c.peft_type) for c in (config0, config1)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
    if kinds[0] != PeftType.LORA.value:
        raise ValueError(f"Hotswapping only supports {PeftType.LORA.value} but {kinds[0]} was passed.")
    old, new = (set(c.target_parameters or ()) for c in (config0, config1))
    if new and new != old:  # which Parameter a tensor is for follows from how layers are nested
        raise ValueError(
            f"Configs are incompatible: for target_parameters, {sorted(old)} != {sorted(new)}; both adapters have to "
            "adapt the same Parameters, or the new one none"
        )
    for key in _MUST_AGREE:
        old, new = getattr(config0, key), getattr(config1, key)
        if old != new:
            raise ValueError(f"Configs are incompatible: for {key}, {old} != {new}")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str,
    adapter_name: str,
    torch_device: str | None = None,
    *,
    key_mapping: Mapping[str, str] | None = None,
    strict: bool | str = False,
    **kwargs: Any,
) -> None:
    """Put a saved LoRA into the place of adapter `adapter_name`; the name stays.

    Where the new one has no weights the old ones become zero (those of DoRA and KaSA, which act with zeros too, are
    refused); a smaller rank is padded with zeros. A larger rank makes new tensors, which a compiled model notices: see
    `prepare_model_for_compiled_hotswap`. Of Parameters (`target_parameters`) the new one adapts the same or none.

    Args:
        torch_device: of the tensors while they are read.
        key_mapping, strict: as in `PeftModel.load_adapter`.
        kwargs: of `hf_hub_download` (revision, subfolder, token, ...).

    Raises:
        ValueError: incompatible configs, a merged adapter, tensors that are no pairs of factors of these layers.
            RuntimeError: weights for modules that are not adapted. AdapterLoadError: a damaged file. Nothing is changed
            then.
    """
    check_arguments(hotswap_adapter, kwargs, strict)
    stored = read_adapter(model_name_or_path, device=torch_device, key_mapping=key_mapping, strict=strict, **kwargs)
    present = _configs(model)
    check_present(adapter_name, present)
    config = _in_names_of(model, stored.config)
    check_hotswap_configs_compatible(present[adapter_name], config)
    if stored.changes:
        warn(" ".join(stored.changes), AdapterMismatchWarning)
    _swap(model, stored.tensors, adapter_name, config, by_file_name=True)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same from tensors under the names that they have in `model`, the adapter's name included.

    Args:
        config: of the new adapter, for its scaling.
        parameter_prefix: only "lora_".
    """
    if parameter_prefix != "lora_":
        raise ValueError(f"Hotswapping only supports LoRA, got parameter_prefix={parameter_prefix!r}")
    _swap(model, state_dict, adapter_name, _in_names_of(model, config), by_file_name=False)


def _in_names_of(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config as it is read where an adapter is added."""
    config = copy.deepcopy(config)
    retarget(config, base_of(getattr(model, "_orig_mod", model)))
    return config


def _configs(model: nn.Module) -> Mapping[str, PeftConfig]:
    return getattr(model, "peft_config", None) or {}


def _swap(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, config: LoraConfig, by_file_name: bool
) -> None:
    inner = getattr(model, "_orig_mod", model)
    to_shards(inner)
    entries = {
        e.file if by_file_name else e.live: e
        for e in adapter_entries(inner, adapter_name)
        # trained rows of tokens are no factors; like copies of modules, they stay as they are
        if e.layer is not None and e.layer.adapters[adapter_name].pair
    }
    if not entries:
        raise ValueError(f"Adapter {adapter_name} not found in the model")
    if any(adapter_name in e.layer.merged_adapters for e in entries.values()):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. Please "
            "unmerge the adapter first by calling `unmerge_adapter()`."
        )
    if by_file_name:
        given = migrate_experts(aligned(tensors, entries), entries, config, base_of(inner))
    else:
        given = {strip_wrappers(k): v for k, v in tensors.items()}
    unexpected = without_own_embeddings(inner, {k: v for k, v in given.items() if k not in entries})
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    given = {k: v for k, v in given.items() if k in entries}
    axes = {key: _rank_axis(entry, adapter_name) for key, entry in entries.items()}
    for key, new in given.items():
        _check_shape(key, entries[key], new.shape, axes[key], adapter_name)
    _check_writable(entries, given, adapter_name)
    _check_pairs(entries, given, axes)
    with torch.no_grad():
        for key, entry in entries.items():
            old = entry.tensor()
            new = given.get(key)
            if new is None:
                old.zero_()
            else:
                _replace(entry, old, new.to(old.device), axes[key])
        method = method_for(config)
        for layer in dict.fromkeys(e.layer for e in entries.values()):
            _rescale(layer, layer.adapters[adapter_name], method, config)  # which says that it has changed
    config = _configs(inner).get(adapter_name)
    if config is not None:
        record_settings(config, [e.layer.adapters[adapter_name] for e in entries.values()])


def _check_shape(key: str, entry: Entry, new: torch.Size, axis: int, adapter_name: str) -> None:
    """ValueError unless the shapes differ by the rank alone, and by one that the layer can have."""
    old, experts = entry.tensor().shape, entry.layer.site.experts
    what = f"Incompatible shapes found for LoRA weights {key}:"
    if [n for i, n in enumerate(new) if i != axis] != [n for i, n in enumerate(old) if i != axis]:
        raise ValueError(f"{what} {tuple(old)} vs {tuple(new)}.")
    if new != old and not pads(entry.layer.adapters[adapter_name]):
        raise ValueError(f"{what} {tuple(old)} vs {tuple(new)}; factors of this kind cannot be padded to another rank.")
    if axis >= 0 and new[axis] > old[axis] and is_distributed(entry.tensor()):
        raise ValueError(
            f"{what} {tuple(old)} vs {tuple(new)}; no rank grows where processes have parts of the factors."
        )
    if axis >= 0 and new[axis] % experts:
        raise ValueError(f"{what} {tuple(new)} is no whole rank for each of {experts} experts.")


def _check_writable(entries: Mapping[str, Entry], given: Mapping[str, Tensor], adapter_name: str) -> None:
    """ValueError for tensors that cannot become what is given."""
    for key, entry in entries.items():
        old, new = entry.tensor(), given.get(key)
        if not entry.is_kept and not entry.is_view:
            raise ValueError(
                f"{entry.live} is made of other tensors (parametrized, pruned), so that nothing can be swapped into "
                "it; load_adapter may do"
            )
        if new is None:
            method = entry.layer.adapters[adapter_name].method
            if getattr(method, "acts_when_zero", False):
                raise ValueError(
                    f"The new adapter has no {key}, and {type(method).__name__} of zeros has an effect: delete "
                    f"{adapter_name} and load the new one in its place"
                )
            continue
        if not is_alike(old, new):
            raise ValueError(f"{key} has {new.dtype} numbers, {entry.live} is {old.dtype}")
        if not holds(old.dtype, new):
            raise ValueError(f"{key} has NaN or infinite values, or some that {old.dtype} cannot hold")


def _check_pairs(entries: Mapping[str, Entry], given: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """ValueError where the factors of a layer do not go together."""
    factors: dict[BaseTunerLayer, dict[int, str]] = {}
    for key, axis in axes.items():
        if axis >= 0:
            factors.setdefault(entries[key].layer, {})[axis] = key
    for keys in factors.values():
        here = {axis: key for axis, key in keys.items() if key in given}
        if here and len(here) < len(keys):
            (lacking,) = (key for axis, key in keys.items() if axis not in here)
            raise ValueError(f"There is {next(iter(here.values()))}, but no {lacking}")
        sizes = [(given[key].shape[axis], entries[key].tensor().shape[axis]) for axis, key in here.items()]
        if len(sizes) == 2 and sizes[0][0] * sizes[1][1] != sizes[1][0] * sizes[0][1]:
            raise ValueError(
                f"Factors of different ranks: {keys[0]} is {list(given[keys[0]].shape)}, {keys[1]} is "
                f"{list(given[keys[1]].shape)}"
            )


def _rank_axis(entry: Entry, adapter_name: str) -> int:
    """Which dimension of this tensor the rank is; -1 if none is."""
    adapter = entry.layer.adapters[adapter_name]
    down, up = adapter.pair
    if entry.live.endswith(".bias"):
        return -1
    slot = next((s for s in (down, up) if f".{s}.{adapter_name}" in entry.live), None)
    return {down: 0, up: 1}.get(slot, -1)


def _replace(entry: Entry, old: Tensor, new: Tensor, axis: int) -> None:
    if old.shape == new.shape:
        copy_whole(old, new)
    elif new.shape[axis] > old.shape[axis]:
        old.data = new.to(old.dtype).clone()
    else:
        copy_whole(old, padded(new, axis, old.shape[axis], runs_of(entry.layer) if axis == 0 else 1))


def _rescale(layer: BaseTunerLayer, adapter: Adapter, method: AdapterMethod, config: LoraConfig) -> None:
    scaling = method.settings(layer.site, config, adapter.key)["scaling"]
    layer.set_initial_scale(adapter.name, scaling)
    layer.r[adapter.name] = rank_of(layer, adapter)
