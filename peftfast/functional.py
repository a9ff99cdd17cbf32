"""What integrations do to a model that `inject_adapter_in_model` has put adapters into and that no PeftModel wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftfast.api import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peftfast.wrapping.inventory import inventory_of

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make adapters the active ones: trainable unless `inference_mode`, all others frozen.

    Args:
        layer_cls: unused; there is one class of adapter layer.
    """
    inventory_of(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> list[str]:
    """Delete an adapter everywhere, with its config; returns the names that are active afterwards. One that is not
    there is none to delete: callers go through lists that may name it twice.

    Args:
        prefix, layer_cls: unused; layers are listed, not searched.
    """
    inventory = inventory_of(model)
    if adapter_name in inventory.configs:
        inventory.delete(adapter_name)
    return list(inventory.active)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Freeze or unfreeze adapters without activating them."""
    inventory_of(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Half-precision tensors of an adapter to fp32; nothing with `autocast_adapter_dtype=False`."""
    if not autocast_adapter_dtype:
        return
    for layer in inventory_of(model).mergeable().values():
        adapter = layer.adapters.get(adapter_name)
        for tensor in () if adapter is None else adapter.parameters().values():
            if isinstance(tensor, nn.Parameter) and tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = tensor.data.to(torch.float32)
