"""The model around adapters of several types."""

from __future__ import annotations

from peftfast.tuners.adalora import AdaLoraModel
from peftfast.tuners.tuner import BaseTuner


class MixedModel(AdaLoraModel):
    """A model with LoRA and AdaLoRA adapters beside each other; AdaLoRA's have their schedule here as well."""

    add_weighted_adapter = BaseTuner.add_weighted_adapter
