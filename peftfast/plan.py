"""A dry run: what `patch` would do to a model, as an object that prints as a table. Nothing is changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig, require_config, require_flag, require_module
from peftfast.errors import close_matches, every_name, grouped
from peftfast.interop.servers import Facts, Verdict, judge_servers
from peftfast.keys import ends_of
from peftfast.layers.layer import site_of, without_adapters
from peftfast.layers.walk import base_of
from peftfast.model import PeftModel
from peftfast.sharding import whole_shape
from peftfast.sites import Site, bias_of, make_site, parts_of
from peftfast.sites.parameter import ParameterSite
from peftfast.sites.site import is_bias
from peftfast.tasks import model_class
from peftfast.wrapping.adding import check_addable
from peftfast.wrapping.injection import Injection, plan_injection
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.parameters import full_names
from peftfast.wrapping.replication import replicated
from peftfast.wrapping.targets import HINTS, linear_modules, name_ends


@dataclass(frozen=True)
class PlannedTarget:
    """One entry of `target_modules`.

    Attributes:
        name: as in the config. adapted: module names. passed_over: modules of that name that stay as they are.
        near: "Did you mean ...?", where nothing matched.
    """

    name: str
    adapted: tuple[str, ...]
    passed_over: tuple[str, ...] = ()
    near: str = ""

    @property
    def status(self) -> str:
        if not self.adapted:
            return "unmatched"
        return "partly matched" if self.passed_over else "matched"


@dataclass(frozen=True)
class PlannedPart:
    """What becomes trainable at one module: its factors, a copy of it, rows of it, or its bias.

    Attributes:
        rank: None where there is none. parameters: their number. size: their bytes. tensors: how many hold them.
    """

    module: str
    kind: str
    rank: int | None
    parameters: int
    size: int
    tensors: int
    alpha: float | None = None


@dataclass
class AdapterPlan:
    """What `patch(model, config)` would do.

    Attributes:
        refusal: why it would refuse; None if it would not. targets, parts: what is matched, what is trained.
        notes: what it would warn of. servers: what else would load the saved adapter.
        total_parameters: of the base model.
    """

    targets: list[PlannedTarget] = field(default_factory=list)
    parts: list[PlannedPart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    servers: list[Verdict] = field(default_factory=list)
    total_parameters: int = 0
    refusal: str | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank."""
        return {p.module: p.rank for p in self.parts if p.rank is not None}

    @property
    def trainable_parameters(self) -> int:
        return sum(p.parameters for p in self.parts)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the trainable weights, of their gradients, and of what torch's AdamW keeps: two moments, and a step
        count of 4 bytes a tensor. Activations and the base model are not in it."""
        size = sum(p.size for p in self.parts)
        adamw = 2 * size + 4 * sum(p.tensors for p in self.parts)
        return {"weights": size, "gradients": size, "AdamW state": adamw, "together": 2 * size + adamw}

    def __str__(self) -> str:
        rows = [
            (t.name, t.status, f"{len(t.adapted)} of {len(t.adapted) + len(t.passed_over)}{t.near and f'.{t.near}'}")
            for t in self.targets
        ]
        lines = [*_table(("target", "status", "modules"), rows)]
        lines += [
            f"  not adapted by {t.name}: {every_name(t.passed_over)}"
            for t in self.targets
            if t.adapted and t.passed_over
        ]
        if self.refusal is not None:
            return "\n".join([*lines, f"patch would refuse: {self.refusal}", *_notes(self.notes)])
        groups: dict[tuple, list[PlannedPart]] = {}
        for part in self.parts:
            alike = re.sub(r"(?<=\.)\d+(?=\.)", "*", part.module)
            groups.setdefault((alike, part.kind, part.rank, part.parameters), []).append(part)
        rows = [
            (_together(p), kind, "-" if rank is None else str(rank), f"{len(p)}", f"{sum(x.parameters for x in p):,}")
            for (_, kind, rank, _), p in groups.items()
        ]
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        lines += ["", *_table(("module", "trained", "rank", "count", "parameters"), rows), ""]
        base = f"the base's {self.total_parameters:,}"
        lines.append(f"trainable parameters: {self.trainable_parameters:,} ({share:.3f}% of {base})")
        lines.append("bytes: " + ", ".join(f"{name} {size:,}" for name, size in self.memory.items()))
        rows = [(v.server, v.verdict, "; ".join(v.reasons)) for v in self.servers]
        lines += ["", *_table(("saved adapter in", "verdict", "reason"), rows)]
        return "\n".join([*lines, *_notes(self.notes)])


def plan_adapter(
    model: nn.Module,
    config: PeftConfig,
    *,
    strict: bool = False,
    autocast_adapter_dtype: bool = True,
    max_lora_rank: int = 16,
) -> AdapterPlan:
    """What `patch(model, config)` would do; neither model nor config is changed. What initialisations want of weights
    and data is not looked at.

    Args:
        model: a base model, or one with adapters, to which this one would be added.
        strict, autocast_adapter_dtype: as for `patch`.
        max_lora_rank: that vLLM is started with; 16 is its default.

    Raises:
        TypeError: no model, no config. ValueError: a prompt method, which adapts no modules.
    """
    require_module(model)
    require_config(config, "config")
    require_flag(strict, "strict")
    require_flag(autocast_adapter_dtype, "autocast_adapter_dtype")
    if config.is_prompt_learning:
        raise ValueError(f"{type(config).__name__} adapts no modules, there is nothing to plan")
    base = base_of(model)
    cfg = copy.deepcopy(config)
    keep_head = getattr(model_class(cfg), "_keep_head", None)
    if keep_head is not None:
        keep_head(cfg)
    inventory, injection = Inventory(base, {}), None
    plan = AdapterPlan(total_parameters=_count_base(inventory))
    with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
        warnings.simplefilter("always")
        try:
            if isinstance(model, PeftModel):  # whose layers are stacked already
                model.check_type(cfg)
                check_addable(model._tuner.inventory, "planned", cfg)
            else:
                cfg.validate()
                stack.enter_context(replicated(base, cfg))
                inventory = Inventory(base, {})
            injection = plan_injection(
                inventory, "planned", cfg, strict=strict, initialise=False,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
        except (TypeError, ValueError, RuntimeError) as e:
            plan.refusal = str(e)
    plan.notes = list(dict.fromkeys(str(w.message) for w in caught))
    plan.targets = _targets(config, cfg, inventory, injection.targets if injection is not None else ())
    plan.targets += _parameter_targets(cfg, full_names(injection.parameters) if injection is not None else ())
    if injection is None:
        return plan
    plan.parts = [*_factors(injection), *_others(injection)]
    adapted = [p for p in plan.parts if p.rank is not None]
    plan.servers = judge_servers(
        Facts(
            cfg,
            ranks=[p.rank for p in adapted],
            alphas=[p.alpha for p in adapted if p.alpha is not None],
            max_rank=max_lora_rank,
            modules=[p.module for p in adapted],
            saved=_with_parameters(injection),
            tokens=bool(injection.tokens),
            parameters=[name for name, _, site in _sites(injection) if isinstance(site, ParameterSite)],
        )
    )
    return plan


def _count_base(inventory: Inventory) -> int:
    """Parameters of the base model, packed weights by the shape they stand for."""
    own = {id(p): whole_shape(p).numel() for _, p in inventory.base_parameters()}
    for _, module in linear_modules(inventory.model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and id(weight) in own and hasattr(module, "in_features"):
            own[id(weight)] = module.in_features * module.out_features
    return sum(own.values())


def _targets(
    config: PeftConfig, resolved: PeftConfig, inventory: Inventory, adapted: Iterable[str]
) -> list[PlannedTarget]:
    if getattr(resolved, "target_parameters", None) and config.target_modules is not None:
        config = resolved  # what is left of the modules when some have become Parameters
    asked, names, adapted = config.target_modules, list(inventory.names), list(adapted)
    if not asked and getattr(resolved, "target_parameters", None):
        return []
    if asked is None or (isinstance(asked, str) and asked.lower() == "all-linear"):
        name = "default" if asked is None else asked
        if asked is None and isinstance(resolved.target_modules, (set, list)):
            name = f"default: {', '.join(sorted(resolved.target_modules))}"
        return [PlannedTarget(name, tuple(adapted))]
    if isinstance(asked, str):
        try:
            meant = [n for n in names if re.fullmatch(asked, n)]
        except re.error:
            meant = []
        return [PlannedTarget(asked, tuple(adapted), tuple(n for n in meant if n not in set(adapted)))]
    rows, taken, unmatched = [], set(adapted), 0
    meant_by: dict[str, list[str]] = {}
    for name in names:
        for end in ends_of(name):
            meant_by.setdefault(end, []).append(name)
    for target in sorted(asked):
        meant = meant_by.get(target, ())
        near = ""
        if not meant and unmatched < HINTS:
            near, unmatched = close_matches(target, names if "." in target else name_ends(names)), unmatched + 1
        left = tuple(n for n in meant if n not in taken)
        rows.append(PlannedTarget(target, tuple(n for n in meant if n in taken), left, near))
    return rows


def _parameter_targets(resolved: PeftConfig, adapted: Sequence[str]) -> list[PlannedTarget]:
    return [
        PlannedTarget(f"parameter {t}", tuple(n for n in adapted if t in ends_of(n)))
        for t in sorted(getattr(resolved, "target_parameters", None) or ())
    ]


def _sites(injection: Injection) -> Iterator[tuple[str, str, Site]]:
    """What is adapted: its name, the name that the config's patterns are compared with, the site."""
    for key in injection.targets:
        site = site_of(injection.inventory.module(key), injection.classes.get(key))
        yield key, key, site
        yield from ((f"{key}.{part}", key, site.part(part)) for part in parts_of(site.module))
    for key, names in injection.parameters.items():
        module = injection.inventory.base_module(key)
        yield from ((f"{key}.{name}", f"{key}.{name}", ParameterSite(module, name)) for name in names)


def _factors(injection: Injection) -> list[PlannedPart]:
    """What the method keeps at every target."""
    parts = []
    for name, key, site in _sites(injection):
        settings = injection.method.settings(site, injection.cfg, key)
        slots = injection.method.slots(site, injection.cfg, settings)
        shapes = [
            shape
            for slot_name, slot in slots.items()
            # the factors of a tied head are the embedding's
            if slot.trainable and not (key in injection.tied and slot_name in ("lora_A", "lora_B"))
            for shape in ([slot.shape] if slot.holder is None else slot.parameters().values())
        ]
        rank = settings.get("r")
        kind = getattr(injection.method, "family", injection.method.peft_type)
        parts.append(_part(name, kind, shapes, injection.dtype(site), rank, settings.get("lora_alpha")))
    return parts


def _others(injection: Injection) -> list[PlannedPart]:
    """Copies of modules, rows of embeddings, biases of the base."""
    inventory, parts = injection.inventory, []
    for key in injection.saved:
        module = without_adapters(inventory.module(key))
        own = [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]
        own = [p for n, p in own if not (key in injection.tied and n == "weight")]
        parts.append(_sum(key, "copy", own))
    for key, rows in injection.tokens.items():
        if key in injection.tied:
            continue
        site = make_site(without_adapters(inventory.module(key)))
        parts.append(_part(key, "rows", [(len(rows), site.weight.shape[1])], injection.dtype(site)))
    kind = getattr(injection.cfg, "bias", "none")
    adapted = {site.module for _, _, site in _sites(injection)} if kind != "none" else ()
    targets = {id(bias) for module in adapted if (bias := bias_of(module)) is not None}
    kept = tuple(f"{key}." for key in injection.saved)
    for name, parameter in inventory.model.named_parameters() if kind != "none" else ():
        if is_bias(name) and not name.startswith(kept) if kind == "all" else id(parameter) in targets:
            parts.append(_sum(name, "bias", [parameter]))
    return parts


def _with_parameters(injection: Injection) -> list[str]:
    """What of the modules that are saved whole has Parameters of its own."""
    names = (
        f"{key}.{name}".rpartition(".")[0]
        for key in injection.saved
        for name, _ in without_adapters(injection.inventory.module(key)).named_parameters()
    )
    return list(dict.fromkeys(names))


def _part(
    module: str,
    kind: str,
    shapes: Iterable[tuple[int, ...]],
    dtype: torch.dtype,
    rank: int | None = None,
    alpha: float | None = None,
) -> PlannedPart:
    counts = [torch.Size(shape).numel() for shape in shapes]
    return PlannedPart(module, kind, rank, sum(counts), sum(counts) * dtype.itemsize, len(counts), alpha)


def _sum(module: str, kind: str, tensors: Iterable[Tensor]) -> PlannedPart:
    tensors = list(tensors)
    counts = [whole_shape(t).numel() for t in tensors]
    count, size = sum(counts), sum(n * t.itemsize for n, t in zip(counts, tensors, strict=True))
    return PlannedPart(module, kind, None, count, size, len(tensors))


def _together(parts: Sequence[PlannedPart]) -> str:
    """One name for modules that differ in numbers only: `layers.{0-4}.q_proj`."""
    return parts[0].module if len(parts) == 1 else grouped(p.module for p in parts)[0]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"patch would warn: {' '.join(note.split())}" for note in notes]
