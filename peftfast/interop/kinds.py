"""PEFT's classes of layers, of which peftfast has one for all: `isinstance` asks which adapters a layer carries, and
how its module keeps its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from peftfast.base.bnb4 import is_bnb
from peftfast.base.weight import comes_from
from peftfast.layers.layer import BaseTunerLayer


class _Kind(type):
    """A class whose instances are the layers with adapters that `holds` is true of, and those of classes that others
    derive from it, which are theirs alone."""

    def __instancecheck__(cls, instance: Any) -> bool:
        holds = cls.__dict__.get("holds")
        if holds is None:
            return super().__instancecheck__(instance)
        return isinstance(instance, BaseTunerLayer) and holds(instance)


def _with(counterpart: str) -> Callable[[BaseTunerLayer], bool]:
    return staticmethod(lambda layer: counterpart in layer.counterparts())


class AdaLoraLayer(metaclass=_Kind):
    """A layer with AdaLoRA adapters."""

    holds = _with("tuners.adalora.layer.AdaLoraLayer")


class IA3Layer(metaclass=_Kind):
    """A layer with IA3 adapters."""

    holds = _with("tuners.ia3.layer.IA3Layer")


class TrainableTokensLayer(metaclass=_Kind):
    """A layer some of whose token rows are trained."""

    holds = _with("tuners.trainable_tokens.layer.TrainableTokensLayer")


def _lora_on(keeps: Callable[[nn.Module], bool]) -> Callable[[BaseTunerLayer], bool]:
    lora = "tuners.lora.layer.LoraLayer"
    return staticmethod(lambda layer: lora in layer.counterparts() and keeps(layer.get_base_layer()))


def _of_library(name: str) -> Callable[[nn.Module], bool]:
    return lambda module: comes_from(type(module), name)


class Linear4bit(metaclass=_Kind):
    """A LoRA layer on bitsandbytes' module of this name."""

    holds = _lora_on(lambda module: is_bnb(module, "Linear4bit"))


class Linear8bitLt(metaclass=_Kind):
    """A LoRA layer on bitsandbytes' module of this name."""

    holds = _lora_on(lambda module: is_bnb(module, "Linear8bitLt"))


def _is_awq(module: nn.Module) -> bool:
    return any(getattr(method, "value", method) == "awq" for method in getattr(module, "SUPPORTS_METHODS", ()))


class GPTQLoraLinear(metaclass=_Kind):
    """A LoRA layer on a linear layer of gptqmodel's, AWQ's apart."""

    holds = _lora_on(lambda module: _of_library("gptqmodel")(module) and not _is_awq(module))


class AwqLoraLinear(metaclass=_Kind):
    """A LoRA layer on one of gptqmodel's linear layers in AWQ's format."""

    holds = _lora_on(lambda module: _of_library("gptqmodel")(module) and _is_awq(module))


class AqlmLoraLinear(metaclass=_Kind):
    """A LoRA layer on AQLM's linear layer."""

    holds = _lora_on(_of_library("aqlm"))


class EetqLoraLinear(metaclass=_Kind):
    """A LoRA layer on EETQ's linear layer."""

    holds = _lora_on(_of_library("eetq"))


class HqqLoraLinear(metaclass=_Kind):
    """A LoRA layer on HQQ's linear layer."""

    holds = _lora_on(_of_library("hqq"))


class TorchaoLoraLinear(metaclass=_Kind):
    """A LoRA layer on a linear layer with one of torchao's tensors as its weight."""

    holds = _lora_on(lambda module: isinstance(module, nn.Linear) and comes_from(type(module.weight), "torchao"))
