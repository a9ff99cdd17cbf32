"""The module that replaces an adapted module: holds adapters of any method, runs the active ones (`calls.py`), merges
and unmerges. Written once for all methods, storage formats and kinds of module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig
from peftfast.errors import warn
from peftfast.layers.activation import HasActivation
from peftfast.layers.as_in_peft import AsInPeft, absent_in
from peftfast.layers.calls import CalledLayer
from peftfast.layers.mergeable import check_adapters_to_merge, check_mergeable
from peftfast.layers.merged_names import MergedNames
from peftfast.layers.merger import Merger
from peftfast.layers.scaling import HasScaling
from peftfast.layers.slots import SlotDict, TransposedView, container_of, make_slot
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import base_parameters
from peftfast.method import AdapterMethod
from peftfast.replicas import Replicated
from peftfast.rows.control import Control
from peftfast.sharding import GatheredAsOne, let_go, whole
from peftfast.sites import Site, Slot, has_site, make_site

#: What others keep on a module about this one and none around it, and look for before they take it off or put something
#: in its place: hooks of accelerate and diffusers, torch's parametrizations.
OF_ONE_MODULE = frozenset({"_hf_hook", "_old_forward", "_diffusers_hook", "parametrizations"})

#: A Parameter by the dict it is in and its key there, behind the dict, key and value its owner was found by.
Place = tuple[dict[str, Any], str, nn.Module, dict[str, Any], str]


def _made_again() -> dict[str, Any]:
    """What a layer looks up once and keeps, empty: copies and pickles of a layer go without it.

    `_plan`: what a call does with the active adapters; `store`: what routings and pools keep here between forwards;
    `derived`: what methods made of adapters.
    """
    return {"_plan": None, "store": {}, "derived": {}}


class BaseTunerLayer(CalledLayer, HasActivation, HasScaling, GatheredAsOne, AsInPeft, Replicated):
    """A module with adapters. Attribute names are PEFT's, because other libraries reach for them.

    Attributes:
        base_layer: the module that was here before, untouched.
    """

    adapter_layer_names: tuple[str, ...] = ()  # names of the slots present
    other_param_names: tuple[str, ...] = ()  # names of the per-adapter settings present
    frozen_peft_weight_names: Mapping[str, tuple[str, ...]] = {}  # by adapter, where some of its slots never train
    quantization_backend: str | None = None
    cast_input_dtype_enabled: bool = True  # see helpers.disable_input_dtype_casting
    spread: str | None = None  # how processes share the layer, if they do (see wrapping/tensor_parallel.py)
    #: Computes this layer together with others (see training/blocks.py): (layer, x) -> output, or None.
    block: Any = None

    def __init__(self, base_layer: nn.Module, site: Site | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merger = Merger(self)
        #: What others may put something new in the place of, for those who watch: the dict of all attributes, held by
        #: one of them, would keep the layer until the collector comes.
        self.replaceable: dict[str, Any] = {}
        self.merged_adapters = []
        self._initial_scaling: dict[str, float] = {}
        # not submodules: views and helpers that hold no parameter of their own
        self.__dict__["site"] = make_site(base_layer) if site is None else site
        self.__dict__["adapters"] = {}
        self.__dict__["control"] = Control()  # replaced by the one that all layers of a model share
        self.__dict__.update(_made_again())
        weight_shape = self.site.weight.shape
        self.in_features, self.out_features = weight_shape[1], weight_shape[0]

    # ---- adapters ----------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        name: str,
        method: AdapterMethod,
        cfg: PeftConfig,
        key: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        initialise: bool = True,
        source: BaseTunerLayer | None = None,
    ) -> Adapter:
        """Create the tensors of an adapter, frozen and inactive.

        Args:
            key: name of this module inside the model, for the patterns of the config.
            dtype: of the tensors; None: the base's.
            device: None: the base's. On "meta" nothing is allocated and nothing initialised.
            source: the layer whose tensors the adapter shares, so that the two stay one.
        """
        self.site.weight.name = key
        settings = method.settings(self.site, cfg, key)
        slots = method.slots(self.site, cfg, settings)
        device = self.site.weight.device if device is None else torch.device(device)
        dtype = dtype or self.site.weight.compute_dtype
        shared = {} if source is None else method.tied_slots(self.site)
        made = {}  # all of it before any is put in place, because there may be no memory for it
        for slot_name, slot in slots.items():
            if slot_name not in shared:
                # what no file carries must not be left on the meta device
                where = device if slot.fill is None else self.site.weight.device
                made[slot_name] = make_slot(slot, where, dtype)
        for setting, value in settings.items():
            if isinstance(value, nn.Module):
                self._container(setting, nn.ModuleDict)[name] = value.train(self.training)
            else:
                self._container(setting, dict)[name] = value
        if "scaling" in settings:
            self._initial_scaling[name] = settings["scaling"]
        for slot_name, held in made.items():
            container = self._slot(slot_name, slots[slot_name])
            container[name] = held.train(self.training) if isinstance(held, nn.Module) else held
        if source is not None:
            self._share(source, name, shared)
        self.__dict__.update(  # which setting attributes of a module takes five times as long as
            adapter_layer_names=tuple(dict.fromkeys((*self.adapter_layer_names, *slots))),
            other_param_names=tuple(dict.fromkeys((*self.other_param_names, *settings))),
            _plan=None,
        )
        adapter = Adapter(name, cfg, key, method, slots, self)
        adapter.locate()
        self.adapters[name] = adapter
        if initialise and device.type != "meta":
            with self.whole_for(adapter):
                self.initialise(adapter)
        self.changed(name)
        return adapter

    @torch.no_grad()
    def initialise(self, adapter: Adapter) -> None:
        """Give an adapter's tensors their first values, all but those that it keeps in another layer."""
        if adapter.name not in self.merger.sources:
            adapter.method.init(self.site, adapter)
        elif self.own_slots(adapter):
            adapter.method.init_untied(self.site, adapter)

    def own_slots(self, adapter: Adapter) -> set[str]:
        """Those slots of an adapter that are not another layer's."""
        tied = adapter.method.tied_slots(self.site) if adapter.name in self.merger.sources else ()
        return {name for name, slot in adapter.slots.items() if name not in tied and slot.fill is None}

    def whole_for(self, adapter: Adapter) -> AbstractContextManager:
        """See `sharding.whole`: of the base and this adapter."""
        return whole([*(p for _, p in base_parameters(self)), *adapter.parameters().values()])

    def __setattr__(self, name: str, value: Any) -> None:
        """Others may put modules of their own in the place of the base module, and of what keeps adapters' tensors; and
        they switch layers by writing to PEFT's attributes."""
        known = isinstance(value, nn.Module) and "adapters" in self.__dict__
        if known and name == "base_layer" and value is not self._modules[name]:
            self._look_at(value)
        super().__setattr__(name, value)
        if name == "scaling":
            self.replaceable[name] = value
        if known:
            for adapter in self.adapters.values():
                adapter.locate()
                self.changed(adapter.name)
        if known or name in ("_active_adapter", "_disable_adapters"):
            self.__dict__["_plan"] = None

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As by assignment; torch's own, `register_module` too, passes by that."""
        setattr(self, name, module)

    def _look_at(self, module: nn.Module) -> None:
        """Compute with another base module from now on. What has no weight of its own is around the one before."""
        if not has_site(module):
            self.site.put_around(module)
            return
        if self.merged_adapters:
            raise RuntimeError(
                f"Adapters {self.merged_adapters} are inside the weight of the base layer. Please unmerge them before "
                "another module takes its place."
            )
        key = self.site.weight.name
        self.__dict__["site"] = make_site(module)
        self.site.weight.name = key

    def _container(self, name: str, kind: type) -> Any:
        container = self.__dict__.get(name)
        if container is None:
            container = self._modules.get(name)
        if container is None:
            container = kind()
            if isinstance(container, nn.Module):
                container.training = self.training
            setattr(self, name, container)
        return container

    def _slot(self, name: str, slot: Slot) -> nn.Module:
        """The container of a slot, made fit for a method that fills it in another way than those before, and this
        layer's own."""
        kind = container_of(slot)
        container = self._container(name, kind)
        others = any(source._modules.get(name) is container for source in self.merger.sources.values())
        if others or not isinstance(container, (kind, SlotDict)):
            container = SlotDict(container)
            setattr(self, name, container)
        return container

    def forget(self, name: str) -> None:
        """Take out what is here of an adapter. Others stay as they are; none becomes active in its place."""
        if name in self.merged_adapters:
            raise ValueError(f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first.")
        self.adapters.pop(name, None)
        self._initial_scaling.pop(name, None)
        self.merger.sources.pop(name, None)
        for kept in (*self.adapter_layer_names, *self.other_param_names):
            container = self._container(kept, dict)
            if name in container:
                let_go(container, name)
                del container[name]
        self.activate([other for other in self.active_adapters if other != name])
        self.changed(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the alphabetically first remaining one becomes active."""
        was_active = adapter_name in self.active_adapters
        self.forget(adapter_name)
        if was_active:
            remaining = self.active_adapters
            if not remaining and self.adapters:
                remaining = [min(self.adapters)]
                warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {remaining[0]}."
                )
            self.set_adapter(remaining)

    def inside(self) -> Mapping[str, BaseTunerLayer]:
        """Layers within this one, the outermost first, by where they are in it."""
        return {}

    def read_from_outside(self) -> Iterator[nn.Parameter]:
        """All Parameters below: methods read weights, factors and vectors where they hang."""
        yield from self.parameters()
        for source in self.merger.sources.values():  # views of its factors
            yield from source.parameters()

    @property
    def is_needed(self) -> bool:
        """Whether it has an adapter, or slots of a pool."""
        return bool(self.adapters or self.store.get("slots"))

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def adapter_parameters(self, adapter_name: str) -> Mapping[str, Tensor]:
        """All tensors of an adapter, by slot name; none where it is not."""
        adapter = self.adapters.get(adapter_name)
        return {} if adapter is None else adapter.parameters()

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    def _share(self, source: BaseTunerLayer, name: str, slots: Mapping[str, str]) -> None:
        """Let adapter `name` keep here what it keeps in `source`.

        Args:
            slots: own slot -> slot of `source`. The same name: the same tensors, under both names, as in PEFT
                (`parameters()` yields them once); another: theirs, transposed.
        """
        alike = all(self.merger.sources.get(other) is source for other in self.adapters)
        for own, theirs in slots.items():
            container = getattr(source, theirs)
            if own != theirs:
                self._container(own, nn.ModuleDict)[name] = TransposedView(source, theirs, name)
            elif alike:
                setattr(self, own, container)
            else:
                if container[name].is_meta:  # what is loaded would take its place in one of the two only
                    empty = torch.empty_like(container[name], device=source.site.weight.device)
                    container[name] = nn.Parameter(empty, requires_grad=False)
                self._slot(own, source.adapters[name].slots[theirs])[name] = container[name]
        self.merger.sources[name] = source

    # ---- which are active --------------------------------------------------------------------------------------------
    def activate(self, names: list[str]) -> None:
        """Make `names` the active adapters without touching any parameter."""
        self._active_adapter = names

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters: their parameters become trainable (unless `inference_mode`), all others frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self.activate(names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            adapter = self.adapters.get(name)
            if adapter is not None:
                for parameter in self.trainable(adapter):
                    parameter.requires_grad_(requires_grad)

    def trainable(self, adapter: Adapter) -> Iterator[nn.Parameter]:
        """The Parameters of an adapter that training may change; none where they are another layer's."""
        for *_, parameters, leaf in self.places(adapter.name):
            yield parameters[leaf]

    def places(self, name: str) -> Iterator[Place]:
        """Where the Parameters of adapter `name` hang that training may change, also those that others have put into
        its modules: a parametrization's, a bias."""
        for slot_name, slot in self.adapters[name].slots.items():
            if not slot.trainable:
                continue
            container = getattr(self, slot_name)
            if slot.holder is None:
                yield self._modules, slot_name, container, container._parameters, name
                continue
            holder = container[name]
            for module in holder.modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        yield container._modules, name, holder, module._parameters, leaf

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of this layer on or off; off also freezes them."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for name in self.adapters:
                self.set_requires_grad(name, False)
        self._disable_adapters = not enabled

    # ---- merging -----------------------------------------------------------------------------------------------------
    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters whose change is inside the base weight now, in merge order. Others write to it as well,
        by assignment or in place, once they have put the weight back themselves, or mean to leave it as it is."""
        return MergedNames(self, self.__dict__["_merged"])

    @merged_adapters.setter
    def merged_adapters(self, names: Sequence[str]) -> None:
        # torch 2.11 compiles no property that reads its own name there
        self.__dict__["_merged"] = self.replaceable["_merged"] = list(names)
        self._plan = None
        if not names:
            self.merger.forget()

    @property
    def merged(self) -> bool:
        return bool(self.__dict__["_merged"])

    @property
    def merge_error(self) -> Tensor | None:
        """Relative error of a merge into quantised storage; None where nothing is merged or nothing was rounded so."""
        rounded = self.merger.rounded
        return rounded.error if rounded is not None and self.site.weight.quantization else None

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        keep: bool | str = True,
        untie: bool = False,
        rounding: str = "auto",
    ) -> None:
        """Put adapters inside the base weight: summed wider than the weight, rounded once.

        Args:
            safe_merge: refuse a result with NaN or infinite values, leaving weight and bias untouched.
            adapter_names: None: the active ones.
            keep: keep the base's bytes, so that `unmerge` is exact in every bit, with "host" in host memory; False when
                there will be no unmerge.
            untie: other modules use the weight as well and are to keep it as it is, so this one gets its own.
            rounding: into 4, 8 or 16 bits: "nearest" value; "stochastic", up or down so that the expected value is
                exact; "auto": to the nearest where that keeps nine tenths of what the adapters change.
        """
        check_mergeable(self)
        asked = check_adapters_to_merge(self, adapter_names)
        names = [name for name in dict.fromkeys(asked) if name in self.adapters]
        self.merger.merge(names, safe_merge=safe_merge, keep=keep, untie=untie, rounding=rounding)

    def unmerge(self) -> None:
        """Take all merged adapters out again; every bit of the base is as before."""
        self.merger.unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change that merging `adapter` alone would make, in the layout of the stored weight, in fp32 or
        wider."""
        return self.merger.change(adapter)

    def changed(self, adapter_name: str | None = None) -> None:
        """Something other than training wrote to an adapter, with None to any or to the base: nothing that was made of
        it holds."""
        self.derived.clear()
        self.control.forget(self, adapter_name)
        if adapter_name is None:
            self._base_replaced()

    def _base_replaced(self) -> None:
        for adapter in self.adapters.values():
            if hasattr(type(adapter.method), "base_replaced"):
                adapter.method.base_replaced(adapter)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            self._base_replaced()

    # ---- the wrapped module, as others see it ------------------------------------------------------------------------
    def counterparts(self) -> tuple[str, ...]:
        methods = {a.method for a in self.__dict__.get("adapters", {}).values()}
        named = dict.fromkeys(m.peft_layer for m in methods if hasattr(m, "peft_layer"))
        return tuple(named) or ("tuners.tuners_utils.BaseTunerLayer",)

    def get_base_layer(self) -> nn.Module:
        """The innermost base module, also through several wrappers."""
        base = self._modules["base_layer"]
        while hasattr(base, "base_layer"):
            base = base.base_layer
        return base

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer().weight

    @property
    def bias(self) -> Tensor | None:
        return self.get_base_layer().bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a plain LoRA can stand for the adapter; see `peftfast.convert_to_lora`."""
        adapter = self.adapters.get(adapter_name)
        fits = self.site.groups == 1  # an SVD knows nothing of a convolution's groups
        return adapter is None or fits and getattr(adapter.method, "as_product", None) is not None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # models read attributes of their own layers (embedding_dim, stride, ...), which only the base has
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("__") or name in OF_ONE_MODULE:
                raise
            value = absent_in(self, name)
            return getattr(base, name) if value is None else value

    def _get_name(self) -> str:
        base = type(self.base_layer).__name__
        methods = [a.method for a in self.adapters.values()]
        names = [getattr(m, "layer_name", f"{m.family}.{base}") for m in methods] or [f"adapter.{base}"]
        return "+".join(dict.fromkeys(names))

    def __getstate__(self) -> dict:
        return {**self.__dict__, **_made_again()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.merger.layer is not self:
            self.__dict__["copied"] = self.merger.layer  # whose adapters a shallow copy has
        for adapter in self.adapters.values():
            adapter.locate()


def without_adapters(module: nn.Module) -> nn.Module:
    """The base model's module in what stands in for it."""
    if isinstance(module, StandIn):
        return module.original_module
    return module.base_layer if isinstance(module, BaseTunerLayer) else module


L = TypeVar("L", bound=Callable)

_LAYERS: dict[type, Callable[..., BaseTunerLayer]] = {}


def register_layer(site: type) -> Callable[[L], L]:
    """Decorator: modules with this kind of site are replaced by what the class or function makes of module and site."""

    def register(cls: L) -> L:
        _LAYERS[site] = cls
        return cls

    return register


def site_of(module: nn.Module, cls: type | None = None) -> Site:
    """Where an adapter of `module` acts: as its layer says, if it has one, or as a layer of class `cls` would say.

    Raises:
        ValueError: the kind of module is not supported.
    """
    if isinstance(module, BaseTunerLayer):
        return module.site
    return getattr(cls, "site_of", make_site)(module)


def make_layer(module: nn.Module) -> BaseTunerLayer:
    """The layer, without adapters, that is to stand in the module's place."""
    site = make_site(module)
    return _LAYERS.get(type(site), BaseTunerLayer)(module, site=site)
