"""What other libraries reach for in PEFT's layers and no call here needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.base.dense import DenseWeight
from peftfast.config import PeftConfig
from peftfast.method import method_for

#: What every layer of PEFT's with LoRA adapters has, empty where its kind of module or adapter has no use for it.
_ALWAYS_THERE: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("lora_A", "lora_B", "lora_magnitude_vector"), nn.ModuleDict),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), nn.ParameterDict),
    **dict.fromkeys(("lora_bias", "use_dora", "use_rslora"), dict),
}


def absent_in(layer: Any, name: str) -> Any:
    """The value of an attribute that PEFT's layers have and this one does not keep; None: PEFT's have none either."""
    if name == "fan_in_fan_out":
        return layer.site.weight.transposed
    adapters = layer.__dict__.get("adapters", {}).values()
    if name in _ALWAYS_THERE and all(adapter.method.prefix == "lora_" for adapter in adapters):
        return _ALWAYS_THERE[name]()
    return None


class AsInPeft:
    """Mixin of the layers."""

    adapters: dict[str, Adapter]

    def _begin(self, name: str, config: PeftConfig, r: int, lora_alpha: float) -> None:
        """The adapter with which somebody has made a layer that is in no model: active, and trained."""
        own = copy.copy(config)
        own.r, own.lora_alpha = r, lora_alpha
        self.add_adapter(name, method_for(own), own, "")
        self.set_adapter([name])

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Let a LoRA adapter start anew, with True or "gaussian"; False leaves it as it is. Magnitudes stay."""
        adapter = self.adapters.get(adapter_name)
        if adapter is None or init_lora_weights is False:
            return
        restart = getattr(adapter.method, "restart", None)
        if restart is None:
            raise ValueError(f"{adapter_name} at {adapter.key} is no LoRA, whose parameters could be reset")
        with torch.no_grad(), self.whole_for(adapter):
            restart(self.site, adapter, init_lora_weights)
        self.changed(adapter_name)

    def get_base_weight(self) -> Tensor:
        """The base layer's weight: its own data where that is dense, else a dense copy."""
        weight = self.site.weight
        return self.get_base_layer().weight.data if isinstance(weight, DenseWeight) else weight.dense()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Make this the base layer's weight: itself where that is dense, else packed as it is."""
        weight = self.site.weight
        if isinstance(weight, DenseWeight):
            self.get_base_layer().weight.data = weight_data
        else:
            weight.assign(weight_data)
        self.changed()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Bring an adapter to where the base weight is, and where that is not quantised to its dtype."""
        weight = self.site.weight
        dtype = weight.compute_dtype if weight.quantization is None else None
        for name in self.adapter_layer_names:
            container = getattr(self, name)
            if adapter_name not in container or any(p.is_meta for p in container.parameters()):
                continue
            held = container[adapter_name]
            if isinstance(held, nn.Module):
                held.to(device=device or weight.device, dtype=dtype)
            else:
                held.data = held.data.to(device=device or weight.device, dtype=dtype)
        self.changed(adapter_name)
