"""A weight with adapters inside, stored in 4, 8 or 16 bits again.

The values of 4-bit formats are further apart than most adapters change a weight, those of bf16 than many do. Rounding
to the nearest value then gives the base weight back: the adapter is lost, and the error, small beside the weight, does
not show it. Stochastic rounding (Gupta et al., arXiv 1502.02551: up or down, with the probabilities that make the
expected value exact) keeps what an adapter changes. Its errors are larger, but they point nowhere, while what is lost
by rounding to the nearest is exactly what was trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfast.base.weight import BaseWeight
from peftfast.sharding import is_distributed
from peftfast_kernels.op import row_chunks

ROUNDINGS = ("auto", "nearest", "stochastic")

#: "auto" is "nearest" where so much of the change is kept, and no more than as much too much.
ENOUGH = 0.9

_CHUNK = 1 << 22
#: Of a weight of 16 bits, whose figures decide and are told to nobody, one in so many chunks is looked at, and in no
#: step with heads.
_SAMPLED = 5


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
    if rounding == "stochastic" and weight is not None and weight.quantization and not weight.draws:
        raise ValueError(
            f"{weight.name}: rounding='stochastic' is not known for weights stored by {weight.quantization}; "
            "'nearest' and 'auto' are"
        )


@torch.no_grad()
def store(weight: BaseWeight, exact: Tensor, rounding: str = "auto") -> Rounded | None:
    """Store `exact` [N, K] in the place of the weight; None where that rounds too little to be looked at.

    The draws of stochastic rounding follow from the weight's name alone, so that merging again gives the same bits.
    Weights that are spread over processes are rounded to the nearest.

    Raises:
        RuntimeError: such a weight was to be rounded stochastically; nothing was written.
    """
    if not (weight.draws or weight.quantization) or is_distributed(exact):
        if weight.draws and rounding == "stochastic":
            raise RuntimeError(f"{weight.name} is spread over processes, where rounding='stochastic' is not known")
        weight.assign(exact)
        return None
    exact = exact.to(weight.device)
    as_kept = exact.t() if weight.transposed else exact
    chunks = _looked_at(as_kept, 1 if weight.quantization else _SAMPLED)
    base = [rows if weight.quantization else rows.clone() for rows in _rows(weight, chunks)]
    draws = weight.draws and rounding != "nearest"
    before = weight.snapshot() if draws and weight.quantization else None  # whose scales are drawn with
    weight.assign(exact)
    rounded = _compare(base, as_kept, weight, chunks)
    lost = (rounded.kept - 1).abs() > 1 - ENOUGH  # not where infinities make it NaN, which are to stay
    if not draws or rounding == "auto" and not bool(lost):
        return rounded
    if before is not None:
        weight.restore(before)
    seed = zlib.crc32(weight.name.encode())
    weight.assign_stochastic(exact, torch.Generator(exact.device).manual_seed(seed))
    return _compare(base, as_kept, weight, chunks)._replace(nearest=rounded.kept)


def _looked_at(exact: Tensor, every: int) -> list[slice]:
    """Chunks of rows that stay in a cache; of large weights, one in `every`."""
    chunks = list(row_chunks(*exact.shape, 1 << 16, exact.device))
    return chunks[:: every if len(chunks) > 2 * every else 1]


def _rows(weight: BaseWeight, chunks: Iterable[slice]) -> list[Tensor]:
    """As they lie in memory, where a copy of some is one of what is together."""
    seen = weight.seen()
    seen = seen.t() if weight.transposed else seen
    return [seen[rows] for rows in chunks]


def _compare(base: Iterable[Tensor], exact: Tensor, weight: BaseWeight, chunks: Sequence[slice]) -> Rounded:
    off = norm = size = more = torch.zeros((), device=exact.device)
    for w, rows, y in zip(base, chunks, _rows(weight, chunks), strict=True):
        w, x, y = w.flatten(), exact[rows].flatten().float(), y.flatten()
        change, error = x - w, y - x
        off, norm = off + error.dot(error), norm + x.dot(x)
        size, more = size + change.dot(change), more + change.dot(error)
    return Rounded((off / norm).sqrt(), torch.where(size > 0, 1 + more / size, 1.0))


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


def drawn_float(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`values` in a floating dtype of one or two bytes: for every element one of the two numbers around it. What is
    finite and beyond the largest one becomes that."""
    bits, flat = {1: torch.uint8, 2: torch.int16}[dtype.itemsize], values.reshape(-1)
    result = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        x = flat[start : start + _CHUNK].float()
        near = x.to(dtype)
        near = near.float().copysign(x).to(dtype)  # also of a zero
        # bits count magnitudes
        low = near.view(bits) - (near.float().abs() > x.abs()).to(bits)
        below, above = low.view(dtype).float().abs(), (low + 1).view(dtype).float().abs()
        draws = torch.rand(x.shape, generator=generator, device=x.device)
        up = draws * (above - below) < x.abs() - below  # false where there is no finite number above
        result[start : start + _CHUNK] = (low + up.to(bits)).view(dtype)
    return result.view(values.shape)
