"""Several LoRAs as one: on the factors, by concatenation, or on the products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.method import Adapter
from peftfast.methods.combination import Combination, split_weight
from peftfast.methods.lora_stack import factor_slots, factors
from peftfast.sites import Site


def combined_fields(adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
    """Fields of the result's config: a scaling of 1, the rank that the kind of combination needs.

    Args:
        adapters: for every adapter, what it is in each layer.
    """
    ranks = [max(a.setting("r") for a in layers) for layers in adapters]
    if how.kind == "cat":
        rank = sum(ranks)
    else:
        rank = how.svd_rank if how.on_products and how.svd_rank else max(ranks)
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    plain["lora_bias"] = any(a.cfg.lora_bias for layers in adapters for a in layers)
    return {"r": rank, "lora_alpha": rank, **plain}  # an init that changes the base must not run again


def combined(site: Site, adapters: Sequence[Adapter], weights: Sequence[float], how: Combination) -> dict[str, Tensor]:
    """The result's factors at one site; with fewer ranks than the slots have, the rest is zero."""
    down, up = factor_slots(adapters[0])
    pairs = [tuple(f.detach() for f in factors(a)) for a in adapters]
    # in the factors' own precision, or fp32 where that is less
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    pairs = [(a.to(wide), b.to(wide)) for a, b in pairs]
    strengths = [w * float(a.scale) for a, w in zip(adapters, weights, strict=True)]
    result = {}
    groups = getattr(site.module, "groups", 1)
    if how.kind == "cat":
        # each group of a convolution has its run of ranks, in which all adapters' ranks for it come together
        parts = [(a * s).unflatten(0, (groups, -1)) for (a, _), s in zip(pairs, strengths, strict=True)]
        a = torch.cat(parts, dim=1).flatten(0, 1)
        b = torch.cat([b for _, b in pairs], dim=1)
    elif how.on_products:
        a, b = _decomposed(site, adapters, weights, pairs, strengths, how)
    else:
        rank = max(a.shape[0] for a, _ in pairs)
        each = [split_weight(s) for s in strengths]
        a = how.combine([padded(a, 0, rank, groups) for a, _ in pairs], [d for d, _ in each])
        b = how.combine([padded(b, 1, rank // groups) for _, b in pairs], [u for _, u in each])
    result[down], result[up] = a, b
    bias = f"{up}.bias"
    if any(bias in adapter for adapter in adapters):
        result[bias] = sum(
            adapter[bias].detach().to(wide) * s
            for adapter, s in zip(adapters, strengths, strict=True)
            if bias in adapter
        )
    return result


def padded(tensor: Tensor, axis: int, size: int, groups: int = 1) -> Tensor:
    """With zeros up to `size` ranks; with `groups`, at the end of each group's ranks."""
    if tensor.shape[axis] == size:
        return tensor
    shape = list(tensor.shape)
    shape[axis : axis + 1] = [groups, size // groups]
    wide = tensor.new_zeros(shape)
    wide.narrow(axis + 1, 0, tensor.shape[axis] // groups).copy_(tensor.unflatten(axis, (groups, -1)))
    return wide.flatten(axis, axis + 1)


def _decomposed(
    site: Site,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    pairs: Sequence[tuple[Tensor, Tensor]],
    strengths: Sequence[float],
    how: Combination,
) -> tuple[Tensor, Tensor]:
    site.delta(*pairs[0])  # raises where the product of the factors is no weight
    rank = how.svd_rank or max(a.shape[0] for a, _ in pairs)
    flat = [(a.flatten(1), b.flatten(1)) for a, b in pairs]
    if how.kind == "svd" and how.svd_clamp is None and how.svd_driver is None:
        u, s, vh = svd_of_sum(flat, strengths)
    else:
        scaled = [(b @ a) * float(adapter.scale) for (a, b), adapter in zip(flat, adapters, strict=True)]
        total = how.combine(scaled, weights)
        u, s, vh = torch.linalg.svd(total, full_matrices=how.svd_full_matrices, driver=how.svd_driver)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    u = u[:, : len(s)] * s
    vh = vh[: len(s)]
    if how.svd_clamp is not None:
        high = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), how.svd_clamp)
        u, vh = u.clamp(-high, high), vh.clamp(-high, high)
    a, b = pairs[0]
    return vh.reshape(-1, *a.shape[1:]), u.reshape(b.shape[0], -1, *b.shape[2:])


def svd_of_sum(pairs: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of Σ s B A from two thin QR decompositions; its rank is at most the sum of the ranks, so nothing of the
    weight's size is ever made."""
    left = torch.cat([b * s for (_, b), s in zip(pairs, strengths, strict=True)], dim=1)
    right = torch.cat([a for a, _ in pairs], dim=0)
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(r1 @ r2.t())
    return q1 @ u[:, : len(s)], s, vh[: len(s)] @ q2.t()
