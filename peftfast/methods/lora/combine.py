"""Several LoRAs as one: on the factors, by concatenation, or on the products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.devices import widest
from peftfast.methods.combination import Combination, split_weight
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
    configs = [a.cfg for layers in adapters for a in layers]
    plain["lora_bias"] = any(c.lora_bias for c in configs)
    if any(c.target_parameters for c in configs):
        plain["lora_dropout"] = 0.0  # has no meaning for a Parameter, and no config may say it of one
    return {"r": rank, "lora_alpha": rank, **plain}  # an init that changes the base must not run again


def combined(
    site: Site,
    adapters: Sequence[Adapter],
    pairs: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[float],
    how: Combination,
    rank: int,
) -> dict[str, Tensor]:
    """The result's factors at one site, of `rank`; what they have less is zero. Each matrix of a stack (`Site.split`)
    is combined by itself.

    Args:
        pairs: down and up factor of every adapter.
    """
    down, up = adapters[0].pair
    pairs = [tuple(f.detach() for f in pair) for pair in pairs]
    # in the factors' own precision, or fp32 where that is less
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    first = pairs[0]
    pairs = [site.split(a.to(wide), b.to(wide)) for a, b in pairs]
    strengths = [w * float(a.scale) for a, w in zip(adapters, weights, strict=True)]
    result = {}
    groups = site.groups
    if how.kind == "cat":
        # each group of a convolution has its run of ranks, in which all adapters' ranks for it come together
        parts = [(a * s).unflatten(1, (groups, -1)) for (a, _), s in zip(pairs, strengths, strict=True)]
        a = torch.cat(parts, dim=2).flatten(1, 2)
        b = torch.cat([b for _, b in pairs], dim=2)
    elif how.on_products:
        site.delta(*(f.to("meta") for f in first))  # raises where the product is no weight
        a, b = _decomposed(adapters, weights, pairs, strengths, how)
    else:
        most = max(a.shape[1] for a, _ in pairs)
        each = [split_weight(s) for s in strengths]
        a = how.combine([padded(a, 1, most, groups) for a, _ in pairs], [d for d, _ in each])
        b = how.combine([padded(b, 2, most // groups) for _, b in pairs], [u for _, u in each])
    a, b = padded(a, 1, rank, groups), padded(b, 2, rank // groups)
    result[down], result[up] = site.joined(a, b)
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
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    pairs: Sequence[tuple[Tensor, Tensor]],
    strengths: Sequence[float],
    how: Combination,
) -> tuple[Tensor, Tensor]:
    rank = how.svd_rank or max(a.shape[1] for a, _ in pairs)
    flat = [(a.flatten(2), b.flatten(2)) for a, b in pairs]
    if how.kind == "svd" and how.svd_clamp is None and how.svd_driver is None:
        vh, u = _cut(*svd_of_sum(flat, strengths), rank)
    else:  # one after the other: the products of a stack together are as large as the weights
        scales = [float(adapter.scale) for adapter in adapters]
        each = []
        for part in range(flat[0][0].shape[0]):
            scaled = [(b[part] @ a[part]).unsqueeze(0) * s for (a, b), s in zip(flat, scales, strict=True)]
            total = how.combine(scaled, weights).squeeze(0)
            found = torch.linalg.svd(total, full_matrices=how.svd_full_matrices, driver=how.svd_driver)
            each.append(_cut(*found, rank, how.svd_clamp))
        vh, u = (torch.stack(t) for t in zip(*each, strict=True))
    a, b = pairs[0]
    return vh.reshape(*vh.shape[:2], *a.shape[2:]), u.reshape(*u.shape, *b.shape[3:])


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """The down factor [..., r, K] and the up factor [..., N, r] of an SVD, of at most `rank`."""
    s = s[..., :rank]
    u, vh = u[..., : s.shape[-1]] * s.unsqueeze(-2), vh[..., : s.shape[-1], :]
    if clamp is not None:
        high = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), clamp)
        u, vh = u.clamp(-high, high), vh.clamp(-high, high)
    return vh, u


def svd_of_sum(pairs: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of Σ s B A from two thin QR decompositions, for a [..., r, K] and b [..., N, r]; its rank is at most the
    sum of the ranks, so nothing of the weight's size is ever made."""
    left = torch.cat([b * s for (_, b), s in zip(pairs, strengths, strict=True)], dim=-1)
    right = torch.cat([a for a, _ in pairs], dim=-2)
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u[..., : s.shape[-1]], s, vh[..., : s.shape[-1], :] @ q2.mT


def rank_keeping(s: Tensor, share: float) -> int:
    """The smallest rank, 1 at least, that keeps `share` of the squared singular values `s`, all of them and the largest
    first."""
    if not len(s):  # AdaLoRA has taken all ranks away
        return 1
    energy = torch.cumsum(s.to(widest(s.device)) ** 2, 0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(s))
