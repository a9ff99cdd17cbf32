"""PEFT's classes of layers, of which peftfast has one for all: `isinstance` asks which adapters a layer carries."""

from __future__ import annotations

from typing import Any

from peftfast.layers.layer import BaseTunerLayer


class _Kind(type):
    """A class whose instances are the layers with adapters of one method."""

    counterpart: str

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, BaseTunerLayer) and cls.counterpart in instance.counterparts()


class AdaLoraLayer(metaclass=_Kind):
    """A layer with AdaLoRA adapters."""

    counterpart = "tuners.adalora.layer.AdaLoraLayer"


class IA3Layer(metaclass=_Kind):
    """A layer with IA3 adapters."""

    counterpart = "tuners.ia3.layer.IA3Layer"


class TrainableTokensLayer(metaclass=_Kind):
    """A layer some of whose token rows are trained."""

    counterpart = "tuners.trainable_tokens.layer.TrainableTokensLayer"
