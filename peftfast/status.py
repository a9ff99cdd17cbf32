"""What is in a model: trainable parameters, the state of every adapter layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.base.weight import comes_from
from peftfast.config import plain_name, require_module
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.saved_modules import TrainableTokensWrapper
from peftfast.layers.stand_in import StandIn
from peftfast.wrapping.targets import make_matcher


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of weights; packed 4-bit storage counts as the weights in it, sharded parameters as the
    whole."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if count == 0 and hasattr(parameter, "ds_numel"):
            count = parameter.ds_numel
        if type(parameter).__name__ == "Params4bit":
            count = count * 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


@dataclass
class TunerLayerStatus:
    """One adapted module; fields as in PEFT."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """All adapted modules together; "irregular" where they disagree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def _weights(adapter: Adapter) -> list[Tensor]:
    """What an adapter computes with, without numbers that are kept beside."""
    kept = {name for name, slot in adapter.slots.items() if slot.buffer or not slot.saved}
    return [tensor for name, tensor in adapter.parameters().items() if name not in kept]


def _agreed(values: list[Any]) -> Any:
    first = values[0]
    return first if all(v == first for v in values) else "irregular"


def _tuner_in(model: nn.Module) -> nn.Module | None:
    """What holds the adapters of a PeftModel; None for other models."""
    base = getattr(model, "base_model", None)
    return base if hasattr(base, "inventory") else None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted module.

    Raises:
        TypeError: a prompt-learning model, which has none. ValueError: no adapters at all.
    """
    return _layer_status(model, "get_layer_status")


def _layer_status(model: nn.Module, caller: str) -> list[TunerLayerStatus]:
    require_module(model)
    if getattr(model, "_is_prompt_learning", False):
        raise TypeError(
            f"{caller}() got an invalid PeftModel instance: prompt learning methods, such as "
            f"{plain_name(model.peft_type)}, adapt no layer"
        )
    result = []
    for name, module in (_tuner_in(model) or model).named_modules():  # relative to the tuner, as in PEFT
        if isinstance(module, TrainableTokensWrapper):
            continue  # what counts is the adapter layer inside it
        if isinstance(module, BaseTunerLayer):
            parameters = {n: _weights(a) for n, a in module.adapters.items()}
        elif isinstance(module, StandIn):
            parameters = {n: list(module.adapter_parameters(n).values()) for n in module._adapters}
        else:
            continue
        result.append(
            TunerLayerStatus(
                name=name,
                module_type=module._get_name(),
                enabled=not module.disable_adapters,
                active_adapters=module.active_adapters,
                merged_adapters=list(getattr(module, "merged_adapters", [])),
                requires_grad={n: _agreed([p.requires_grad for p in ps]) for n, ps in parameters.items() if ps},
                available_adapters=sorted(parameters),
                devices={n: sorted({str(p.device.type) for p in ps}) for n, ps in parameters.items()},
                quantization_backend=getattr(module, "quantization_backend", None),
            )
        )
    if not result:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return result


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Literal["irregular"]:
    """Adapters that are merged wherever they are."""
    merged = {n for layer in layers for n in layer.merged_adapters}
    if any(merged & set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers):
        return "irregular"
    return sorted(merged)


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapted modules together; errors as in `get_layer_status`."""
    layers = _layer_status(model, "get_model_status")
    names = sorted({n for layer in layers for n in layer.available_adapters})
    tuner = _tuner_in(model)
    trainable, total = count_parameters(model)
    base = model if tuner is None else tuner.model
    known = tuner is not None or comes_from(type(model), "transformers", "PreTrainedModel")
    return TunerModelStatus(
        base_model_type=type(base).__name__ if known else "other",
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types={} if tuner is None else {n: plain_name(c.peft_type) for n, c in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed([layer.enabled for layer in layers]),
        active_adapters=_agreed([layer.active_adapters for layer in layers]),
        merged_adapters=_merged(layers),
        requires_grad={
            n: _agreed(said)
            for n in names
            if (said := [layer.requires_grad[n] for layer in layers if n in layer.requires_grad])
        },
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=_agreed([layer.quantization_backend for layer in layers]),
    )


def inspect_matched_modules(tuner: nn.Module, adapter_name: str = "default") -> dict[str, list[str]]:
    """The base's modules that an adapter's config means, and all others.

    Args:
        tuner: a PeftModel, or the tuner in it.

    Returns:
        Names inside the base model, under "matched" and "unmatched".
    """
    inventory = tuner.inventory
    (name,) = inventory.check_known(adapter_name)
    matcher = make_matcher(inventory.configs[name])
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key in inventory.names:
        found["matched" if matcher(key) else "unmatched"].append(key)
    return found
