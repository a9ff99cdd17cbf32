"""Modules that the model library calls otherwise than when an adapter was saved, as transformers does with those of
many vision and vision-language models: files and configs are read as if they had today's names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.keys import PREFIX, in_base, strip_wrappers
from peftfast.layers.layer import without_adapters
from peftfast.layers.walk import inside
from peftfast.wrapping.patterns import pattern_of, pattern_value
from peftfast.wrapping.targets import Matcher, make_matcher

#: Where in a key the module's name ends and the adapter's tensor begins.
SLOT = re.compile(r"(?:^|\.)(lora_\w+|ia3_l|trainable_tokens_\w+|token_adapter|base_layer)(?:\.|$)")


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """What stands at this name without adapters and wrappers, looked up step by step."""
    module = inside(model)
    for part in name.split("."):
        child = without_adapters(module)._modules.get(part)
        if child is None:
            return None
        module = inside(child)
    return module


def current_names(base: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of names that the model has no module for, those that it has one for under another name today: by the renamings
    that transformers has for the model's own checkpoints."""
    missing = [name for name in dict.fromkeys(names) if module_at(base, name) is None]
    steps = _renamings(inside(base)) if missing else []
    found = {}
    for name in missing:
        weight = f"{name}.weight"
        for step in steps:
            weight = step(weight)
        current = weight.removesuffix(".weight")
        if current != name and module_at(base, current) is not None:
            found[name] = current
    return found


def _renamings(base: nn.Module) -> list[Callable[[str], str]]:
    own = getattr(base, "_checkpoint_conversion_mapping", None) or {}
    steps: list[Callable[[str], str]] = [lambda name: first_renaming(own, name)]
    return steps + [lambda name, step=step: step.rename_source_key(name)[0] for step in _of_transformers(base)]  # type: ignore[misc]


def _of_transformers(base: nn.Module) -> list[Any]:
    if "transformers" not in sys.modules or not hasattr(base, "base_model_prefix"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4
        return []
    return [step for step in get_model_conversion_mapping(base) if isinstance(step, WeightRenaming)]


def former_names(base: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What modules of `base` were called before -> their names, of those that transformers has renamed."""
    back = []
    for step in reversed(_of_transformers(inside(base))):
        with suppress(ValueError, NotImplementedError):  # not all renamings can be undone
            back.append(step.reverse_transform())
    found = {}
    for name in names if back else ():
        weight = f"{name}.weight"
        for step in back:
            weight = step.rename_source_key(weight)[0]
        found[weight.removesuffix(".weight")] = name
    return {old: name for old, name in current_names(base, found).items() if found[old] == name}


def rename_targets(base: nn.Module, config: PeftConfig, names: Iterable[str]) -> bool:
    """Where a config's targets are names that modules of `base` had before, make it name those modules as they are
    called now; False where they are not.

    Args:
        names: of all modules.
    """
    if not config.target_modules or getattr(config, "target_parameters", None):
        return False
    matches, former = make_matcher(config), former_names(base, names)
    adapted = [old for old in former if matches(old)]
    if adapted:
        _rename_in(config, former, adapted)
    return bool(adapted)


def first_renaming(mapping: Mapping[str, str], name: str) -> str:
    """The name with the first pattern that is found in it replaced."""
    for pattern, replacement in mapping.items():
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def renamed(base: nn.Module, config: PeftConfig | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that `base` has today.

    Args:
        config: read with them, changed in place to say the same; None: that of an adapter that is there already.
    """
    bare = {key: in_base(strip_wrappers(key)) for key in tensors}
    owners = {key: _owner(name) for key, name in bare.items()}
    names = current_names(base, (name for name, _ in owners.values() if name))
    if not names:
        return dict(tensors)
    if config is not None and getattr(config, "target_modules", None):
        _rename_in(config, names, list(dict.fromkeys(name for name, adapted in owners.values() if adapted)))
    result = {}
    for key, tensor in tensors.items():
        old = owners[key][0]
        if old in names:
            key = PREFIX * key.startswith(PREFIX) + names[old] + bare[key][len(old) :]
        result[key] = tensor
    return result


def _owner(key: str) -> tuple[str, bool]:
    """The module that a tensor is of, and whether the config's targets are to name it."""
    found = SLOT.search(key)
    if found is None:
        return key.rpartition(".")[0], False
    return key[: found.start()], found[1].startswith(("lora_", "ia3_"))


def _rename_in(config: PeftConfig, names: Mapping[str, str], adapted: list[str]) -> None:
    """Make the config mean, with today's names, what it meant with those of the file.

    Args:
        names: old -> new. adapted: old names of all modules that the file has factors for.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field, None)
        if not pattern:
            continue
        if isinstance(next(iter(pattern.values())), (list, tuple)):  # AdaLoRA's masks, by the names of Parameters
            owners = {key: _owner(key)[0] for key in pattern}
            new = {key.replace(owners[key], names.get(owners[key], owners[key]), 1): pattern[key] for key in pattern}
        else:
            new = pattern_of({names.get(name, name): pattern_value(pattern, name, None) for name in adapted}, None)
        setattr(config, field, new)
    scaled, matches = getattr(config, "feedforward_modules", None), make_matcher(config)
    if getattr(config, "target_parameters", None) or all(matches(names[name]) for name in adapted if name in names):
        return
    config.target_modules = {names.get(name, name) for name in adapted}
    config.exclude_modules = None
    if scaled:
        scales = Matcher(scaled)
        config.feedforward_modules = {names.get(name, name) for name in adapted if scales(name)}
    for field in ("layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)
