"""The adapters of one model: which there are, which act, and what is done to all that belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig, require_flag, require_module
from peftfast.errors import PeftWarning, check_present, enumerate_some, warn
from peftfast.keys import PREFIX
from peftfast.layers.layer import Place
from peftfast.layers.walk import base_parameters
from peftfast.method import BY_NAME, AdapterMethod, method_for
from peftfast.sharding import (
    gather_without_wrapper,
    is_sharded_by_fsdp2,
    is_stepped_by_deepspeed,
    is_stepped_by_zero3,
    reduce_what_trains,
    to_shards,
)
from peftfast.sites.site import bias_of, is_bias
from peftfast.wrapping.listing import Listing, Wrapper
from peftfast.wrapping.replication import Replication
from peftfast_kernels.op import get_backend


class Inventory(Listing):
    """What belongs to adapters in `model`.

    Attributes:
        configs: adapter name -> config (the `peft_config` that everybody else sees).
        enabled: whether adapters act at all.
        numbers: adapter name -> its number in tensors of adapter numbers, given once and never again, so that they are
            in ascending order. Another dict whenever adapters come or go, because other threads read it meanwhile.
        replication: how the model's layers are stacked anew, if an adapter says so.
    """

    def __init__(self, model: nn.Module, configs: dict[str, PeftConfig] | None = None) -> None:
        get_backend()  # reads the environment; a graph compiled before that would be compiled again
        super().__init__(model)
        self.configs: dict[str, PeftConfig] = {} if configs is None else configs
        self.enabled = True
        self.numbers: dict[str, int] = {}
        self.replication: Replication | None = None
        self._next_number = 0
        self._methods: dict[str, tuple[PeftConfig, str]] = {}
        self._places: dict[str, list[Place]] = {}
        self._number_tables: dict[torch.device, tuple[dict[str, int], tuple[str, ...], Tensor]] = {}
        self._trainable: set[str] = set()  # adapters that set_adapter or set_requires_grad made trainable
        for name in self.configs:
            self._give_number(name)

    # ---- coming and going --------------------------------------------------------------------------------------------
    def admit(self, name: str, cfg: PeftConfig) -> None:
        """The adapter is whole: it has a config here from now on, and a number."""
        self.configs[name] = cfg
        self._places.pop(name, None)  # of an adapter of the name that was deleted layer by layer
        self._give_number(name)
        self.method_of(name)  # now, not in a graph that would guard on all that methods ask configs for

    def method_of(self, name: str) -> AdapterMethod:
        """The method of an adapter; every forward of the model asks, and the methods would be asked one by one."""
        cfg, known = self.configs[name], self._methods.get(name)
        if known is not None and known[0] is cfg:
            return BY_NAME[known[1]]
        method = method_for(cfg)
        if not torch.compiler.is_compiling():
            self._methods[name] = cfg, type(method).__name__
        return method

    def _give_number(self, name: str) -> None:
        others = {n: number for n, number in self.numbers.items() if n != name}  # it may have been deleted elsewhere
        self.numbers = {**others, name: self._next_number}
        self._next_number += 1

    def replicate_layers(self, replication: Replication) -> None:
        """Stack the model's layers anew; nothing may be adapted yet."""
        replication.apply(self.model)
        self.replication = replication
        self._list()

    def restore_layers(self) -> None:
        """The model's own layers again; nothing may be adapted any more."""
        self.replication.undo(self.model)
        self.replication = None
        self._list()

    def number_table(self, device: torch.device) -> tuple[tuple[str, ...], Tensor]:
        """The adapters' names, and [1 + names + 1] ascending: -1, their numbers, and more than any."""
        numbers = self.numbers
        known = self._number_tables.get(device)
        if known is None or known[0] is not numbers:
            values = [-1, *numbers.values(), torch.iinfo(torch.int64).max]
            known = (numbers, tuple(numbers), torch.tensor(values, dtype=torch.int64, device=device))
            self._number_tables = {**self._number_tables, device: known}
        return known[1:]

    def freeze_base(self) -> None:
        """Everything that is no adapter's."""
        for _, parameter in self.base_parameters():
            parameter.requires_grad_(False)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is no adapter's, by its name in the model."""
        own = {id(p) for wrapper in self.extras.values() for _, p in _own_parameters(wrapper, wrapper._adapters)}
        return ((name, p) for name, p in base_parameters(self.model) if id(p) not in own)

    def train_biases(self, cfg: PeftConfig) -> None:
        """Unfreeze the base biases that the config's `bias` names."""
        kind = getattr(cfg, "bias", "none")
        if kind == "all":
            originals = tuple(f"{key}.original_module." for key in self.extras)
            for key, parameter in self.model.named_parameters():
                if is_bias(key) and not key.startswith(originals):
                    parameter.requires_grad_(True)
        elif kind != "none":  # "lora_only"
            for layer in self.layers.values():
                bias = bias_of(layer.base_layer)
                if bias is not None:
                    bias.requires_grad_(True)

    def eval(self) -> None:
        """Put the model into eval mode, without going through what adapters consist of where that already is."""
        for name in self.names:
            module = self.module(name)
            if module.training:
                module.eval()
        self.model.training = False

    def has_traces_of(self, name: str) -> bool:
        """Whether anything in the model belongs to an adapter of this name, listed or not."""
        return any(name in layer.adapters for layer in self.layers.values()) or any(
            name in wrapper._adapters for wrapper in self.extras.values()
        )

    def forget(self, name: str) -> None:
        """Take out what there is of an adapter that could not be added, or is replaced."""
        self._places.pop(name, None)
        for layer in self.layers.values():
            layer.forget(name)
        for wrapper in self.extras.values():
            wrapper.delete_adapter(name, [n for n in wrapper.active_adapters if n != name])
        self.remove_empty()

    # ---- which are active --------------------------------------------------------------------------------------------
    def check_known(self, names: str | Iterable[str], said: str = "not found") -> list[str]:
        """The names as a list; TypeError for what are none, ValueError for one of no adapter (`check_present`)."""
        if not isinstance(names, Iterable):
            raise TypeError(f"Adapters are named by a string, or several by a list of strings; got {names!r}")
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            check_present(name, self.configs, said)
        return names

    def set_adapter(self, names: str | list[str], inference_mode: bool = False) -> None:
        """Make `names` the active adapters: trainable unless `inference_mode`, the others frozen. What is merged is
        unmerged first."""
        names = self.check_known(names)
        require_flag(inference_mode, "inference_mode")
        for key, wrapper in self.extras.items():
            try:
                wrapper.check_set_adapter(names)
            except ValueError as e:
                raise ValueError(f"{e} (at {key!r})") from None
        if any(layer.merged for layer in self.layers.values()):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge()
        self._say_if_steps_repeat([name for name in self._acting() if name not in names])
        self._activate(names, inference_mode)

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        """`set_adapter`, whatever is merged. Only the parameters of adapters that change are touched, so the cost does
        not grow with their number."""
        to_shards(self.model)
        trainable = set() if inference_mode else set(names)
        for name in self._trainable.union(self._acting(), names):
            if not _switch(self._places_of(name), name in trainable):
                self._places.pop(name, None)
                _switch(self._places_of(name), name in trainable)
        for layer in self.layers.values():
            state = layer.__dict__
            state["_active_adapter"] = [*names]  # of its own, or graphs ask in Python whether it is the others' as well
            state["_plan"] = None
        for wrapper in self.extras.values():
            wrapper.set_adapter(names, inference_mode)
        self._trainable = trainable
        self.active = list(names)
        reduce_what_trains()

    def activate_added(self, name: str, inference_mode: bool) -> None:
        """Make an adapter that was just added the active one; of the others, what was trainable stays so."""
        touched = self._trainable.union(self._acting())
        frozen = [
            *((layer, touched) for layer in self.layers.values()),
            *((w, w._adapters) for w in self.extras.values()),
        ]
        trained = [p for wrapper, names in frozen for _, p in _own_parameters(wrapper, names) if p.requires_grad]
        self.set_adapter([name], inference_mode)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._trainable |= touched  # the next `set_adapter` looks there for what to freeze

    def in_force(self) -> list[str]:
        """The active adapters, none while they are off."""
        return self.active if self.enabled else []

    def _acting(self) -> list[str]:
        """The active adapters as the layers have them, which transformers and others tell one by one."""
        if not self.layers:
            return self.active
        return list(dict.fromkeys(name for layer in self.layers.values() for name in layer.active_adapters))

    def _say_if_steps_repeat(self, leaving: Iterable[str]) -> None:
        """Warn where adapters that are no longer active would be trained on by their last gradients."""
        for name in leaving:
            if any(is_stepped_by_zero3(parameters.get(leaf)) for *_, parameters, leaf in self._places_of(name)[:1]):
                warn(
                    f"DeepSpeed ZeRO-3 trains adapter {name!r}, which is no longer active. In a step that does not use "
                    "a parameter, DeepSpeed (0.19.8) applies the parameter's last gradient again, so further steps "
                    f"change {name!r}. ZeRO-1 and ZeRO-2 leave it as it is.",
                    PeftWarning,
                )

    def _places_of(self, name: str) -> list[Place]:
        places = self._places.get(name)
        if places is None:
            layers = (layer for layer in self.layers.values() if name in layer.adapters)
            places = [place for layer in layers for place in layer.places(name)]
            # what hangs deeper, under a parametrization, may be taken apart without a trace
            if all(parameters is held._parameters for _, _, held, parameters, _ in places):
                self._places[name] = places
        return places

    def is_frozen(self, name: str) -> bool:
        """Whether an adapter of layers has no Parameter that would get a gradient."""
        found = [parameters.get(leaf) for *_, parameters, leaf in self._places_of(name)]
        return bool(found) and not any(p is not None and p.requires_grad for p in found)

    def is_stepped_by_deepspeed(self) -> bool:
        """Whether DeepSpeed trains adapters here."""
        found = (place for name in self._trainable for place in self._places_of(name)[:1])
        return any(is_stepped_by_deepspeed(parameters.get(leaf)) for *_, parameters, leaf in found)

    def set_requires_grad(self, names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters without activating them."""
        names = self.check_known(names)
        require_flag(requires_grad, "requires_grad")
        to_shards(self.model)
        for _, wrapper in self.wrappers():
            wrapper.set_requires_grad(names, requires_grad)
        self._trainable = self._trainable.union(names) if requires_grad else self._trainable.difference(names)
        reduce_what_trains()

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self._make_ready(enabled)
        for _, wrapper in self.wrappers():
            wrapper.enable_adapters(enabled)
        self.enabled = enabled
        reduce_what_trains()

    def _make_ready(self, enabled: bool) -> None:
        """Before adapters are switched. Off, a merged layer takes them out of its weight when it is called, which FSDP2
        has put together for the call and takes apart again from what it was: there they are taken out before it."""
        to_shards(self.model)
        if not enabled and is_sharded_by_fsdp2(self.model):
            self._take_out()

    def say_if_biases_stay(self) -> None:
        """Warn that trained biases of the base act on while adapters are off."""
        biases = [cfg.bias for cfg in self.configs.values() if getattr(cfg, "bias", "none") != "none"]
        if biases:
            warn(
                f"Careful, disabling adapter layers with bias configured to be '{biases[0]}' does not produce the same "
                "output as the base model would without adaption."
            )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """All adapters off; afterwards every module is as it was, trainability included, but for adapters that were
        activated, frozen or unfrozen meanwhile."""
        self._make_ready(False)
        before = {w: w.disable_adapters for _, w in self.wrappers()}
        acted = {w: list(w.active_adapters) for w in before}
        trainable, enabled = set(self._trainable), self.enabled
        # nobody gets a gradient but who acts, and of others those alone are looked at that somebody has made trainable
        looked_at = {w: trainable.union(active) for w, active in acted.items()}
        trained = {
            where: p for w, names in looked_at.items() for where, p in _own_parameters(w, names) if p.requires_grad
        }

        def restore() -> None:
            for wrapper in {**before, **{w: None for _, w in self.wrappers()}}:
                wrapper._disable_adapters = before.get(wrapper, not enabled)  # others were made inside the block
            now = dict(found for w, names in looked_at.items() for found in _own_parameters(w, names))
            switched = trainable ^ self._trainable
            for where, parameter in trained.items():
                wrapper, name, _ = where
                if name in switched or list(wrapper.active_adapters) != acted[wrapper]:
                    continue
                for p in (parameter, now.get(where, parameter)):  # FSDP2 may have put it together, see `to_shards`
                    p.requires_grad_(True)
            self.enabled = enabled
            reduce_what_trains()

        try:
            try:
                for wrapper, names in looked_at.items():
                    wrapper.set_requires_grad(names, False)
                    wrapper._disable_adapters = True
                self.enabled = False
                yield
            finally:
                restore()
        except KeyboardInterrupt:  # perhaps while restoring, and nobody would see that adapters stay off, or frozen
            restore()
            raise

    # ---- deleting ----------------------------------------------------------------------------------------------------
    def check_deletable(self, names: Sequence[str]) -> None:
        """ValueError if one of these adapters is inside the weights."""
        merged = [
            n for n in names if any(n in layer.merged_adapters for layer in (*self.layers.values(), *self.own_layers()))
        ]
        if merged:
            raise ValueError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")

    def successor(self, others: list[str]) -> str:
        """Which adapter becomes active when the only active one is deleted; `others` are in the order of adding."""
        return min(others)

    def delete(self, name: str) -> None:
        """Delete an adapter everywhere. Nothing is changed if it cannot be."""
        check_present(name, self.configs, "does not exist")
        self.check_deletable([name])
        acting = self._acting()
        remaining = [n for n in acting if n != name]
        others = [n for n in self.configs if n != name]
        if name in acting and not remaining and others:
            remaining = [self.successor(others)]
            warn(f"Adapter {name} was active which is now deleted. Setting active adapter to {remaining[0]}.")
        if name in acting:  # first: what ends in between can be done again as long as the name is known
            self._activate(remaining)
        self._forget(name, remaining)
        self.active = remaining
        del self.configs[name]

    def _forget(self, name: str, remaining: list[str]) -> None:
        for layer in self.layers.values():
            layer.forget(name)
        for wrapper in self.extras.values():
            wrapper.delete_adapter(name, remaining)
        self._methods.pop(name, None)
        self.numbers = {n: number for n, number in self.numbers.items() if n != name}
        self._places.pop(name, None)
        self._trainable.discard(name)

    # ---- merging -----------------------------------------------------------------------------------------------------
    def supports_lora_conversion(self, name: str) -> bool:
        """Whether a plain LoRA can stand for the adapter in every layer."""
        layers = self.layers.values()
        return bool(layers) and all(layer.supports_lora_conversion(name) for layer in layers)

    def check_not_merged(self, name: str, what: str) -> None:
        """ValueError if the adapter is inside the weights, where a change of it would not arrive."""
        if any(name in layer.merged_adapters for layer in (*self.mergeable().values(), *self.own_layers())):
            raise ValueError(f"Cannot {what} adapter {name} while it is merged. Please unmerge it first.")

    def unmerge(self) -> None:
        """Take everything merged out again; bitwise the base as before."""
        if not self._take_out():
            warn("Already unmerged. Nothing to do.")

    def _take_out(self) -> bool:
        """Unmerge all there is; whether there was anything."""
        merged = [layer for layer in (*self.own_layers(), *self.mergeable().values()) if layer.merged]
        to_shards(self.model)
        for layer in reversed(merged):  # the reverse order matters where layers share one weight
            layer.unmerge()
        return bool(merged)

    def unload(self, merged: bool = False, names: list[str] | None = None) -> nn.Module:
        """Put the base modules back, `merged` with what is inside their weights; returns the base model.

        Args:
            names: of the adapters whose copies of modules stay; None: the active ones. Of several that have a copy of
                one module, the first's stays, with a warning.
        """
        for key, wrapper in self.extras.items():
            first, *others = [name for name in names or () if wrapper.replaces(name)] or [None]
            if others:
                warn(
                    f"{key} stays as adapter {first} has trained it; of {enumerate_some(others)}, which have copies of "
                    "their own too (modules_to_save), it has nothing.",
                    PeftWarning,
                )
        if not merged:
            self._take_out()
        for key, layer in self.layers.items():
            self.replace(key, layer.base_layer)
        left: dict[nn.Parameter, nn.Parameter] = {}
        for key, wrapper in self.extras.items():
            module = wrapper.unload_and_optionally_merge_module(False, False, names)
            self.replace(key, module)
            left |= wrapper.left_behind(module)
        for module in self.model.modules() if left else ():
            module._parameters.update({n: left[p] for n, p in module._parameters.items() if p in left})
        self.layers, self.extras, self._inner = {}, {}, {}
        self._methods, self.numbers, self._number_tables, self._places = {}, {}, {}, {}
        self.active, self.enabled, self._trainable = [], True, set()
        self.configs.clear()
        if self.replication is not None and merged:
            self.replication.part()
        elif self.replication is not None:
            self.restore_layers()
        gather_without_wrapper(self.model)
        return self.model


#: Where a base model keeps the inventory of its adapters, whoever has put them in.
KEPT = "_peftfast_inventory"


def find_inventory(model: nn.Module) -> tuple[Inventory | None, str]:
    """The inventory of a base model, or of the tuner or PeftModel around one, compiled or not, and what stands in front
    of its names in those of `model`. None where there is none, or where its layers have been taken out of the model
    since, as diffusers' `unload_lora` does. TypeError for what is no module."""
    require_module(model)
    model = getattr(model, "_orig_mod", model)
    tuner = model._modules.get("base_model") or model
    inventory = tuner.__dict__.get("inventory")
    if inventory is not None:
        return inventory, "model." if tuner is model else PREFIX
    inventory = model.__dict__.get(KEPT)
    if inventory is None or inventory.model is None:  # of a model that is gone, and this one a shallow copy of it
        return None, ""
    if not inventory.stands():  # something else may stand around them: an engine's wrapper
        present = {id(module) for module in model.modules()}
        if not all(id(wrapper) in present for _, wrapper in inventory.wrappers()):
            inventory = None
    return inventory, ""


def inventory_of(model: nn.Module) -> Inventory:
    """`find_inventory`, made where there is none yet."""
    model = getattr(model, "_orig_mod", model)
    inventory, _ = find_inventory(model)
    if inventory is None:
        configs = getattr(model, "peft_config", None)
        inventory = model.__dict__[KEPT] = Inventory(model, configs if isinstance(configs, dict) else {})
    return inventory


def _own_parameters(wrapper: Wrapper, names: Iterable[str]) -> Iterator[tuple[tuple[Wrapper, str, str], nn.Parameter]]:
    """The Parameters of these adapters, by where they are, the adapter, and what they are called there."""
    for name in names:
        for key, p in wrapper.adapter_parameters(name).items():
            if isinstance(p, nn.Parameter):
                yield (wrapper, name, key), p


def _switch(places: Iterable[Place], requires_grad: bool) -> bool:
    """Freeze or unfreeze the Parameters at `places`; False if something was replaced since they were listed, or taken
    away layer by layer, as diffusers deletes adapters. Dict look-ups and nothing else: switching adapters is on the
    path of a served request."""
    try:
        for container, key, held, parameters, leaf in places:
            if container[key] is not held:
                return False
            parameters[leaf].requires_grad = requires_grad
    except KeyError:
        return False
    return True
