"""The model around IA3 adapters."""

from __future__ import annotations

from peftfast.tuners.tuner import BaseTuner


class IA3Model(BaseTuner):
    """A model with IA3 adapters."""

    prefix = "ia3_"
