"""How strongly the adapters of a layer act, as users and other libraries change it."""

from __future__ import annotations

import math

from torch import Tensor

from peftfast.errors import warn
from peftfast.rules import number

_NUMBER = number()


def _checked(scale: float | Tensor) -> float | Tensor:
    """The scale; TypeError or ValueError for one that is no finite number, with which everything would be NaN. Some
    libraries scale every layer in every call, so what is usual costs nothing here."""
    usual = type(scale) is float and math.isfinite(scale) or isinstance(scale, Tensor)
    return scale if usual else _NUMBER.enforce(scale, "scale")


class HasScaling:
    """Mixin of the layers.

    Attributes:
        scaling: of each adapter, now; there once an adapter has one.
    """

    scaling: dict[str, float | Tensor]
    active_adapters: list[str]
    merged_adapters: list[str]
    _initial_scaling: dict[str, float]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times its initial value."""
        scale = _checked(scale)
        if adapter in self._initial_scaling:
            self._write_scale(adapter, scale * self._initial_scaling[adapter])

    def set_initial_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling, and what later changes are in proportion to."""
        self._initial_scaling[adapter] = scale
        self._write_scale(adapter, scale)

    def _write_scale(self, adapter: str, value: float) -> None:
        if adapter in self.merged_adapters:
            warn(f"Adapter {adapter} is merged, so its new scaling has no effect until it is unmerged.")
        current = self.scaling[adapter]
        if isinstance(current, Tensor):  # a compiled graph reads it: written in place, no new graph is needed
            current.fill_(value)
        else:
            self.scaling[adapter] = value
        self.changed(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        scale = _checked(scale)
        if scale != 1:
            for name in self.active_adapters:
                if name in self._initial_scaling:
                    self._write_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None: back to its initial value."""
        scale = None if scale is None else _checked(scale)
        for name in self.active_adapters:
            if name in self._initial_scaling:
                self._write_scale(name, self._initial_scaling[name] if scale is None else self.scaling[name] / scale)
