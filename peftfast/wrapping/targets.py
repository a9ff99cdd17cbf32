"""Which modules a config means: PEFT's matching rules, its table of default targets, and the module graph itself for
architectures that the table does not know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn

from peftfast.config import PeftConfig, plain_name
from peftfast.embeddings import SEQ_CLS_HEAD_NAMES, output_embeddings
from peftfast.errors import (
    AdapterMismatchWarning,
    NoMatchingPeftModuleError,
    PeftWarning,
    close_matches,
    enumerate_some,
    every_name,
    warn,
)
from peftfast.keys import ends_of, starts_of, strip_wrappers
from peftfast.layers.walk import base_modules, name_of, outer_modules
from peftfast.method import method_for
from peftfast.sites.linear import is_linear
from peftfast.wrapping.parents import read_by_parent
from peftfast.wrapping.patterns import END, patterns_of

ALL_LINEAR = "all-linear"
#: A resolved target list of this length or longer is stored as the shortest suffixes that mean the same.
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20

#: For how many targets that match nothing is looked at what is near: a config for a larger model has thousands.
HINTS = 8

_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_MODULES = {"out_proj", "conv1d"}


def compiled(pattern: str, field: str, around: str = "{}") -> re.Pattern[str]:
    """The pattern of a config field, put into `around`; ValueError that names the field if it is no regex."""
    try:
        re.compile(pattern)
        return re.compile(around.format(pattern))
    except re.error as e:
        raise ValueError(f"{field}: {pattern!r} is not a valid regular expression: {e}") from e


@dataclass
class Matcher:
    """The targets of one config, compiled once and asked once per module."""

    targets: str | Sequence[str] | None
    exclude: str | Sequence[str] | None = None
    layers: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    never: Sequence[str] = ()  # modules_to_save: trained in full, so never adapted
    excluded: list[str] = field(default_factory=list)  # what `exclude` kept out
    kept: list[str] = field(default_factory=list)  # what `never` kept out
    hits: Counter = field(default_factory=Counter)  # how many modules each target matched, also those kept out

    def __post_init__(self) -> None:
        self._names = set() if self.targets is None or isinstance(self.targets, str) else set(self.targets)
        self._regex = compiled(self.targets, "target_modules") if isinstance(self.targets, str) else None
        self._exclude_regex = compiled(self.exclude, "exclude_modules") if isinstance(self.exclude, str) else None
        self._excluded_names = set() if self.exclude is None or isinstance(self.exclude, str) else set(self.exclude)
        self._never = set(self.never)
        self._layers = {self.layers} if isinstance(self.layers, int) else set(self.layers or ())
        patterns = self.layers_pattern or ()
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self._layer_index = (
            [compiled(p, "layers_pattern", r"(?:^|.*?\.){}\.(\d+)\.") for p in patterns]
            if patterns
            else [re.compile(r".*?\.[^.]*\.(\d+)\.")]
        )

    def __call__(self, key: str) -> bool:
        matches = self._matches(key)
        if self._is_excluded(key):
            if matches:
                self.excluded.append(key)
            return False
        # by whole parts of the name, wherever they are in it
        if self._never and any(not self._never.isdisjoint(starts_of(end)) for end in ends_of(key)):
            if matches:
                self.kept.append(key)
            return False
        return matches

    def _is_excluded(self, key: str) -> bool:
        if self._exclude_regex is not None:
            return self._exclude_regex.fullmatch(key) is not None
        return not self._excluded_names.isdisjoint(ends_of(key))

    def _matches(self, key: str) -> bool:
        if self._regex is not None:
            return self._regex.fullmatch(key) is not None
        meant_by = self._names.intersection(ends_of(key))
        if not meant_by or (self._layers and key not in meant_by and not self._in_layers(key)):
            return False
        self.hits.update(meant_by)
        return True

    def _in_layers(self, key: str) -> bool:
        for pattern in self._layer_index:
            found = pattern.match(key)
            if found:
                return int(found.group(1)) in self._layers
        return False

    def unmatched(self) -> list[str]:
        """Targets of a list that matched nothing."""
        return sorted(self._names - self.hits.keys())


def name_ends(names: Iterable[str]) -> set[str]:
    """The last parts of modules' names, which is what people write."""
    return {n.rpartition(".")[2] for n in names}


def model_type(model: nn.Module) -> str | None:
    """`config.model_type` of a transformers model, None of any other."""
    config = getattr(model, "config", None)
    value = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return value if isinstance(value, str) else None


def resolve_targets(cfg: PeftConfig, model: nn.Module) -> None:
    """Turn `target_modules` None and "all-linear" into names, in the config itself.

    Raises:
        ValueError: None was given, the method has no default for this model, and the module graph suggests nothing.
    """
    targets = cfg.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        cfg.target_modules = set(all_linear(model, cfg))
    elif targets is None:
        row = method_for(cfg).default_targets.get(model_type(model))
        if row is not None:
            cfg.target_modules = row if isinstance(row, str) else set(row)
            return
        if getattr(cfg, "target_parameters", None):
            return  # only those are meant
        found = discover_targets(model)
        if not found:
            linear = sorted(name_ends(name for name, _ in linear_modules(model)))
            raise ValueError(
                "Please specify `target_modules` in `peft_config`: there is no default for model type "
                f"{model_type(model)!r} and its module graph has no repeated block of linear layers to choose from. "
                f"Linear layers it has: {enumerate_some(linear)}"
            )
        cfg.target_modules = set(found)
        warn(
            f"No default target modules are known for model type {model_type(model)!r}; chose {sorted(found)} from its "
            "module graph. Pass `target_modules` to choose yourself.",
            PeftWarning,
        )
    elif not isinstance(targets, str):
        cfg.target_modules = type(targets)(strip_wrappers(name) for name in targets)  # as a compiled model lists them


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer, without those inside adapters or kept copies."""
    for name, module in outer_modules(model, _has_adapters):
        # an adapted layer counts as the linear layer it was
        base = getattr(module, "base_layer", None) if _has_adapters(module) else module
        if base is not None and is_linear(base):
            yield name, base


def _has_adapters(module: nn.Module) -> bool:
    """Whether this is a layer of adapters or a wrapper of copies, ours or PEFT's; a model may have a module called
    base_layer itself."""
    return hasattr(module, "adapter_layer_names") or hasattr(module, "adapter_state_dict_load_map")


def linear_targets(model: nn.Module, cfg: PeftConfig) -> dict[str, nn.Module]:
    """The linear layers that a config means, by name; what it leaves to the model is resolved in place.

    Raises:
        ValueError: there are none.
    """
    asked = cfg.target_modules
    resolve_targets(cfg, model)
    matcher = make_matcher(cfg)
    found = {name: module for name, module in linear_modules(model) if matcher(name)}
    if not found:
        raise ValueError(
            f"No supported layers found: target_modules={asked!r} match no linear layer of {type(model).__name__}"
        )
    return found


def all_linear(model: nn.Module, cfg: PeftConfig) -> list[str]:
    """Full names of all linear layers except the output head: that module, not others whose names end like its."""
    names = [name for name, _ in linear_modules(model)]
    head = output_embeddings(model)
    if head is None and getattr(cfg, "task_type", None) == "SEQ_CLS":
        head = next((getattr(model, h) for h in SEQ_CLS_HEAD_NAMES if getattr(model, h, None) is not None), None)
    head_name = name_of(model, head)
    return [n for n in names if n != head_name]


_QUERY_OR_VALUE = re.compile(r"(^|_)(q|v|query|value|qv)(_|$|proj|lin)|qkv|query_key_value|Wqkv|in_proj|c_attn", re.I)


def discover_targets(model: nn.Module) -> list[str]:
    """Targets from the graph alone: among the linear layers of the repeated blocks that are called (WavLM's attention
    reads the weights of its projections), the query and value projections of attention where names tell them, else all
    of them."""
    blocks = {name for name, module in base_modules(model) if isinstance(module, (nn.ModuleList, nn.Sequential))}
    repeated: Counter = Counter()
    for name, _ in linear_modules(model):
        block = next((start for start in reversed(starts_of(name)) if start in blocks), None)
        if block is not None and not read_by_parent(model, name):
            tail = name[len(block) + 1 :].partition(".")[2]
            if tail:
                repeated[tail] += 1
    often = [tail for tail, count in repeated.items() if count > 1] or list(repeated)
    suffixes = {tail.rpartition(".")[2] for tail in often}
    # names like "0" or "dense" say too little on their own; keep the parent in front
    attention = {t for t in often if _QUERY_OR_VALUE.search(t.rpartition(".")[2])}
    if attention:
        return sorted({t.rpartition(".")[2] for t in attention})
    return sorted(often if any(s.isdigit() or s == "dense" for s in suffixes) else suffixes)


def make_matcher(cfg: PeftConfig) -> Matcher:
    """The matcher of a config whose targets are resolved."""
    return Matcher(
        cfg.target_modules,
        getattr(cfg, "exclude_modules", None),
        getattr(cfg, "layers_to_transform", None),
        getattr(cfg, "layers_pattern", None),
        tuple(getattr(cfg, "modules_to_save", None) or ()),
    )


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether a config whose targets are resolved adapts a module of this name, under PEFT's name for the question."""
    return make_matcher(config)(key)


def report_matches(
    cfg: PeftConfig,
    matcher: Matcher,
    matched: Sequence[str],
    names: Iterable[str],
    model: nn.Module,
    strict: bool,
    parameters: Sequence[str] = (),
) -> None:
    """Refuse a config that matched nothing; say what part of one matched nothing.

    Args:
        names: of the model's modules. matched: of those, the adapted ones. parameters: those adapted by themselves.

    Raises:
        NoMatchingPeftModuleError: nothing matched. ValueError: with `strict`, also for what would be a warning.
    """
    names = list(names)
    targets = cfg.target_modules
    if not matched and not parameters:
        _refuse_unmatched(cfg, matcher, names, model)
    complaints = []
    if targets and not matched:
        warn(f"target_modules={targets} were set but no module was matched.", RuntimeWarning)
    elif getattr(cfg, "target_parameters", None) and not parameters:
        warn(f"target_parameters={cfg.target_parameters} were set but no parameter was matched.", RuntimeWarning)
    layers = getattr(cfg, "layers_to_transform", None)
    unmatched = matcher.unmatched()
    for target in unmatched[:HINTS]:
        if layers is not None and any(target in ends_of(name) for name in names):
            complaints.append(f"target_modules: {target!r} matched no module in layers_to_transform={layers}.")
            continue
        known = name_ends(names) if "." not in target else set(names)
        hint = _in_a_list(target, names) or close_matches(target, known)
        complaints.append(f"target_modules: {target!r} matched no module.{hint}")
    if len(unmatched) > HINTS:
        complaints.append(f"target_modules: {every_name(unmatched[HINTS:])} matched no module.")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = tuple(getattr(cfg, name, None) or ())
        for key in patterns:
            compiled(key, name, END)
        used = {place for m in (*matched, *parameters) for place in patterns_of(patterns).matching(m)}
        unused = [key for place, key in enumerate(patterns) if place not in used]
        if unused and name == "rank_pattern" and isinstance(next(iter(cfg.rank_pattern.values())), (list, tuple)):
            continue  # AdaLoRA keeps masks under parameter names here
        if unused:
            message = f"The following {name} keys did not match any targeted module and were ignored: {unused}"
            if strict:
                raise ValueError(message)
            warn(message, RuntimeWarning)
    if getattr(cfg, "exclude_modules", None) and not matcher.excluded:
        complaints.append(
            f"You have passed exclude_modules={cfg.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly."
        )
    say_misfits(complaints, strict)


def say_misfits(complaints: Sequence[str], strict: bool) -> None:
    """Say, or with `strict` refuse, what of a config does not fit the model."""
    if complaints and strict:
        raise ValueError("The config does not fit the model (strict=True):\n  " + "\n  ".join(complaints))
    if complaints:
        warn("\n".join(complaints), AdapterMismatchWarning)


def _refuse_unmatched(cfg: PeftConfig, matcher: Matcher, names: Sequence[str], model: nn.Module) -> NoReturn:
    """NoMatchingPeftModuleError that says why nothing matched."""
    targets = cfg.target_modules
    if not targets:
        raise NoMatchingPeftModuleError(
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
    if matcher.excluded and matcher.unmatched():
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            f"modules and excluded modules: {matcher.unmatched()} of `target_modules` matched no module, and "
            f"`exclude_modules` ({cfg.exclude_modules!r}) excludes {enumerate_some(matcher.excluded)}."
        )
    if matcher.excluded:
        raise NoMatchingPeftModuleError(
            "All modules were excluded. This is likely unintended. Check your `target_modules` "
            f"({targets!r}), `exclude_modules` ({cfg.exclude_modules!r}) and `modules_to_save` configuration."
        )
    if matcher.kept:
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation. This might be caused by a combination of `target_modules` "
            f"and `modules_to_save`: all that {targets!r} matches is inside {list(matcher.never)}, which is "
            "trained in full. Please check both."
        )
    message = f"Target modules {targets} not found in the base model. Please check the target modules and try again."
    if getattr(cfg, "layers_to_transform", None) is not None:
        message += f" Note: You specified 'layers_to_transform': {cfg.layers_to_transform}."
    if getattr(cfg, "layers_pattern", None) is not None:
        message += f" You also specified 'layers_pattern': {cfg.layers_pattern}."
    if isinstance(targets, str):
        hint = _misread(targets, names)
    else:
        known = name_ends(names)
        hint = "".join(_in_a_list(t, names) or close_matches(t, known) for t in sorted(targets)[:HINTS])
    linear = sorted(name_ends(name for name, _ in linear_modules(model)))
    if linear and not hint and getattr(cfg, "layers_to_transform", None) is None:
        hint = f" The linear layers of this model are called {enumerate_some(linear)}."
    raise NoMatchingPeftModuleError(message + hint)


def _misread(targets: str, names: Sequence[str]) -> str:
    """What a string that matches no module is likely to have been meant as."""
    parts = re.split(r"[,|\s]+", targets.strip())
    if name_ends(names).issuperset(parts):
        return f" A string is a regular expression for whole names; modules that end so are a list: {parts!r}."
    part_of = next((n for n in names if re.search(targets, n)), None)
    if part_of is not None:
        return f" A string is a regular expression for whole names, and matches only a part of {part_of!r}."
    return close_matches(targets.lower(), [ALL_LINEAR])


def _in_a_list(target: str, names: Iterable[str]) -> str:
    """What an entry of a list that matches no module should have been outside of it."""
    if target.lower() == ALL_LINEAR:
        return f" {ALL_LINEAR!r} is given as a string, not in a list."
    for pattern in (target, target.replace(".", r"\.").replace("*", ".*")):
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error:
            continue
        if found:
            return (
                " Entries of a list are names or ends of names; a regular expression for whole names is given by "
                f"itself: target_modules={pattern!r}."
            )
    return ""


def refuse_mamba(model: nn.Module, cfg: PeftConfig, matched: Iterable[str], refused: bool = True) -> None:
    """Mamba's fused kernels read some weights directly and would bypass an adapter on them.

    Args:
        refused: as PEFT does with methods like LoRA; others are warned of.
    """
    kind = model_type(model)
    if kind not in _MAMBA_TYPES:
        return
    for name in matched:
        leaf = name.rpartition(".")[2]
        if leaf not in _MAMBA_MODULES:
            continue
        method = f"[PEFT:{plain_name(cfg.peft_type)}] Module '{leaf}'"
        if refused:
            raise ValueError(
                f"{method} is incompatible with Mamba-based models (model_type='{kind}'). Incompatible module found: "
                f"'{name}'."
            )
        warn(
            f"{method} of a Mamba-based model (model_type='{kind}') is adapted; where Mamba's fused kernels run, they "
            f"read its weight themselves, past the adapter. Found: '{name}'.",
            PeftWarning,
        )
        return


def shortest_suffixes(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    """A smallest-first set of suffixes that match all `wanted` names and none of the other `names`; keeps long
    "all-linear" lists readable in the config file."""
    result: set[str] = set()
    wanted = set(wanted)
    ambiguous = {end for name in names if name not in wanted for end in ends_of(name)}
    for name in sorted(wanted, key=lambda n: (n.count("."), n)):
        ends = ends_of(name)
        if result.isdisjoint(ends):
            result.update([end for end in reversed(ends) if end not in ambiguous][:1])
    return result


def set_targets(config: PeftConfig, wanted: Collection[str], names: Iterable[str], short: set[str]) -> None:
    """Let the config's targets be these modules and no others.

    Args:
        names: of all modules. short: how to call the wanted ones, where that means no others.

    Raises:
        ValueError: one is kept whole, by the config's modules_to_save.
    """
    names, only = [n for n in names if n], set(wanted)
    config.target_modules = short
    if set(filter(make_matcher(config), names)) != only:  # a name that another's ends with
        config.target_modules = "|".join(re.escape(n) for n in wanted)
        config.layers_to_transform = config.layers_pattern = None  # which go with lists
    missed = only.difference(filter(make_matcher(config), names))
    if missed:
        raise ValueError(
            f"{enumerate_some(sorted(missed))} would be kept whole as well, because modules_to_save="
            f"{config.modules_to_save} matches by the ends of names"
        )
