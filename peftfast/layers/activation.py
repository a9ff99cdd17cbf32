"""Which of its adapters a module runs, as PEFT and whoever reads its layers ask for it."""

from __future__ import annotations

from peftfast.interop.counterpart import HasCounterpart
from peftfast.rows.control import ANY_MODEL, RECOMPUTING, Control
from peftfast.rows.routing import Routing


class HasActivation(HasCounterpart):
    """Mixin of all that stands in for a module of the base model; the class around it keeps the three attributes."""

    _active_adapter: str | list[str]
    _disable_adapters: bool
    control: Control

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else list(self._active_adapter)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def _routing(self) -> Routing | None:
        """Which adapter acts on which sample of the call under way; None: the active ones on all."""
        return self.control.routing if ANY_MODEL.routes or RECOMPUTING else None

    def share(self, control: Control) -> None:
        """Follow `control`, as all layers of the model do."""
        self.__dict__["control"] = control
