"""Arrow: every token is sent through those of a layer's other LoRAs whose changes of the weight have the top right
singular vector most like it (Ostapenko et al., arXiv 2405.11157), if wished without what LoRAs of general knowledge
have (GenKnowSub, aclanthology.org/2025.acl-short.54).

All experts are one product with their down factors side by side, whose ranks are multiplied by the token's
coefficients, and one with their up factors; nothing is computed once per expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.autocast import without_autocast
from peftfast.method import register_method, sample_by_sample
from peftfast.methods.combination import Combination
from peftfast.methods.lora.combine import svd_of_sum
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.lora import Lora
from peftfast.methods.lora.settings import ArrowConfig
from peftfast.methods.lora.stack import Remembered, as_tensor, watch_of
from peftfast.ops.similarity import similarities
from peftfast.sites import Dense, Site
from peftfast.sites.bound import BoundLora

#: How adapters of general knowledge are called, with a number behind; all others are experts.
GENERAL = "gks_"


class _Experts(NamedTuple):
    """A layer's experts together."""

    present: tuple[str, ...]  # all adapters that the layer had
    how: tuple[Any, ...]  # what of the config this depends on
    known: Remembered  # what it was made of
    a: Tensor  # [R, K], R the sum of the ranks
    b: Tensor  # [N, R]
    prototypes: Tensor  # [E, K], of length 1, or 0 for an expert that changes nothing; in fp32 or wider
    scales: Tensor  # [E]
    owner: Tensor  # [R] int64, the expert of every rank


@register_method
class Arrow(Lora):
    """One adapter, the router, whose own factors say nothing: they are there because PEFT's files have them. Experts
    are all other adapters of the layer, also those that are added later, as they are at the time: what is kept of them
    is made again when one was written to or replaced (see `remembered` about writes through `.data`)."""

    variant: ClassVar[str | None] = "arrow_config"
    routed = sample_by_sample
    as_product = None  # type: ignore[assignment]  # what it adds depends on the token
    uncapturable = (
        "it is made of others, which a recording would go on using as they were: call the model, or delete it"
    )

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        if not site.gates or site.looks_up:
            raise TypeError(
                f"arrow_config: {key} is a {type(site.module).__name__}; Arrow compares the features of tokens, which "
                "linear layers have. Leave it out of target_modules"
            )
        return super().settings(site, cfg, key)

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        for router in active:
            experts = _experts(router)
            y = site.adapt(x, y, experts.a, experts.b, 1.0, 0.0, _gate(x, experts, router.cfg.arrow_config))
        return site.base(x) if y is None else y

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """None: what a call does depends on its tokens."""
        return None

    def describe(self, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        how = cfg.arrow_config
        without = ", without general knowledge" * how.use_gks
        return f"sends every token through {how.top_k} of the model's other adapters{without}"

    def for_slot(
        self, site: Site, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        raise ValueError(f"a slot holds a LoRA, this is a router among others (arrow_config, {key})")

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        names = dict.fromkeys(layers[0].name for layers in adapters if layers)
        raise ValueError(
            f"{', '.join(names)}: routers (arrow_config) change no weights of their own that could be combined; "
            "combine the experts"
        )

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        raise RuntimeError(
            f"Cannot merge an active Arrow router adapter. Remove it first. ({adapter.name}: which experts act depends "
            "on the token)"
        )


def is_general(name: str, cfg: ArrowConfig) -> bool:
    """Whether an adapter is of general knowledge."""
    return name in (cfg.gks_adapter_names or ()) or name.startswith(GENERAL) and name[len(GENERAL) :].isdigit()


def check_expert(adapter: Adapter) -> None:
    """ValueError for what cannot be an expert, nor of general knowledge: more than a pair of factors."""
    if type(adapter.method) is not Lora or adapter.cfg.lora_bias:
        raise ValueError(
            f"Arrow's experts are plain LoRAs without lora_bias; {adapter.name} at {adapter.key} is "
            f"{type(adapter.method).__name__}{' with lora_bias' * bool(getattr(adapter.cfg, 'lora_bias', False))}. "
            "Delete it, or the router"
        )


def _gate(x: Tensor, experts: _Experts, cfg: ArrowConfig) -> Tensor:
    """[..., R]: for every rank the coefficient of its expert, scaling included."""
    count = experts.prototypes.shape[0]
    if cfg.top_k > count:
        raise ValueError(f"arrow_config.top_k={cfg.top_k} is more than there are experts, {count}")
    alike = similarities(x, experts.prototypes).abs()  # singular vectors have no sign
    most, where = alike.topk(cfg.top_k, dim=-1)
    weights = torch.softmax(most / cfg.router_temperature, dim=-1)
    coefficients = torch.zeros_like(alike).scatter(-1, where, weights) * experts.scales
    return coefficients.index_select(-1, experts.owner)


def _experts(router: Adapter) -> _Experts:
    cfg = router.cfg.arrow_config
    present, how = tuple(router.others), (cfg.use_gks, tuple(cfg.gks_adapter_names or ()))
    compiling = torch.compiler.is_compiling()  # a graph has no memory: it makes all of this anew
    kept = None if compiling else router.derived.get(("experts", router.name))
    if (
        kept is not None
        and kept.present == present
        and kept.how == how
        and kept.known.watch.holds()
        and not kept.known.wants_grad()
    ):
        return kept
    experts, general = _listed(router, cfg)
    known = Remembered([*experts, *general])
    if known.wants_grad():
        return _made(known, experts, present, how)
    if not compiling:
        known.watch = watch_of([*experts, *general], known.kept, known.scales)
    with torch.inference_mode(False), torch.no_grad():
        made = _made(known, experts, present, how)
    if known.watch is not None:
        router.derived[("experts", router.name)] = made
    return made


def _listed(router: Adapter, cfg: ArrowConfig) -> tuple[list[Adapter], list[Adapter]]:
    """The experts and the adapters of general knowledge.

    Raises:
        ValueError: there are none, or one that is more than a pair of factors.
    """
    others = [a for a in router.others.values() if not isinstance(a.method, Arrow)]
    general = [a for a in others if is_general(a.name, cfg)]
    experts = [a for a in others if a not in general]
    for adapter in [*experts, *general] if cfg.use_gks else experts:
        check_expert(adapter)
    if not experts:
        raise ValueError(
            f"{router.name} has no adapters to choose from at {router.key}. Present: {', '.join(router.others)}"
        )
    if not cfg.use_gks:
        return experts, []
    if not general:
        raise ValueError(
            f"arrow_config.use_gks=True, but there is no adapter of general knowledge at {router.key}. Such are called "
            f"{GENERAL}0, {GENERAL}1, ...; present: {', '.join(router.others)}"
        )
    ranks = {a.name: a.setting("r") for a in [*experts, *general]}
    if len(set(ranks.values())) > 1:
        raise ValueError(f"use_gks=True takes factors from factors, which have to be of one rank, not {ranks}")
    return experts, general


def _made(known: Remembered, experts: Sequence[Adapter], present: tuple[str, ...], how: tuple[Any, ...]) -> _Experts:
    count = len(experts)
    every = list(zip(known.kept[::2], known.kept[1::2], strict=True))
    pairs, general = every[:count], every[count:]
    if general:
        a0, b0 = (torch.stack(factors).mean(0) for factors in zip(*general, strict=True))
        pairs = [(a - a0, b - b0) for a, b in pairs]
    with torch.no_grad():
        prototypes = torch.stack([_prototype(a, b) for a, b in pairs])
    a = torch.cat([a for a, _ in pairs])
    ranks = [len(a) for a, _ in pairs]
    owner = torch.cat([torch.full((r,), e, dtype=torch.int64, device=a.device) for e, r in enumerate(ranks)])
    scales = as_tensor(known.scales[:count], prototypes)
    return _Experts(present, how, known, a, torch.cat([b for _, b in pairs], dim=1), prototypes, scales, owner)


def _prototype(a: Tensor, b: Tensor) -> Tensor:
    """[K]: the top right singular vector of b a, from decompositions of the size of the rank; zeros where that is 0."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with without_autocast(a):
        _, s, vh = svd_of_sum([(a.detach().to(wide), b.detach().to(wide))], [1.0])
    return torch.where(s[0] > 0, vh[0], 0)
