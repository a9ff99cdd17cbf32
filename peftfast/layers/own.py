"""LoRA layers that users write themselves, for kinds of module that have no site; `_register_custom_module` of a config
names them."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.sharding import let_go


class LoraLayer(StandIn, abc.ABC):
    """What a layer of one's own derives from, behind `nn.Module`: PEFT's conventions for it.

    Its constructor takes the module and the adapter's name, and the settings by keyword (`r`, `lora_alpha`, `config`,
    `target_name`); it calls `update_layer`, as the library does for every further adapter. What is trained is kept by
    the adapter's name in ModuleDicts and ParameterDicts whose own names start with `lora_`. `forward` is the layer's
    business, and so are `disable_adapters`, `active_adapters`, and `merge` and `unmerge` where there are such things.
    The library's own layers count as instances.

    Attributes:
        base_layer: the module that was here before. in_features, out_features: its sizes, None where it names none.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias")

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        for name in self.other_param_names:
            setattr(self, name, nn.ModuleDict() if name == "lora_dropout" else {})
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict() if "embedding" in name else nn.ModuleDict())
        self.ephemeral_gpu_offload, self.kwargs = ephemeral_gpu_offload, kwargs
        self.in_features = getattr(base_layer, "in_features", None)
        self.out_features = getattr(base_layer, "out_features", None)

    # ---- adapters ----------------------------------------------------------------------------------------------------
    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Make an adapter's tensors: here a pair of linear factors, which is for modules with in and out features."""
        if not self.in_features or not self.out_features:
            raise NotImplementedError(
                f"{type(self).__name__}: {type(self.base_layer).__name__} has no in_features and out_features, so "
                "update_layer has to be written for it"
            )
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=config.lora_bias)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Start anew: A random, B zero; with False both random."""
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"{type(self).__name__} does not know init_lora_weights={init_lora_weights!r}")
        down, up = self.lora_A[adapter_name], self.lora_B[adapter_name]
        down.reset_parameters()
        up.reset_parameters()
        if init_lora_weights == "gaussian":
            nn.init.normal_(down.weight, std=1 / self.r[adapter_name])
        if init_lora_weights:
            for parameter in up.parameters():
                nn.init.zeros_(parameter)

    def _containers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, child in self._modules.items():
            if (name in self.adapter_layer_names or name.startswith("lora_")) and isinstance(
                child, (nn.ModuleDict, nn.ParameterDict)
            ):
                yield name, child

    def adapter_parameters(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        names = set(self.adapter_state_dict_load_map(adapter_name).values())
        return {name: p for name, p in self.named_parameters() if name in names}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        keys: dict[str, str] = {}
        for name, container in self._containers():
            held = container[adapter_name] if adapter_name in container else None
            if isinstance(held, Tensor):
                keys[name] = f"{name}.{adapter_name}"
            elif held is not None:
                keys.update({f"{name}.{k}": f"{name}.{adapter_name}.{k}" for k in held.state_dict()})
        return keys

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] = ()) -> None:
        self._adapters.discard(adapter_name)
        places = {*(name for name, _ in self._containers()), *self.other_param_names}
        for container in (getattr(self, name) for name in places):
            if adapter_name in container:
                let_go(container, adapter_name)
                del container[adapter_name]
        self.set_adapter(list(new_active_adapters))

    # ---- the module, as others see it --------------------------------------------------------------------------------
    @property
    def original_module(self) -> nn.Module:
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def counterparts(self) -> tuple[str, ...]:
        return ("tuners.lora.layer.LoraLayer",)

    # ---- merging, scaling --------------------------------------------------------------------------------------------
    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no merge of its own, so its adapters cannot be merged")

    def unmerge(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no unmerge of its own")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        return self.base_layer

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self.active_adapters:
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None: back to that of the config."""
        for name in self.active_adapters:
            r, alpha = self.r[name], self.lora_alpha[name]
            first = alpha / (math.sqrt(r) if self.use_rslora.get(name) else r)
            self.scaling[name] = first if scale is None else self.scaling[name] / scale


LoraLayer.register(BaseTunerLayer)
