"""The layer around a module one of whose Parameters is adapted. Several Parameters of one module are layers around each
other, as in PEFT: the one that the module registers first is the innermost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import enumerate_some
from peftfast.layers.calls import Steps
from peftfast.layers.layer import BaseTunerLayer
from peftfast.ops.experts import LowRank
from peftfast.rows.routing import Routing
from peftfast.sites.parameter import ParameterSite, in_turn, run_changed, run_mixed


class ChangingLayer(BaseTunerLayer):
    """A layer whose adapters change a Parameter while it is in use, and add to no output.

    Args:
        site: of the Parameter.
    """

    def __init__(self, base_layer: nn.Module, site: ParameterSite) -> None:
        super().__init__(base_layer, site)
        self.in_features, self.out_features = site.in_features, site.out_features

    def _look_at(self, module: nn.Module) -> None:
        """The site is of the innermost module, whatever is around it."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def parameter(self) -> Tensor:
        """The Parameter as it is used now; itself where no adapter changes it."""
        changes = self.changes()
        with in_turn(self.site.module):
            return self.site.changed(self.site.together(changes)) if changes else self.site.weight.value

    def changes(self) -> list[LowRank]:
        """What the adapters in force add to the Parameter."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        routing = self._routing
        if routing is not None and not self._disable_adapters:
            steps = self._routed_steps(routing)
        else:
            steps = self._steps() if torch.compiler.is_compiling() else (self._plan or self._make_plan())[0]
        return [change for method, adapters in steps for change in method.changes(self.site, adapters)]

    def _routed_steps(self, routing: Routing) -> Steps:
        """Of a batch whose samples all have one adapter: a Parameter is the same for all of them."""
        routing = routing.named or routing
        present = [self.adapters[n] for n in routing.names if n in self.adapters] if routing.slots is None else []
        if present and not routing.uniform:
            raise self._mixed(present[0].key, routing.names)
        return [(present[0].method, present)] if present else []

    def _mixed(self, key: str, names: Iterable[str]) -> Exception:
        """What a mixed batch is refused with."""
        return ValueError(
            f"{key} is adapted as a Parameter (target_parameters), and lora.ParamWrapper does not support mixed "
            "adapter batches yet where the changed weight has to be formed: in a module that is not one of "
            "transformers' experts and does not take one tensor of samples and give samples, in experts with hooks or "
            f"weights that train, and under torch.compile. This batch asks for {enumerate_some(names)}; give it to one "
            "adapter after another."
        )


class ParameterLayer(ChangingLayer):
    """PEFT's `ParamWrapper`. Its base layer is the module, or a layer around it for another of its Parameters.

    Args:
        site: of the Parameter; None: of the one called `parameter_name`.
        adapter_name, config, r, lora_alpha, settings: what PEFT's is made with, for the adapter to begin with.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        parameter_name: str = "weight",
        config: PeftConfig | None = None,
        r: int = 0,
        lora_alpha: float = 1,
        *,
        site: ParameterSite | None = None,
        **settings: Any,
    ) -> None:
        module = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        super().__init__(base_layer, ParameterSite(module, parameter_name) if site is None else site)
        if adapter_name is not None and config is not None:
            self._begin(adapter_name, config, r, lora_alpha)

    @property
    def parameter_name(self) -> str:
        return self.site.parameter

    def get_param(self) -> Tensor:
        """The Parameter as the module has it, without the change."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def num_experts(self) -> int:
        return self.site.experts

    @property
    def _did_swap_in_out_features(self) -> bool:
        """PEFT's word for stacks [E, N, K], by which others (unsloth) tell which factor goes with which side."""
        return self.get_param().dim() == 3 and not self.site.transposed

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Any]:
        """(left, right, s): s · left @ right is the change, lying as the Parameter does."""
        adapter = self.adapters[adapter_name]
        change = self.site.together(adapter.method.changes(self.site, [adapter]))
        return (*self.site.factors(change.a, change.b), change.scale)

    def counterparts(self) -> tuple[str, ...]:
        return ("tuners.lora.layer.ParamWrapper",)

    def _get_name(self) -> str:
        return "lora.ParamWrapper"

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As all layers; of a stack with the sides of the factors that are there, which somebody may have put in."""
        change = super().get_delta_weight(adapter)
        if self.site.experts == 1:
            return change
        left, right, _ = self.get_delta_factors(adapter)
        return change.reshape(len(left), left.shape[1], right.shape[2])

    def nest(self) -> list[ParameterLayer]:
        """This layer and those inside it, the innermost first."""
        inner = self.base_layer
        return [*(inner.nest() if isinstance(inner, ParameterLayer) else ()), self]

    def inside(self) -> Mapping[str, BaseTunerLayer]:
        inner = reversed(self.nest()[:-1])
        return {".".join(["base_layer"] * depth): layer for depth, layer in enumerate(inner, start=1)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the changes of all layers around it that are in force."""
        routing = self._routing
        if routing is None or self._disable_adapters:
            return self._changed(args, kwargs)
        y = self._routed(routing, args, kwargs)
        return routing.reaching(y, *self.nest()) if routing.together else y

    def _routed(self, routing: Routing, args: tuple, kwargs: dict[str, Any]) -> Any:
        if routing.slots is not None:
            slots = {layer.site: routing.slots.changes(layer) for layer in self.nest()}
            if all(slots.values()):
                return self._by_rows(routing, (), slots, args, kwargs)
        elif not routing.uniform:
            present = tuple([name in self.adapters for name in routing.names])
            if any(present):
                return self._by_rows(routing, present, self._changes_of(routing.names), args, kwargs)
        return self._changed(args, kwargs)

    def _changed(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """With changes that are the same for all samples."""
        changes = {}
        for layer in self.nest():  # compilers cannot follow an assignment inside a comprehension
            found = layer.changes()
            if found:
                changes[layer.site] = found
        return run_changed(self.get_base_layer(), changes, args, kwargs)

    def _changes_of(self, names: Iterable[str]) -> dict[ParameterSite, list[LowRank]]:
        """What each of the adapters adds. All adapters here adapt all Parameters of the nest."""
        changes = {}
        for layer in self.nest():
            own = [layer.adapters[name] for name in names if name in layer.adapters]
            changes[layer.site] = [layer.site.together(a.method.changes(layer.site, [a])) for a in own]
        return changes

    def _by_rows(
        self,
        routing: Routing,
        present: tuple[bool, ...],
        changes: Mapping[ParameterSite, Sequence[LowRank]],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Every sample with changes of its own."""
        key = self.site.weight.name
        y = run_mixed(self.get_base_layer(), changes, lambda x: routing.rows(x, present, self.store, key), args, kwargs)
        if y is None and routing.named is not None and routing.named.uniform:
            return routing.named.reaching(self._changed(args, kwargs), *self.nest())
        if y is None:
            raise self._mixed(key, [name for name in routing.names if name in self.adapters] or ["slots of a pool"])
        return y
