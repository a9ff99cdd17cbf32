"""Adding one adapter to a model: everything is decided and checked first, then done, so that a refusal changes
nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, close_matches, enumerate_some, warn
from peftfast.files.renamed import rename_targets
from peftfast.keys import ends_of, strip_wrappers
from peftfast.layers.layer import BaseTunerLayer, make_layer, site_of
from peftfast.layers.saved_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peftfast.method import AdapterMethod, changes_base, chooses_targets, method_for, retarget
from peftfast.modes import modes_kept
from peftfast.sites import Site, bias_of
from peftfast.wrapping.attention import plan_attention
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.own_layers import add_to_own_layer, own_layer_classes, settings_of
from peftfast.wrapping.parameters import Targets, full_names, plan_parameters, report_parameters
from peftfast.wrapping.read_past import say_read_by_parents
from peftfast.wrapping.targets import (
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    Matcher,
    make_matcher,
    name_ends,
    refuse_mamba,
    report_matches,
    resolve_targets,
    say_misfits,
    shortest_suffixes,
)
from peftfast.wrapping.tensor_parallel import Spread, plan_spreading
from peftfast.wrapping.tying import embedding_name, plan_tokens, plan_tying, tied_module_names

_HALF = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Injection:
    """What adding one adapter will do.

    Attributes:
        targets: module names to adapt. classes: of these, the ones that get a layer of another class than usual, and
            which. spread: of these, the ones that are spread over processes, and how. own: module names that get a
            layer which a user has written, and its class.
        parameters: module name -> Parameters of it to adapt by themselves.
        saved: module names to keep a trained copy of.
        tokens: module name -> rows to train.
        tied: of targets, saved and tokens, the heads that share what the input embedding has there.
    """

    inventory: Inventory
    name: str
    cfg: PeftConfig
    method: AdapterMethod
    targets: list[str]
    classes: dict[str, type] = field(default_factory=dict)
    spread: dict[str, Spread] = field(default_factory=dict)
    own: dict[str, type] = field(default_factory=dict)
    parameters: Targets = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    device: torch.device | str | None = None
    initialise: bool = True
    autocast_adapter_dtype: bool = True

    def dtype(self, site: Site) -> torch.dtype:
        """fp32 for the factors on a half-precision base, unless that is switched off."""
        own = site.weight.compute_dtype
        return torch.float32 if self.autocast_adapter_dtype and own in _HALF else own

    def apply(self) -> None:
        """Do it. If anything fails half-way, what was put in is taken out."""
        if self.inventory.has_traces_of(self.name):
            self.inventory.forget(self.name)  # the model was wrapped before, with an adapter of this name
        try:
            self._put_in()
        except BaseException:
            self._say_what_stays()
            self.inventory.forget(self.name)
            raise

    def _say_what_stays(self) -> None:
        """Warn of base weights that an initialisation has written to, before it failed or was interrupted."""
        begun = [key for key in self.targets if key in self.inventory.layers]
        written = [key for key in begun if self.name in self.inventory.layers[key].adapters][:-1]
        if written and self.initialise and changes_base(self.cfg):
            warn(
                f"Adapter {self.name} was not added, but its initialisation has changed the base weights of "
                f"{enumerate_some(written)} already: load the base model anew.",
                PeftWarning,
            )

    def _put_in(self) -> None:
        inventory = self.inventory
        # a model from a file is in eval mode; dropout acts in training loops that never say train(), as with PEFT
        trains = not inventory.wrapped() and not self.cfg.inference_mode
        for key in self.targets:
            layer = inventory.wrap(key, self._maker(key))
            if trains:
                _start_training(layer, *layer.inside().values())
            source = inventory.layers[embedding_name(inventory)] if key in self.tied else None
            layer.add_adapter(
                self.name, self.method, self.cfg, key,
                dtype=self.dtype(layer.site), device=self.device, initialise=self.initialise, source=source,
            )  # fmt: skip
            if key in self.spread:
                self.spread[key].take_apart(layer, self.name)
        for key, names in self.parameters.items():
            for layer in inventory.wrap_parameters(key, names):
                if trains:
                    _start_training(layer)
                layer.add_adapter(
                    self.name, self.method, self.cfg, f"{key}.{layer.site.parameter}",
                    dtype=self.dtype(layer.site), device=self.device, initialise=self.initialise,
                )  # fmt: skip
        for key, cls in self.own.items():
            add_to_own_layer(inventory, key, cls, self.name, self.cfg, self.device, trains)
        self._add_saved()
        self._add_tokens()

    def _maker(self, key: str) -> Callable[[nn.Module], BaseTunerLayer]:
        """What makes the layer around the module `key`."""
        cls = self.classes.get(key)
        return make_layer if cls is None else lambda module: cls(module, self.name, **settings_of(self.cfg, key))

    def _wrapped(self, key: str, kind: type[AuxiliaryTrainingWrapper]) -> Any:
        """The wrapper of a module that trains beside the adapters, made where there is none yet."""
        inventory = self.inventory
        wrapper = inventory.extras.get(key)
        if wrapper is None:
            wrapper = kind(inventory.module(key))
            with modes_kept(wrapper.original_module):
                wrapper.train(wrapper.original_module.training)
            inventory.extras[key] = wrapper
            inventory.replace(key, wrapper)
        return wrapper

    def _add_saved(self) -> None:
        inventory = self.inventory
        for key in self.saved:
            wrapper = self._wrapped(key, ModulesToSaveWrapper)
            tied = None
            if key in self.tied:
                tied = inventory.extras[embedding_name(inventory)].modules_to_save[self.name].weight
            wrapper.update(self.name, tied)

    def _add_tokens(self) -> None:
        from peftfast.methods.trainable_tokens import TrainableTokensConfig

        inventory = self.inventory
        for key, rows in self.tokens.items():
            wrapper = self._wrapped(key, TrainableTokensWrapper)
            source = inventory.extras[embedding_name(inventory)].token_adapter if key in self.tied else None
            cfg = TrainableTokensConfig(token_indices=list(rows))
            dtype = self.dtype(wrapper.token_adapter.site)
            wrapper.add(self.name, cfg, method_for(cfg), dtype=dtype, device=self.device, source=source)


def _start_training(*layers: BaseTunerLayer) -> None:
    """Put layers into training mode, and what will be made in them, but not what is in them."""
    for layer in layers:
        layer.training = True


def plan_injection(
    inventory: Inventory,
    name: str,
    cfg: PeftConfig,
    *,
    strict: bool = False,
    keys: Iterable[str] | None = None,
    modules: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    initialise: bool = True,
    autocast_adapter_dtype: bool = True,
) -> Injection:
    """Decide what adding an adapter means for this model. Resolves the config's targets in place; changes nothing else.

    Args:
        keys: adapt exactly these modules, whatever the config says (they come from a state dict).
        modules: the same without a word about the difference (they come from adapters of this model).
        device: of the new tensors; None: where the base weight is.
        initialise: False when the tensors are about to be loaded.
    """
    model, names, method = inventory.model, list(inventory.names), method_for(cfg)
    by_config = keys is None and modules is None
    heads = tied_module_names(inventory)
    _complete(cfg, model, method, by_keys=keys is not None)
    always = getattr(method, "always_ties", False)
    tied, tied_saved = ([], []) if always else plan_tying(inventory, cfg, heads)
    if tied and not hasattr(method, "tied_slots"):
        raise ValueError(
            f"{enumerate_some(tied)}: an adapter of {cfg.peft_type} is no module's that shares a weight with the input "
            "embedding and is to share the adapter, too. Leave them out of target_modules, or ensure_weight_tying."
        )
    matcher, matched = _match(cfg, model, names, renamed=by_config and not strict)
    if keys is not None:
        matched = _given(inventory, keys, matched)
    if modules is not None:
        matched = list(modules)
    if always and heads and embedding_name(inventory) in matched:
        tied, matched = heads, [n for n in matched if n not in heads]
    endings = tuple(getattr(cfg, "modules_to_save", None) or ())
    saved = [n for n in names if n.endswith(endings)]
    matched = _without_saved(cfg, matched, set(saved))
    matched, parts = plan_attention(inventory, cfg, method, matched, saved)
    rows = getattr(cfg, "trainable_token_indices", None)
    parameters = plan_parameters(inventory, cfg, method, [*matched, *parts], saved)
    wants_none = not cfg.target_modules and not isinstance(cfg.target_modules, str) and (saved or rows)
    if by_config or not (matched or wants_none):
        report_matches(cfg, matcher, matched, names, model, strict, full_names(parameters))
    if getattr(cfg, "target_parameters", None):
        report_parameters(cfg, parameters, inventory, strict)
    refuse_mamba(model, cfg, matched, refused=getattr(method, "refused_by_mamba", True))
    _report_saved(endings, names, strict)
    meta = device is not None and torch.device(device).type == "meta"
    if meta and initialise and changes_base(cfg):
        # the base changes with this initialisation, so it has to take place, and needs values
        device, meta = None, False
    classes, own = own_layer_classes(inventory, cfg, matched)
    in_place = [key for key in matched if key not in own]
    say_read_by_parents(inventory, in_place, parameters)
    _settle_orientation(cfg, _check_sites(inventory, cfg, method, in_place, classes, initialise and not meta))
    if by_config and getattr(method, "condense_targets", True):
        _condense(cfg, matched, names)
    targets = [key for key in dict.fromkeys((*matched, *tied)) if key not in own]
    saved = [*saved, *tied_saved]
    tokens, tied_rows = plan_tokens(inventory, cfg, rows, heads)
    _check_tokens(inventory, tokens, targets, saved)
    _check_wrappers(inventory, saved, ModulesToSaveWrapper)
    _check_wrappers(inventory, tokens, TrainableTokensWrapper)
    spread = plan_spreading(inventory, cfg, method, targets, (*saved, *tokens, *parameters))
    return Injection(
        inventory, name, cfg, method, targets, classes, spread, own, parameters, saved, tokens,
        tied=[*tied, *tied_saved, *tied_rows], device=None if spread else device, initialise=initialise,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )  # fmt: skip


def _complete(cfg: PeftConfig, model: nn.Module, method: AdapterMethod, by_keys: bool) -> None:
    """Fill in, in the config itself, what it leaves to the model.

    Args:
        by_keys: a state dict says which modules are adapted.
    """
    retarget(cfg, model)
    if by_keys and getattr(cfg, "target_parameters", None):
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported -- when using `target_parameters`, please inject the adapter without the state_dict."
        )
    if chooses_targets(method):
        method.choose_targets(cfg, model)
    resolve_targets(cfg, model)
    if hasattr(type(method), "resolve"):
        method.resolve(cfg, model)


def _match(cfg: PeftConfig, model: nn.Module, names: Sequence[str], renamed: bool) -> tuple[Matcher, list[str]]:
    """The config's matcher, and what it matches of a model's modules.

    Args:
        renamed: where that is nothing, look for modules that had these names in earlier releases of transformers.
    """
    matcher = make_matcher(cfg)
    matched = list(filter(matcher, names))
    asked = cfg.target_modules
    if matched or not renamed or not rename_targets(model, cfg, names):
        return matcher, matched
    matcher = make_matcher(cfg)
    matched = list(filter(matcher, names))
    warn(
        f"transformers has renamed what target_modules={asked!r} of a {type(model).__name__} are; adapted are the "
        f"modules that were called so, now {enumerate_some(sorted(name_ends(matched)))}.",
        PeftWarning,
    )
    return matcher, matched


def _given(inventory: Inventory, keys: Iterable[str], matched: Iterable[str]) -> list[str]:
    """The modules that a state dict is for, by the names that they have here; a warning if the config means others.

    Args:
        keys: their names in the state dict. matched: what the config means.

    Raises:
        ValueError: modules that the model does not have.
    """
    names = inventory.names
    live = {strip_wrappers(n): n for n in names}  # files know nothing of compiled and sharded models
    asked = [strip_wrappers(k) for k in keys]
    # what is inside an adapted module is adapted with it
    asked = [k if k in live else k.partition(".base_layer.")[0] for k in asked]
    wanted = list(dict.fromkeys(live.get(k, k) for k in asked))
    unknown = [k for k in wanted if k not in names]
    if unknown:
        raise ValueError(f"The state dict adapts modules that the model does not have: {enumerate_some(unknown)}")
    _say_difference(set(matched), set(wanted))
    return list(filter(set(wanted).__contains__, names))


def _without_saved(cfg: PeftConfig, matched: list[str], saved: Collection[str]) -> list[str]:
    """The matched modules without those that `modules_to_save`, which means the ends of names, trains in full. The
    config is left without targets that then mean nothing, so that every reader of it finds the same."""
    kept = [n for n in matched if n not in saved]
    both = [n for n in matched if n in saved]
    if not both:
        return matched
    warn(
        f"{enumerate_some(both)}: trained in full and not adapted, because their names end with one of modules_to_save "
        f"({cfg.modules_to_save}).",
        PeftWarning,
    )
    if not isinstance(cfg.target_modules, str):
        meant_by = {end for name in kept for end in ends_of(name)}
        idle = {end for name in both for end in ends_of(name)} - meant_by
        cfg.target_modules = set(cfg.target_modules) - idle
    return kept


def _check_tokens(inventory: Inventory, tokens: Collection[str], targets: Sequence[str], saved: Sequence[str]) -> None:
    """Refuse to train rows of what the same adapter trains in another way; a tied head has the embedding's rows."""
    adapted = [key for key in tokens if key in targets]
    if adapted:
        raise TypeError(
            "trainable_token_indices cannot be applied to modules of type "
            f"{type(inventory.module(adapted[0]))} that the same adapter adapts by `target_modules`: "
            f"{enumerate_some(adapted)}. A head that is tied to the embedding has the embedding's rows."
        )
    both = set(tokens) & set(saved)
    if both:
        raise ValueError(
            f"The embedding layer is already marked to be trained fully: {sorted(both)} cannot be in modules_to_save "
            "and in trainable_token_indices, or share the weight of what is, at once"
        )
    for key in tokens:
        layer = inventory.layers.get(key)
        if layer is not None:
            raise ValueError(
                f"Rows of {key} are in trainable_token_indices of this adapter, but {sorted(layer.adapters)} adapt it "
                "in whole: a module can be trained in one of these ways only, in all adapters of a model. A head that "
                "is tied to the embedding has the embedding's rows."
            )


def _check_wrappers(inventory: Inventory, keys: Iterable[str], kind: type[AuxiliaryTrainingWrapper]) -> None:
    """Refuse two ways of training one module beside the adapters."""
    fields = {ModulesToSaveWrapper: "modules_to_save", TrainableTokensWrapper: "trainable_token_indices"}
    for key in keys:
        present = inventory.extras.get(key)
        if present is not None and not isinstance(present, kind):
            raise ValueError(
                f"{key} is in {fields[kind]} of this adapter and in {fields.get(type(present), 'target_modules')} of "
                f"{sorted(present._adapters)}: a module can be trained in one of these ways only, in all adapters of a "
                "model"
            )


def _report_saved(endings: Sequence[str], names: Sequence[str], strict: bool) -> None:
    """Say, or with `strict` refuse, what of `modules_to_save` matches nothing, but for heads that a task asks for."""
    missing = [s for s in endings if not any(n.endswith(s) for n in names)]
    if missing and not set(missing) <= {"classifier", "score", "qa_outputs"}:
        hint = close_matches(missing[0], name_ends(names))
        say_misfits([f"modules_to_save: {missing} matched no module.{hint}"], strict)


def _condense(cfg: PeftConfig, matched: Sequence[str], names: Sequence[str]) -> None:
    """Store a long list of targets as the shortest suffixes that mean the same."""
    targets = cfg.target_modules
    is_long = isinstance(targets, (set, list)) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION
    if is_long and not getattr(cfg, "layers_to_transform", None):
        cfg.target_modules = shortest_suffixes(matched, names)


def _say_difference(by_config: set[str], by_state: set[str]) -> None:
    if by_config == by_state:
        return
    message = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. This is not necessarily an issue and can be ignored if this was the intent. "
    )
    if by_config - by_state:
        message += f"The PEFT config contained these additional target modules: {sorted(by_config - by_state)}. "
    if by_state - by_config:
        message += f"The state_dict contained these additional target modules: {sorted(by_state - by_config)}. "
    warn(message, RuntimeWarning)


def _check_sites(
    inventory: Inventory,
    cfg: PeftConfig,
    method: AdapterMethod,
    keys: Iterable[str],
    classes: Mapping[str, type],
    initialise: bool,
) -> list[bool]:
    """Ask every target whether it can carry this adapter; answers which ones store their weight transposed."""
    transposed, unknown_to_peft = [], []
    check_init = getattr(method, "check_init", None) if initialise else None
    for key in keys:
        module = inventory.module(key)
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{key} is kept by modules_to_save or trainable tokens of another adapter; it cannot be adapted"
            )
        try:
            site = site_of(module, classes.get(key))
            site.weight.name = key  # as refusals call it
            settings = method.settings(site, cfg, key)
            method.slots(site, cfg, settings)
            if check_init is not None and site.weight.device.type != "meta":
                check_init(site, cfg, settings)
        except (TypeError, ValueError) as e:
            kind = TypeError if isinstance(e, TypeError) else ValueError
            raise kind(f"{key}: {e}") from e
        if getattr(cfg, "lora_bias", False) and bias_of(site.module) is None:
            warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(site.module).__name__} has no bias. "
                "This means that merging LoRA weights won't be possible.",
                PeftWarning,
            )
        if isinstance(site.module, nn.Linear) or site.weight.transposed:
            transposed.append(site.weight.transposed)
        if not site.in_peft:
            unknown_to_peft.append(key)
    if unknown_to_peft:
        kinds = {type(inventory.base_module(key)).__name__ for key in unknown_to_peft}
        warn(
            f"PEFT has no adapters of {', '.join(sorted(kinds))} ({enumerate_some(unknown_to_peft)}), so it will not "
            "load this one. Once it is merged, the model is as any other.",
            PeftWarning,
        )
    return transposed


def _settle_orientation(cfg: PeftConfig, transposed: list[bool]) -> None:
    """`fan_in_fan_out` follows from the modules; a config that says otherwise is corrected, with a word."""
    if not hasattr(cfg, "fan_in_fan_out") or not transposed:
        return
    if cfg.fan_in_fan_out and not any(transposed):
        warn(
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False."
        )
        cfg.fan_in_fan_out = False
    elif not cfg.fan_in_fan_out and all(transposed):
        warn("fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.")
        cfg.fan_in_fan_out = True
