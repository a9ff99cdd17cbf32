"""The adapted modules of one model: found once, and listed from then on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from torch import nn

from peftfast.adapter import Adapter
from peftfast.layers.layer import BaseTunerLayer, make_layer
from peftfast.layers.own import LoraLayer
from peftfast.layers.parameter import ParameterLayer
from peftfast.layers.saved_modules import TrainableTokensWrapper
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import inside, outer_modules, put
from peftfast.owner import Owner
from peftfast.rows.control import Control
from peftfast.sharding import gather_without_wrapper
from peftfast.sites.parameter import ParameterSite

Wrapper = BaseTunerLayer | StandIn
Layer = TypeVar("Layer", bound=BaseTunerLayer)


class Listing:
    """What stands where in `model`.

    Attributes:
        model: the base model, changed in place.
        names: of every base module, without wrappers' -> where it, or its wrapper, hangs; None: in the model itself.
        layers: module name -> the layer that replaced it.
        extras: module name -> what else stands there: a module saved beside the adapter, a layer that a user wrote.
        active: names of the adapters that act in every layer.
        control: how layers learn what a batch's mix is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = Owner(model)
        self.layers: dict[str, BaseTunerLayer] = {}
        self.extras: dict[str, StandIn] = {}
        self.active: list[str] = []
        self.control = Control()
        self._list()

    @property
    def model(self) -> nn.Module:
        return self._root()

    def _list(self) -> None:
        """Find every module of the model, and the layers that are there already."""
        self.names: dict[str, list[tuple[nn.Module | None, str]]] = {}
        self._inner: dict[str, list[tuple[nn.Module, str]]] = {}  # layers inside layers: where those hang
        first_place: dict[int, str] = {}
        seen: dict[str, nn.Module] = {}
        for name, module in outer_modules(self.model, lambda m: isinstance(m, Wrapper), every_place=True):
            seen[name] = module
            if not name:
                continue
            parent_name, _, attribute = name.rpartition(".")
            parent = seen[parent_name] if parent_name else None
            if isinstance(module, ParameterLayer):
                self._list_nest(name, module.nest())
            elif isinstance(module, BaseTunerLayer):
                self._list_layer(name, module)
            elif isinstance(module, StandIn):
                self.extras[name] = module
            # a module in several places is one module: it is replaced everywhere, under its first name
            known = first_place.setdefault(id(module), name)
            self.names.setdefault(known, []).append((parent, attribute))
        if self.layers:
            self.active = next(iter(self.layers.values())).active_adapters

    def _list_nest(self, name: str, nest: Sequence[ParameterLayer]) -> None:
        """List layers around one module, the innermost first, which is the order in which they can be taken away."""
        for depth, layer in enumerate(nest):
            key = name + ".base_layer" * (len(nest) - 1 - depth)
            self.layers[key] = layer
            if layer is not nest[-1]:
                self._inner[key] = [(nest[depth + 1], "base_layer")]

    def _list_layer(self, name: str, layer: BaseTunerLayer) -> None:
        """List a layer behind those of its module's parts."""
        for where, inner in layer.inside().items():
            parent, _, attribute = where.rpartition(".")
            self.layers[f"{name}.{where}"] = inner
            self._inner[f"{name}.{where}"] = [(layer.get_submodule(parent), attribute)]
        self.layers[name] = layer

    def _hangs(self, name: str) -> list[tuple[nn.Module, str]]:
        hangs = self.names[name] if name in self.names else self._inner[name]
        return [(inside(self.model) if parent is None else parent, attribute) for parent, attribute in hangs]

    def module(self, name: str) -> nn.Module:
        """What stands at `name` now: the module, or what replaced it."""
        parent, attribute = self._hangs(name)[0]
        return parent._modules[attribute]

    def base_module(self, name: str) -> nn.Module:
        """The module at `name` without adapter layers around it."""
        module = self.module(name)
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def nest(self, name: str) -> list[ParameterLayer]:
        """The layers around the module `name` that adapt Parameters of it, the innermost first."""
        layer = self.layers.get(name)
        return layer.nest() if isinstance(layer, ParameterLayer) else []

    def adapters(self, name: str) -> list[Adapter]:
        """What the layers have of an adapter."""
        return [layer.adapters[name] for layer in self.layers.values() if name in layer.adapters]

    def is_part(self, name: str) -> bool:
        """Whether the layer `name` is inside another, which decides for both."""
        return name in self._inner

    def is_nested(self, name: str) -> bool:
        """Whether the layer `name` adapts a Parameter, not a module."""
        return isinstance(self.layers[name], ParameterLayer)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in every place where the module `name` hangs."""
        for parent, attribute in self._hangs(name):
            put(parent, attribute, module)

    def wrap(self, name: str, make: Callable[[nn.Module], BaseTunerLayer] = make_layer) -> BaseTunerLayer:
        """The adapter layer in the place of the module `name`, made if there is none."""
        layer = self.layers.get(name)
        if layer is None:
            module = self.module(name)
            layer = self._prepared(make(module), module)
            for inner in layer.inside().values():
                self._prepared(inner, inner.base_layer)
            self._list_layer(name, layer)
            self.replace(name, layer)
        return layer

    def wrap_parameters(self, name: str, parameters: Sequence[str]) -> list[ParameterLayer]:
        """Layers for these Parameters of the module `name`, the innermost first, made if there are none."""
        nest = self.nest(name)
        if [layer.site.parameter for layer in nest] == list(parameters):
            return nest
        for layer_name in [k for k, layer in self.layers.items() if layer in nest]:
            self.unwrap(layer_name)  # of adapters that have been deleted
        outer = module = self.module(name)
        nest = []
        for parameter in parameters:
            outer = self._prepared(ParameterLayer(outer, site=ParameterSite(module, parameter)), module)
            nest.append(outer)
        self._list_nest(name, nest)
        self.replace(name, outer)
        return nest

    def _prepared(self, layer: Layer, module: nn.Module) -> Layer:
        layer.training = module.training
        layer.activate(list(self.active))  # the same on every layer, whether it has these adapters or not
        layer.share(self.control)
        return layer

    def unwrap(self, name: str) -> None:
        """Put the module back where nothing needs what replaced it any more."""
        layer = self.layers.get(name)
        if layer is None:
            if not self.extras[name]._adapters:
                self.replace(name, self.extras.pop(name).original_module)
        elif not layer.is_needed:
            self.replace(name, layer.base_layer)
            del self.layers[name]
            self._inner.pop(name, None)

    def wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        """Everything that holds adapters, in the model's order."""
        yield from self.layers.items()
        yield from self.extras.items()

    def wrapped(self) -> set[str]:
        """Names of the modules that something stands in for."""
        return {*self.layers, *self.extras}

    def remove_empty(self, except_for: Collection[str] = ()) -> None:
        """`unwrap` everywhere, save in these places."""
        before = dict(self.wrappers())
        for name in before:  # layers around others come after those
            if name not in except_for:
                self.unwrap(name)
        left = dict(self.wrappers())
        gather_without_wrapper(self.model, {wrapper for name, wrapper in before.items() if name not in left})

    def stands(self) -> bool:
        """Whether all that is listed hangs where it was put."""
        return all(self.module(name) is wrapper for name, wrapper in self.wrappers())

    def mergeable(self) -> dict[str, BaseTunerLayer]:
        """All layers that merge, by module name: the adapted ones, and rows of tokens."""
        rows = {n: w.token_adapter for n, w in self.extras.items() if isinstance(w, TrainableTokensWrapper)}
        return self.layers | rows

    def own_layers(self) -> list[LoraLayer]:
        """Layers that a user has written."""
        return [layer for layer in self.extras.values() if isinstance(layer, LoraLayer)]
