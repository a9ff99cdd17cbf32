"""Weights that accelerate keeps elsewhere while their module rests: on the meta device until the module is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.sharding import put_together

#: Hooks that compute a weight before every call -> the function in torch.nn.utils that ends it.
_ENDED_BY = {
    "BasePruningMethod": "prune.remove", "WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm",
}  # fmt: skip


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def device_of(module: nn.Module, name: str = "weight") -> torch.device:
    """The device on which `module` computes: its weight's, or, while that is away, the one it is brought to."""
    weight = getattr(module, name)
    if weight.is_meta:
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return weight.device


def stored_weight(module: nn.Module, name: str = "weight", *, write: bool = False) -> Tensor:
    """The tensor that holds the weight's values, wherever it is kept.

    Args:
        name: under which the module has it.
        write: what is written to it must last.

    Raises:
        ValueError: there is none: the weight is computed from other tensors (to write), kept on disk (to write), or
            on the meta device for good.
    """
    weight = getattr(module, name)
    if write and name not in module._parameters and name not in module._buffers:
        kinds = {kind.__name__ for hook in module._forward_pre_hooks.values() for kind in type(hook).__mro__}
        end = next((end for kind, end in _ENDED_BY.items() if kind in kinds), "parametrize.remove_parametrizations")
        raise ValueError(
            f"The {name} of {type(module).__name__} is computed from other tensors at every call; nothing can be "
            f"merged into it. End that first: torch.nn.utils.{end}(module, {name!r})"
        )
    if not weight.is_meta:
        return weight
    for hook in _hooks(module):
        kept = getattr(hook, "weights_map", None)
        if kept is not None and name in kept:
            value = kept[name]
            if write and kept[name].data_ptr() != value.data_ptr():  # from disk, a map reads it anew at every look
                raise ValueError(
                    f"The {name} of {type(module).__name__} is offloaded to disk and cannot be changed there. Merge "
                    "into a model that is loaded without disk offloading."
                )
            return value
    raise ValueError(
        f"The {name} of {type(module).__name__} is on the meta device and has no values; load it before merging "
        "into it or initialising an adapter from it"
    )


def at_hand(module: nn.Module, name: str = "weight") -> Tensor:
    """What `module` has under `name` on the device on which it computes, also while that is away, or taken apart by
    FSDP2 until the module itself is called."""
    here = getattr(module, name)
    if type(here) is nn.Parameter and not here.is_meta:  # as nearly always, in every call of some layers
        return here
    if here.is_meta and any(_hooks(module)):
        return stored_weight(module, name).to(device_of(module, name))
    return put_together(here)


def bring_home(copied: nn.Module, module: nn.Module) -> None:
    """Give a copy of a module values of its own, where the module's are away while it rests: what the copy learns would
    be forgotten with every call."""
    for part, own in zip(copied.modules(), module.modules(), strict=True):
        for name, parameter in own._parameters.items():
            if parameter is not None and parameter.is_meta and any(_hooks(own)):
                value = stored_weight(own, name).detach().to(device_of(own, name), copy=True)
                part._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                for hook in _hooks(part):
                    hook.offload = False
