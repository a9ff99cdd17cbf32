"""Targets that name what transformers has fused: `target_modules` for the linear layers that each expert was, read as
the Parameters in which all experts are now, as PEFT reads them, so that a config means the same in both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.keys import ends_of, strip_wrappers
from peftfast.sharding import whole_shape
from peftfast.wrapping.targets import ALL_LINEAR, all_linear, linear_modules, make_matcher, model_type


class Family(NamedTuple):
    """How the names of one family of models changed.

    Attributes:
        fused: Parameter -> the layers whose weights it holds below each other. renamed: layer -> Parameter.
        moved: name of a module in the middle of others -> its name today.
    """

    fused: Mapping[str, Sequence[str]]
    renamed: Mapping[str, str]
    moved: Mapping[str, str] = MappingProxyType({})

    @property
    def parameters(self) -> dict[str, str]:
        """Layer -> the Parameter that it is in, or is."""
        return {**self.renamed, **{old: new for new, layers in self.fused.items() for old in layers}}


#: By the name under which transformers' table of conversions lists the family.
FAMILIES = {
    "mixtral": Family(
        {"gate_up_proj": ("w1", "w3")}, {"w2": "down_proj", "gate": "gate.weight"}, {"block_sparse_moe": "mlp"}
    ),
    "qwen2_moe": Family({"gate_up_proj": ("gate_proj", "up_proj")}, {"down_proj": "down_proj", "gate": "gate.weight"}),
}


def family_of(model: nn.Module) -> Family | None:
    """The family of a transformers model whose experts are fused when it is loaded.

    Raises:
        ImportError: this release of transformers keeps its table elsewhere.
    """
    kind = model_type(model)
    if kind is None:
        return None
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping

    # the table lists followers of a pattern; of those that gave one its name, PEFT converts Mixtral only
    family = FAMILIES.get(kind if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, ""))
    return None if family is None or get_checkpoint_conversion_mapping(kind) is None else family


def retarget_experts(cfg: PeftConfig, model: nn.Module) -> None:
    """Move what `target_modules` says of fused layers to `target_parameters`, in the config itself; a fused Parameter
    gets the sum of its layers' ranks, and alphas to go with it. Done again, it changes nothing.

    Raises:
        ValueError: only some of the layers that are fused are targeted, or what is fused is not known.
    """
    if cfg.target_modules is None and not cfg.target_parameters:
        return  # defaults, which are chosen for the model as it is
    try:
        family = family_of(model)
    except ImportError as e:
        _refuse_if_fused(cfg, model, e)
        return
    if family is None:
        return
    before = make_matcher(cfg)
    targets = cfg.target_modules
    if isinstance(targets, str):
        targets = _leaves(cfg, model, family)
        if not targets:
            return  # matches nothing, which is said where all targets are looked up
        if cfg.target_modules.lower() == ALL_LINEAR:
            everything = set(all_linear(model, cfg))
            before = everything.__contains__
    asked = family.parameters.keys() & {end for t in targets or () for end in ends_of(t)}
    ranks, alphas = dict(cfg.rank_pattern or {}), dict(cfg.alpha_pattern or {})
    for parameter, layers in family.fused.items():
        present = asked.intersection(layers)
        if present and len(present) < len(layers):
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(present))} without also targeting "
                f"{', '.join(sorted(set(layers) - present))} because they are fused into {parameter}."
            )
        if present:
            pattern = rf".*\.{re.escape(parameter)}"
            ranks[pattern], alphas[pattern] = cfg.r * len(layers), cfg.lora_alpha * len(layers)
    cfg.rank_pattern, cfg.alpha_pattern = ranks, alphas
    cfg.target_parameters = {*(cfg.target_parameters or ()), *(family.parameters[name] for name in asked)}
    cfg.target_modules = {t for t in targets or () if family.parameters.keys().isdisjoint(ends_of(t))}
    _say_what_is_left_out(cfg, model, [n for n, _ in linear_modules(model) if before(n)])


def _say_what_is_left_out(cfg: PeftConfig, model: nn.Module, meant: Sequence[str]) -> None:
    """Dense layers and shared experts have linear layers of the same names, which PEFT does not adapt either."""
    after = make_matcher(cfg)
    left = [name for name in meant if not after(name)]
    if left:
        warn(
            f"On models of type {model_type(model)!r}, names in target_modules mean the experts' layers that "
            f"{enumerate_some(left)} share them with; these linear layers are not adapted. To adapt them, name their "
            f"weights in target_parameters, for example {'.'.join(left[0].split('.')[-2:])}.weight.",
            PeftWarning,
        )


def _names(model: nn.Module) -> Iterator[str]:
    """Names of modules and Parameters as they are without adapters."""
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        yield strip_wrappers(name).replace(".base_layer", "")


def _leaves(cfg: PeftConfig, model: nn.Module, family: Family) -> set[str]:
    """The last parts of the names that a regex or "all-linear" means, among them those of layers that are fused."""
    if cfg.target_modules.lower() == ALL_LINEAR:
        return {name.rpartition(".")[2] for name in all_linear(model, cfg)} | set(family.parameters)
    matcher = make_matcher(cfg)
    names = list(_names(model))
    found = {name.rpartition(".")[2] for name in names if matcher(name)}
    for old, new in family.parameters.items():
        owners = (name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == new)
        if any(matcher(f"{owner}.{old}") for owner in owners):
            found.add(old)
    return found


def _refuse_if_fused(cfg: PeftConfig, model: nn.Module, reason: ImportError) -> None:
    """Without the table nobody knows what the names of fused layers mean, unless they are plain layers here."""
    known = {old for family in FAMILIES.values() for old in family.parameters if old != "gate"}
    targets = cfg.target_modules
    named = isinstance(targets, str) or any(t.rpartition(".")[2] in known for t in targets or ())
    fused = [
        n
        for n, p in model.named_parameters()
        if len(whole_shape(p)) == 3 and n.endswith((".gate_up_proj", ".down_proj"))
    ]
    if named and fused:
        raise ValueError(
            f"target_modules={targets!r} may mean layers that are fused in this model ({enumerate_some(fused)}), and "
            f"which they are this release of transformers does not say ({reason}). Name the Parameters themselves: "
            "target_parameters=['experts.gate_up_proj', 'experts.down_proj'], with target_modules as a list of the "
            "other layers' names, [] for none."
        )
