"""Models that send every token through some of many LoRAs (`peftfast.methods.lora.arrow`), made of saved adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftfast.config import CONFIG_NAME, require_module
from peftfast.errors import PeftWarning, check_path, enumerate_some, warn
from peftfast.methods.lora.arrow import GENERAL, check_expert
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.settings import ArrowConfig
from peftfast.model import PeftModel
from peftfast.wrapping.undo import unchanged_if_refused

TASK = "task_"
ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """The base model with saved LoRAs as experts ("task_0", "task_1", ...), those of general knowledge ("gks_0", ...)
    and an active router among them, "arrow_router". What is loaded or added later is an expert as well.

    Args:
        base_model: changed in place; unchanged if anything is refused.
        task_specific_adapter_paths: folders or Hub repositories, "user/repo/folder" for a folder in one.
        arrow_config: its names of adapters are filled in.
        general_adapter_paths: the same for general knowledge, where `arrow_config.use_gks` asks for it.
        adapter_kwargs: of `PeftModel.from_pretrained`.

    Raises:
        ValueError: no adapters; adapters of different ranks or for different modules, or that are no plain LoRAs.
        TypeError: adapters of other modules than linear layers; one path instead of a list, another kind of config.
    """
    require_module(base_model)
    for paths in (task_specific_adapter_paths, general_adapter_paths):
        if isinstance(paths, (str, os.PathLike)):
            raise TypeError(f"Adapters are given as a list of folders and Hub repositories, got {paths!r}")
    if not isinstance(arrow_config, ArrowConfig):
        raise TypeError(f"arrow_config must be an ArrowConfig of peftfast, got {arrow_config!r}")
    specific, general = list(task_specific_adapter_paths or ()), list(general_adapter_paths or ())
    if not specific:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    if general and not arrow_config.use_gks:
        warn("general_adapter_paths are not loaded: arrow_config.use_gks is False.", PeftWarning)
        general = []
    tasks = {f"{TASK}{i}": path for i, path in enumerate(specific)}
    knowledge = {f"{GENERAL}{i}": path for i, path in enumerate(general)}
    model: PeftModel | None = None
    with unchanged_if_refused(base_model):
        for name, path in {**tasks, **knowledge}.items():
            source, subfolder = source_of(path)
            options = dict(adapter_kwargs) if subfolder is None else {"subfolder": subfolder, **adapter_kwargs}
            if model is None:
                model = PeftModel.from_pretrained(base_model, source, adapter_name=name, **options)
            else:
                model.load_adapter(source, adapter_name=name, **options)
        assert model is not None
        modules, rank = _common(model, [*tasks, *knowledge])
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(knowledge)
        first = model.peft_config[f"{TASK}0"]
        router = LoraConfig(
            arrow_config=arrow_config, target_modules=modules, r=rank, fan_in_fan_out=first.fan_in_fan_out
        )
        model.add_adapter(ROUTER, router)
        model.set_adapter(ROUTER)
    return model


def source_of(path: str | os.PathLike) -> tuple[str, str | None]:
    """A local folder, or a Hub repository and the folder in it, None for its root.

    Raises:
        ValueError: a local folder without an adapter.
    """
    check_path(path, "An adapter")
    path = os.fspath(path)
    if os.path.isdir(path):
        if not (Path(path) / CONFIG_NAME).is_file():
            raise ValueError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return path, None
    owner, slash, rest = path.strip("/").partition("/")
    if not slash or os.path.isabs(path):
        return path, None
    repository, _, folder = rest.partition("/")
    return f"{owner}/{repository}", folder or None


def _common(model: PeftModel, names: Sequence[str]) -> tuple[list[str], int]:
    """The modules that all of the adapters adapt, by their shortest names, and the rank of all."""
    inventory = model.base_model.inventory
    layers = {name: {k: v for k, v in inventory.layers.items() if name in v.adapters} for name in names}
    wrong = {
        key: layer
        for found in layers.values()
        for key, layer in found.items()
        if not layer.site.gates or layer.site.looks_up
    }
    if wrong:
        kinds = sorted({type(layer.site.module).__name__ for layer in wrong.values()})
        raise TypeError(
            f"LoRA adapters must only target Linear-like layers, as Arrow compares the features of tokens. Found: "
            f"{', '.join(kinds)} ({enumerate_some(wrong)})"
        )
    for name in names:
        for layer in layers[name].values():
            check_expert(layer.adapters[name])
    first, *others = names
    reference = layers[first]
    for name in others:
        if layers[name].keys() != reference.keys():
            odd = sorted(layers[name].keys() ^ reference.keys())
            raise ValueError(
                f"[{name}] target_modules mismatch: it and {first} differ in {enumerate_some(odd)}; experts have to "
                "adapt the same modules"
            )
        for key, layer in reference.items():
            own, other = layer.adapters[name].setting("r"), layer.adapters[first].setting("r")
            if own != other:
                raise ValueError(f"[{name}] rank mismatch: {own} != {other} of {first} at {key}")
    short = sorted({key.rpartition(".")[2] for key in reference})
    matched = {key for key in inventory.names if key.rpartition(".")[2] in short}
    return (short if matched == reference.keys() else sorted(reference)), model.peft_config[first].r
