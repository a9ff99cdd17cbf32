"""From changes of weights to a LoRA's config and tensors, as files have them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from peftfast.base.dense import was_conv1d
from peftfast.config import PeftConfig
from peftfast.devices import forked, widest
from peftfast.keys import PREFIX
from peftfast.methods.lora.combine import padded, rank_keeping
from peftfast.methods.lora.config import LoraConfig
from peftfast.sites import Site
from peftfast.wrapping.patterns import pattern_of

logger = logging.getLogger("peftfast.extraction")

#: Fields that say which modules an adapter is in, and what else of the model it keeps.
_WHERE = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication",
    "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "revision", "task_type",
)  # fmt: skip


#: Weights from this size on are decomposed as far as a small rank needs: all of it takes a CPU minutes a weight.
LARGE = 512
ITERATIONS = 8


class Svd(NamedTuple):
    """u [N, q], s [q], vh [q, K] with u diag(s) vh the change of a weight, or its largest part."""

    u: Tensor
    s: Tensor
    vh: Tensor
    energy: Tensor  # of the whole change: the sum of its squared singular values


class Change(NamedTuple):
    """What is to become factors in one module."""

    name: str  # of the module in the base model
    site: Site
    svd: Svd
    dtype: torch.dtype  # of the factors
    bias: Mapping[str, Tensor]  # of the up factor's module, by slot


def check_rank(rank: int | float) -> int | float:
    """The rank, or share, as a number of Python's own. TypeError for what is none, ValueError for what cannot be."""
    if isinstance(rank, bool) or not isinstance(rank, Real):
        raise TypeError(f"rank must be an int, or a float in (0, 1], got {rank!r} of type {type(rank).__name__}")
    rank = int(rank) if isinstance(rank, Integral) else float(rank)
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if rank < 0:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return rank


def matrix(site: Site, stored: Tensor) -> Tensor:
    """What is in the layout of the site's weight, of a packed one in that before it was, as a matrix [N, K]; of another
    size, as it is."""
    shape = site.weight.shape
    if stored.numel() != shape[0] * shape[1]:
        return stored
    return stored.t() if was_conv1d(site.module) else site.weight.as_matrix(stored)


def energy_of(s: Tensor) -> Tensor:
    """The sum of squares of singular values."""
    return (s.to(widest(s.device)) ** 2).sum()


def svd(change: Tensor, rank: int | float) -> Svd:
    """All of a change [N, K], or for a rank that is small beside it twice that many directions, by subspace iteration
    (Halko et al., arXiv 0909.4061). What those leave is at most 0.1 % more than what the best leave, also of noise."""
    energy = energy_of(torch.linalg.vector_norm(change))
    least = min(change.shape)
    if isinstance(rank, float) or least < LARGE or 8 * rank > least:
        return Svd(*torch.linalg.svd(change, full_matrices=False), energy)
    with forked(change.device, 0):
        u, s, v = torch.svd_lowrank(change, q=2 * rank, niter=ITERATIONS)
    return Svd(u, s, v.mT, energy)


def as_lora(
    changes: Iterable[Change], rank: int | float, cfg: PeftConfig | None, limited: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors. `limited`: ranks are at most what a weight can have."""
    general = rank if isinstance(rank, int) else 1
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    kept: list[float] = []
    biased = False
    for name, site, (u, s, vh, energy), dtype, bias in changes:
        most = min(site.weight.shape)
        r = rank_keeping(s, rank) if isinstance(rank, float) else min(rank, most) if limited else rank
        kept.append(float(energy_of(s[:r]) / energy) if energy else 1.0)
        pair = (padded(vh[:r], 0, r), padded(u[:, :r] * s[:r], 1, r))
        for (slot_name, slot), factor in zip(site.low_rank_slots(r).items(), pair, strict=True):
            key = f"{PREFIX}{name}.{slot_name}" + (".weight" if slot.holder is not None else "")
            tensors[key] = factor.reshape(slot.shape).to(dtype).contiguous()
        for slot, value in bias.items():
            biased = True
            tensors[f"{PREFIX}{name}.{slot}"] = value.detach().to(dtype)
        ranks[name] = r
    if kept:
        logger.info("peftfast: %d modules, %.4f to %.4f of the change kept", len(kept), min(kept), max(kept))
    pattern = pattern_of(ranks, None if isinstance(rank, float) else general)
    fields = {} if cfg is None else {n: getattr(cfg, n) for n in _WHERE if getattr(cfg, n, None) is not None}
    config = LoraConfig(
        r=general, lora_alpha=general, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_bias=biased, **fields
    )
    return config, tensors
