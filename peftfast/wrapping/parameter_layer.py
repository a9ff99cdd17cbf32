"""The layer around a module one of whose Parameters is adapted. Several Parameters of one module are layers around each
other, as in PEFT: the one that the module registers first is the innermost."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftfast.errors import enumerate_some
from peftfast.layer import BaseTunerLayer, Steps
from peftfast.many.routing import Routing
from peftfast.sites.parameter import LowRank, ParameterSite, run_changed


class ParameterLayer(BaseTunerLayer):
    """PEFT's `ParamWrapper`.

    Args:
        base_layer: the module, or a layer around it for another of its Parameters.
        site: of this layer's Parameter.
    """

    def __init__(self, base_layer: nn.Module, site: ParameterSite) -> None:
        super().__init__(base_layer, site)
        self.in_features, self.out_features = site.in_features, site.out_features

    @property
    def parameter_name(self) -> str:
        return self.site.parameter

    @property
    def num_experts(self) -> int:
        return self.site.experts

    def counterparts(self) -> tuple[str, ...]:
        return ("tuners.lora.layer.ParamWrapper",)

    def _get_name(self) -> str:
        return "lora.ParamWrapper"

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def nest(self) -> list[ParameterLayer]:
        """This layer and those inside it, the innermost first."""
        inner = self.base_layer
        return [*(inner.nest() if isinstance(inner, ParameterLayer) else ()), self]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the changes of all layers around it that are in force."""
        changes = {layer.site: found for layer in self.nest() if (found := layer._changes())}
        module = self.get_base_layer()
        return run_changed(module, changes, args, kwargs) if changes else module(*args, **kwargs)

    def _changes(self) -> list[LowRank]:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        routing = self.control.routing
        if routing is not None and not self._disable_adapters:
            steps = self._routed_steps(routing)
        else:
            steps = self._steps() if torch.compiler.is_compiling() else (self._plan or self._make_plan())[0]
        return [change for method, adapters in steps for change in method.changes(self.site, adapters)]

    def _routed_steps(self, routing: Routing) -> Steps:
        """Of a batch whose samples all have one adapter: a Parameter is the same for all of them."""
        present = [self.adapters[n] for n in routing.names if n in self.adapters] if routing.slots is None else []
        if present and not routing.uniform:
            raise ValueError(
                f"{present[0].key} is adapted as a Parameter (target_parameters), and lora.ParamWrapper does not "
                f"support mixed adapter batches yet. This batch asks for {enumerate_some(routing.names)}; give it to "
                "one adapter after another."
            )
        return [(present[0].method, present)] if present else []
