"""A weight with adapters inside, stored in 4 or 8 bits again.

The values of such a format are further apart than most adapters change a weight. Rounding to the nearest value then
gives the base weight back: the adapter is lost, and the error, small beside the weight, does not show it. Stochastic
rounding (up or down, with the probabilities that make the expected value exact) keeps what an adapter changes. Its
errors are larger, but they point nowhere, while what is lost by rounding to the nearest is exactly what was trained.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from peftfast.base.weight import BaseWeight

ROUNDINGS = ("auto", "nearest", "stochastic")

#: "auto" is "nearest" where so much of the change is kept, and no more than as much too much.
ENOUGH = 0.9

_CHUNK = 1 << 22


@runtime_checkable
class Drawable(Protocol):
    """A format that can be rounded to stochastically."""

    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        """Store `weight` [N, K] with the scales that are there."""
        ...


class Rounded(NamedTuple):
    """What became of a weight: scalars on its device.

    Attributes:
        error: |stored - exact| / |exact|.
        kept: how much of the change is in what is stored: <stored - base, exact - base> / |exact - base|²; 1 is all.
        nearest: what rounding to the nearest would have kept, where it was done otherwise.
    """

    error: Tensor
    kept: Tensor
    nearest: Tensor | None = None


def check_rounding(rounding: str, weight: BaseWeight | None = None) -> None:
    """ValueError for a name that is not among `ROUNDINGS`, or for what the weight's format cannot do."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
    if rounding == "stochastic" and weight is not None and weight.quantization and not isinstance(weight, Drawable):
        raise ValueError(
            f"{weight.name}: rounding='stochastic' is not known for weights stored by {weight.quantization}; "
            "'nearest' and 'auto' are"
        )


@torch.no_grad()
def store(weight: BaseWeight, exact: Tensor, rounding: str = "auto") -> Rounded | None:
    """Store `exact` [N, K] in the place of the weight; None for formats that are not packed, which round by themselves.

    The draws of stochastic rounding follow from the weight's name alone, so that merging again gives the same bits.
    """
    if not weight.quantization:
        weight.assign(exact)
        return None
    base, exact = weight.dense(torch.float32), exact.to(weight.device, torch.float32)
    before = weight.snapshot() if isinstance(weight, Drawable) and rounding != "nearest" else None
    weight.assign(exact)
    rounded = _compare(base, exact, weight.dense(torch.float32))
    if before is None or rounding == "auto" and bool((rounded.kept - 1).abs() <= 1 - ENOUGH):
        return rounded
    weight.restore(before)
    seed = zlib.crc32(weight.name.encode())
    weight.assign_stochastic(exact, torch.Generator(exact.device).manual_seed(seed))
    return _compare(base, exact, weight.dense(torch.float32))._replace(nearest=rounded.kept)


def _compare(base: Tensor, exact: Tensor, stored: Tensor) -> Rounded:
    error = (stored - exact).norm() / exact.norm()
    change = exact - base
    size = change.square().sum()
    kept = (stored.sub_(base)).mul_(change).sum() / size
    return Rounded(error, torch.where(size > 0, kept, 1.0))


def drawn(shares: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices uint8, of the shape of `shares`, of the levels: for every element one of the two around it, the upper
    one with the probability of its share of the way up. What lies outside of the levels becomes the first or last.

    Args:
        levels: ascending, 2 to 256 of them.
    """
    flat = shares.reshape(-1)
    indices = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        x = flat[start : start + _CHUNK]
        upper = torch.bucketize(x, levels, out_int32=True).clamp_(1, len(levels) - 1)
        low, high = levels[upper - 1], levels[upper]
        draws = torch.rand(x.shape, generator=generator, device=x.device)
        indices[start : start + _CHUNK] = upper.sub_((draws.mul_(high.sub_(low)) >= x - low).to(torch.int32))
    return indices.view(shares.shape)
