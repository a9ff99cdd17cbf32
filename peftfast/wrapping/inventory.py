"""The adapted modules of one model: found once, listed once, and what is done to all of them together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.layer import BaseTunerLayer, Place, check_adapter_name
from peftfast.many.control import Control
from peftfast.method import method_for
from peftfast.sites.parameter import ParameterSite
from peftfast.sites.site import is_bias
from peftfast.wrapping.injection import Injection, plan_injection
from peftfast.wrapping.model_merger import ModelMerger
from peftfast.wrapping.parameter_layer import ParameterLayer
from peftfast.wrapping.replication import Replication, ranges_of
from peftfast.wrapping.saved_modules import AuxiliaryTrainingWrapper
from peftfast_kernels.op import get_backend

Wrapper = BaseTunerLayer | AuxiliaryTrainingWrapper
Layer = TypeVar("Layer", bound=BaseTunerLayer)


class Inventory:
    """What belongs to adapters in `model`.

    Attributes:
        model: the base model, changed in place.
        configs: adapter name -> config (the `peft_config` that everybody else sees).
        layers: module name -> the layer that replaced it.
        extras: module name -> wrapper of a module saved beside the adapter.
        numbers: adapter name -> its number in tensors of adapter numbers, given once and never again.
        control: how layers learn what a batch's mix is.
        replication: how the model's layers are stacked anew, if an adapter says so.
    """

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig] | None = None) -> None:
        get_backend()  # reads the environment; a graph compiled before that would be compiled again
        self.model = model
        self.configs: dict[str, PeftConfig] = {} if configs is None else configs
        self.layers: dict[str, BaseTunerLayer] = {}
        self.extras: dict[str, AuxiliaryTrainingWrapper] = {}
        self.active: list[str] = []
        self.enabled = True
        self.numbers: dict[str, int] = {}
        self.control = Control()
        self.merger = ModelMerger(self)
        self.replication: Replication | None = None
        self._next_number = 0
        self._places: dict[str, list[Place]] = {}
        self._number_tables: dict[torch.device, tuple[tuple[str, ...], Tensor]] = {}
        self._trainable: set[str] = set()  # adapters that set_adapter or set_requires_grad made trainable
        self._list()
        for name in self.configs:
            self._give_number(name)

    def _list(self) -> None:
        """Find every module of the model, and the layers that are there already."""
        self.names: dict[str, list[tuple[nn.Module, str]]] = {}  # every base module: where it hangs
        self._inner: dict[str, list[tuple[nn.Module, str]]] = {}  # layers inside layers: where those hang
        first_place: dict[int, str] = {}
        inside: str | None = None
        for name, module in self.model.named_modules(remove_duplicate=False):
            if inside is not None and name.startswith(inside):
                continue
            inside = None
            parent_name, _, attribute = name.rpartition(".")
            if not name:
                continue
            parent = self.model.get_submodule(parent_name) if parent_name else self.model
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                inside = name + "."
                if isinstance(module, ParameterLayer):
                    self._list_nest(name, module.nest())
                else:
                    (self.layers if isinstance(module, BaseTunerLayer) else self.extras)[name] = module
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

    def _hangs(self, name: str) -> list[tuple[nn.Module, str]]:
        return self.names[name] if name in self.names else self._inner[name]

    def module(self, name: str) -> nn.Module:
        """What stands at `name` now: the module, or what replaced it."""
        parent, attribute = self._hangs(name)[0]
        return getattr(parent, attribute)

    def base_module(self, name: str) -> nn.Module:
        """The module at `name` without adapter layers around it."""
        module = self.module(name)
        return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def nest(self, name: str) -> list[ParameterLayer]:
        """The layers around the module `name` that adapt Parameters of it, the innermost first."""
        layer = self.layers.get(name)
        return layer.nest() if isinstance(layer, ParameterLayer) else []

    def is_nested(self, name: str) -> bool:
        """Whether the layer `name` adapts a Parameter, not a module."""
        return isinstance(self.layers[name], ParameterLayer)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in every place where the module `name` hangs."""
        for parent, attribute in self._hangs(name):
            setattr(parent, attribute, module)

    def wrap(self, name: str) -> BaseTunerLayer:
        """The adapter layer in the place of the module `name`, made if there is none."""
        layer = self.layers.get(name)
        if layer is None:
            module = self.module(name)
            layer = self._prepared(BaseTunerLayer(module), module)
            self.layers[name] = layer
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
            outer = self._prepared(ParameterLayer(outer, ParameterSite(module, parameter)), module)
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
        """Put the module back where its layer has no adapter and no slots of a pool any more."""
        layer = self.layers[name]
        if not layer.adapters and "slots" not in layer.store:
            self.replace(name, layer.base_layer)
            del self.layers[name]
            self._inner.pop(name, None)

    def wrappers(self) -> Iterator[tuple[str, Wrapper]]:
        """Everything that holds adapters, in the model's order."""
        yield from self.layers.items()
        yield from self.extras.items()

    # ---- adding ------------------------------------------------------------------------------------------------------
    def add(self, name: str, cfg: PeftConfig, *, strict: bool = False, **options: Any) -> Injection:
        """Add an adapter, frozen and inactive. Nothing is changed if anything about it is wrong.

        Args:
            cfg: its targets are resolved in place.
            strict: refuse what would otherwise be let pass with a warning.
            options: `dtype`, `device`, `initialise`, `keys` of `injection.plan_injection`.

        Raises:
            ValueError: the name is taken, nothing matches, a second adapter would train biases.
        """
        check_adapter_name(name)
        if name in self.configs:
            raise ValueError(f"Adapter with name '{name}' already exists.")
        cfg.validate()
        self._check_base_is_whole(name, cfg)
        if getattr(cfg, "bias", "none") != "none" and self.configs:
            raise ValueError(
                f"{type(cfg).__name__.removesuffix('Config')}Model supports only 1 adapter with bias. When using "
                "multiple adapters, set bias to 'none' for all adapters."
            )
        first = not self.configs and not any(layer.adapters for layer in self.layers.values())
        fields_before = dict(cfg.__dict__)
        present = {wrapper for _, wrapper in self.wrappers()}
        replicates = self._replicate(name, cfg)
        try:
            injection = self._inject(name, cfg, strict, options)
        except BaseException:
            cfg.__dict__.clear()
            cfg.__dict__.update(fields_before)
            self._forget(name)
            if replicates:
                self._restore_layers()
            raise
        self.configs[name] = cfg
        self._give_number(name)
        for _, wrapper in self.wrappers():
            wrapper.share(self.control)
            if not self.enabled and wrapper not in present:
                wrapper._disable_adapters = True  # off is off, also where the first adapter comes while it is
        if first:
            self._freeze_base()
        return injection

    def _inject(self, name: str, cfg: PeftConfig, strict: bool, options: dict[str, Any]) -> Injection:
        injection = plan_injection(self, name, cfg, method_for(cfg), strict=strict, **options)
        injection.apply()
        return injection

    def _replicate(self, name: str, cfg: PeftConfig) -> bool:
        """Stack the model's layers as the config says, before anything is matched; whether that changed the model."""
        if self.replication is not None and not (self.configs or self.layers or self.extras):
            self._restore_layers()
        ranges, present = ranges_of(cfg), self.replication.ranges if self.replication is not None else ()
        if ranges == present:
            return False
        if present or self.configs:
            raise ValueError(
                f"Adapter {name} has layer_replication={[list(r) for r in ranges] or None}, but the layers of this "
                f"model are stacked as {[list(r) for r in present] or None} for {sorted(self.configs)}: all adapters "
                "of a model need the same"
            )
        replication = Replication(self.model, ranges)
        replication.apply(self.model)
        self.replication = replication
        self._list()
        return True

    def _restore_layers(self) -> None:
        self.replication.undo(self.model)
        self.replication = None
        self._list()

    def _check_base_is_whole(self, name: str, cfg: PeftConfig) -> None:
        """ValueError if the adapter would start from a weight that others are merged into."""
        merged = {n for layer in self.layers.values() for n in layer.merged_adapters}
        method = method_for(cfg) if merged else None
        if merged and getattr(method, "reads_base", method.changes_base)(cfg):
            raise ValueError(
                f"Adapter {name} starts from the base weights, which contain {', '.join(sorted(merged))} now. Please "
                "unmerge first."
            )

    def _give_number(self, name: str) -> None:
        self.numbers[name] = self._next_number
        self._next_number += 1
        self._number_tables = {}

    def number_table(self, device: torch.device) -> tuple[tuple[str, ...], Tensor]:
        """The adapters' names, and [1 + numbers ever given + 1]: for number i, at place i + 1, the position among the
        names; -1 at place 0; the count of names where there is no such adapter (any more)."""
        known = self._number_tables.get(device)
        if known is None:
            names = tuple(self.numbers)
            values = [len(names)] * (self._next_number + 2)
            values[0] = -1
            for position, name in enumerate(names):
                values[self.numbers[name] + 1] = position
            known = (names, torch.tensor(values, dtype=torch.int64, device=device))
            self._number_tables = {**self._number_tables, device: known}
        return known

    def _freeze_base(self) -> None:
        adapters = {p for _, w in self.wrappers() for p in _own_parameters(w)}
        for parameter in self.model.parameters():
            if parameter not in adapters:
                parameter.requires_grad_(False)

    def train_biases(self, cfg: PeftConfig) -> None:
        """Unfreeze the base biases that the config's `bias` names."""
        kind = getattr(cfg, "bias", "none")
        if kind == "all":
            for key, parameter in self.model.named_parameters():
                if is_bias(key) and ".original_module." not in key:
                    parameter.requires_grad_(True)
        elif kind == "lora_only":
            for layer in self.layers.values():
                bias = getattr(layer.base_layer, "bias", None)
                if bias is not None:
                    bias.requires_grad_(True)

    def eval(self) -> None:
        """Put the model into eval mode, without going through what adapters consist of where that already is."""
        for name in self.names:
            module = self.module(name)
            if module.training:
                module.eval()
        self.model.training = False

    def _forget(self, name: str) -> None:
        self._places.pop(name, None)
        for key, layer in list(self.layers.items()):
            if name in layer.adapters or not layer.adapters:
                layer.activate([n for n in layer.active_adapters if n != name])
                layer.delete_adapter(name)
            self.unwrap(key)
        for key, wrapper in list(self.extras.items()):
            wrapper.delete_adapter(name, [n for n in wrapper.active_adapters if n != name])
            if not wrapper._adapters:
                self.replace(key, wrapper.original_module)
                del self.extras[key]

    def places(self) -> set[str]:
        """Names of the modules that something stands in for."""
        return {*self.layers, *self.extras}

    def remove_empty(self, except_for: set[str]) -> None:
        """Put the base modules back where no adapter is left, save in places that were taken before."""
        for key, layer in list(self.layers.items()):
            if not layer.adapters and key not in except_for:
                self.replace(key, layer.base_layer)
                del self.layers[key]
                self._inner.pop(key, None)
        for key, wrapper in list(self.extras.items()):
            if not wrapper._adapters and key not in except_for:
                self.replace(key, wrapper.original_module)
                del self.extras[key]

    # ---- which are active --------------------------------------------------------------------------------------------
    def check_known(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list; ValueError for one that no adapter has."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self.configs:
                raise ValueError(f"Adapter {name} not found. Adapters present: {sorted(self.configs)}")
        return names

    def set_adapter(self, names: str | list[str], inference_mode: bool = False) -> None:
        """Make `names` the active adapters: trainable unless `inference_mode`, the others frozen.

        Only the parameters of adapters that change are touched, so the cost does not grow with their number.
        """
        names = self.check_known(names)
        for wrapper in self.extras.values():
            wrapper.check_set_adapter(names)
        if any(layer.merged_adapters for layer in self.layers.values()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unmerge()
        trainable = set() if inference_mode else set(names)
        for name in self._trainable.union(self.active, names):
            if not _switch(self._places_of(name), name in trainable):
                del self._places[name]
                _switch(self._places_of(name), name in trainable)
        for layer in self.layers.values():
            state = layer.__dict__
            state["_active_adapter"] = names
            state["_plan"] = None
        for wrapper in self.extras.values():
            wrapper.set_adapter(names, inference_mode)
        self._trainable = trainable
        self.active = list(names)

    def _places_of(self, name: str) -> list[Place]:
        places = self._places.get(name)
        if places is None:
            layers = (layer for layer in self.layers.values() if name in layer.adapters)
            places = self._places[name] = [place for layer in layers for place in layer.places(name)]
        return places

    def set_requires_grad(self, names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        names = self.check_known(names)
        for _, wrapper in self.wrappers():
            wrapper.set_requires_grad(names, requires_grad)
        self._trainable = self._trainable.union(names) if requires_grad else self._trainable.difference(names)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        for _, wrapper in self.wrappers():
            wrapper.enable_adapters(enabled)
        self.enabled = enabled

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """All adapters off; afterwards every module is as it was, trainability included."""
        before = [(w, w.disable_adapters) for _, w in self.wrappers()]
        grads = [(p, p.requires_grad) for _, w in self.wrappers() for p in _own_parameters(w)]
        enabled = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            for wrapper, was_disabled in before:
                wrapper._disable_adapters = was_disabled
                if isinstance(wrapper, BaseTunerLayer):
                    wrapper.__dict__["_plan"] = None
            for parameter, requires_grad in grads:
                parameter.requires_grad_(requires_grad)
            self.enabled = enabled
            for wrapper in {w for _, w in self.wrappers()} - {w for w, _ in before}:
                wrapper._disable_adapters = not enabled  # made inside the block

    # ---- deleting ----------------------------------------------------------------------------------------------------
    def delete(self, name: str) -> None:
        """Delete an adapter everywhere. Nothing is changed if it cannot be."""
        if name not in self.configs:
            raise ValueError(f"Adapter {name} does not exist. Adapters present: {sorted(self.configs)}")
        if any(name in layer.merged_adapters for layer in self.layers.values()):
            raise ValueError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")
        remaining = [n for n in self.active if n != name]
        others = [n for n in self.configs if n != name]
        if name in self.active and not remaining and others:
            remaining = [min(others)]
            warnings.warn(
                f"Adapter {name} was active which is now deleted. Setting active adapter to {remaining[0]}.",
                stacklevel=3,
            )
        was_active = name in self.active
        for layer in self.layers.values():
            layer.activate([n for n in layer.active_adapters if n != name])
            layer.delete_adapter(name)
        for wrapper in self.extras.values():
            wrapper.delete_adapter(name, remaining)
        del self.configs[name]
        self.numbers.pop(name, None)
        self._number_tables = {}
        self._places.pop(name, None)
        self._trainable.discard(name)
        if was_active:
            self.active = []
            self.set_adapter(remaining)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, keep: bool | str = True,
              progress: Callable[[Iterable], Iterable] = lambda items: items) -> None:  # fmt: skip
        """Merge in every layer, or, if one refuses, in none. Arguments as in `BaseTunerLayer.merge`.

        A layer whose weight other modules use as well gets a weight of its own while it is merged.
        """
        self.merger.merge(adapter_names, safe_merge, keep=keep, progress=progress)

    def unmerge(self) -> None:
        """Take everything merged out again; bitwise the base as before."""
        self.merger.unmerge()

    def check_not_merged(self, name: str, what: str) -> None:
        """ValueError if the adapter is inside the weights, where a change of it would not arrive."""
        self.merger.check_not_merged(name, what)

    def merge_errors(self) -> dict[str, float]:
        """Relative error |stored - exact| / |exact| of every merged weight whose storage is quantised."""
        return self.merger.errors()

    def unload(self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None,
               progress: Callable[[Iterable], Iterable] = lambda items: items) -> nn.Module:  # fmt: skip
        """Put the base modules back, with or without the adapters inside; returns the base model."""
        if adapter_names is not None:
            self.check_known(adapter_names)
        if merge:
            names = self.active if adapter_names is None else adapter_names
            merged = {n for layer in self.layers.values() for n in layer.merged_adapters}
            if not merged:
                self.merger.untie_one_sided(names)
            if not set(names) <= merged:
                # a check that may refuse half-way needs the bytes to go back to
                self.merge(names, safe_merge, keep=bool(merged) or safe_merge, progress=progress)
        for key, layer in self.layers.items():
            if layer.merged and not merge:
                layer.unmerge()
            self.replace(key, layer.base_layer)
        for key, wrapper in self.extras.items():
            module = wrapper.unload_and_optionally_merge_module(False, safe_merge, adapter_names)
            self.replace(key, module)
        if self.replication is not None and merge:
            self.replication.part()
        elif self.replication is not None:
            self._restore_layers()
        self.merger.say_if_untied()
        self.layers, self.extras, self._inner = {}, {}, {}
        self.configs.clear()
        self.numbers, self._number_tables, self._places = {}, {}, {}
        return self.model

    def __deepcopy__(self, memo: dict) -> Inventory:
        new = Inventory.__new__(Inventory)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new


def _own_parameters(wrapper: Wrapper) -> Iterator[nn.Parameter]:
    if isinstance(wrapper, BaseTunerLayer):
        for adapter in wrapper.adapters.values():
            yield from (p for p in adapter.parameters().values() if isinstance(p, nn.Parameter))
    else:
        for name in wrapper._adapters:
            yield from wrapper.adapter_parameters(name).values()


def _switch(places: Iterable[Place], requires_grad: bool) -> bool:
    """Freeze or unfreeze the Parameters at `places`; False if something was replaced since they were listed. Dict
    look-ups and nothing else: switching adapters is on the path of a served request."""
    for container, key, held, parameters, leaf in places:
        if container[key] is not held:
            return False
        parameters[leaf].requires_grad = requires_grad
    return True
