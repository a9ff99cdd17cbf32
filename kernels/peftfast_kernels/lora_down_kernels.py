"""Triton: t = drop(x) aᵀ and p = s dy b. The mask is applied to x in registers, scales to the fp32 sum.

Every strip of rows has one owner, which walks the whole contraction: one launch, nothing to add up afterwards.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    PROGRAMS,
    cdiv,
    chip_of,
    depth,
    exact_precision,
    held_ranks,
    owned,
    rank_tile,
    rank_warps,
    tile,
)
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import exact_product, keep_tile, narrow, operand, row_keys
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, WIDTH, Variant


@triton.jit
def strip(
    rows, first_rank, x_ptr, a_ptrs, seed_ptrs, t_ptrs, M, K, RS, stride_xm, stride_xk, stride_ar, stride_ak,
    thresholds, scales,
    DROP: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """t_i = scale_i * drop_i(x) a_iᵀ for these BM rows and BR ranks from first_rank on, for every factor of a tuple.

    x_ptr: [M, K], read once for all; a_ptrs: [R_i, K], R_i and stride_ak multiples of UNIT; seed_ptrs: int64 [];
    t_ptrs: [M, R_i] contiguous.
    """
    # The compiler knows multiples of 16 by itself, and a smaller rank's as a product: without it such a factor, where
    # its ranks are contiguous, is read element by element and outside the pipeline.
    stride_ak = stride_ak // UNIT * UNIT
    ranks = first_rank + tl.arange(0, BR)
    row_in = rows[:, None] < M
    accs = ()
    keys = ()
    for i in tl.static_range(len(a_ptrs)):
        accs = accs + (tl.zeros((BM, BR), tl.float32),)
        if DROP:
            keys = keys + (row_keys(seed_ptrs[i], rows),)
    for k in range(0, K, BK):
        cols = k + tl.arange(0, BK)
        wide_cols = cols.to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + wide_cols[None, :] * stride_xk,
            mask=row_in & (cols[None, :] < K),
            other=0.0,
        )
        x = operand(x, INTERP)
        sums = ()
        for i in tl.static_range(len(a_ptrs)):
            rank_in = ranks[None, :] < RS[i] // UNIT * UNIT
            a = tl.load(
                a_ptrs[i] + ranks[None, :].to(tl.int64) * stride_ar + wide_cols[:, None] * stride_ak,
                mask=rank_in & (cols[:, None] < K),
                other=0.0,
            )
            a = operand(a, INTERP)
            kept = x
            if DROP:
                kept = tl.where(keep_tile(keys[i], cols, thresholds[i]), kept, 0.0)
            sums = sums + (exact_product(kept, a, accs[i], PRECISION, INTERP),)
        accs = sums
    for i in tl.static_range(len(a_ptrs)):
        R = RS[i] // UNIT * UNIT
        out = t_ptrs[i] + rows[:, None] * R + ranks[None, :]
        value = narrow(accs[i] * scales[i], t_ptrs[i].dtype.element_ty, INTERP)
        tl.store(out, value, mask=row_in & (ranks[None, :] < R))


@triton.jit
def down_kernel(
    x_ptr, a_ptr, seed_ptr, t_ptr, M, K, R, stride_xm, stride_xk, stride_ar, stride_ak, threshold, scale,
    DROP: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BR ranks of t; see `strip`."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    strip(
        rows, tl.program_id(1) * BR, x_ptr, (a_ptr,), (seed_ptr,), (t_ptr,), M, K, (R,),
        stride_xm, stride_xk, stride_ar, stride_ak, (threshold,), (scale,),
        DROP, BM, BR, BK, UNIT, PRECISION, INTERP,
    )  # fmt: skip


def unit(rank: int, stride: int) -> int:
    """The power of two up to 16 that divides both: the length of the vectors in which a factor's ranks are read."""
    return gcd(gcd(rank, stride), 16)


@planned
def _plan(
    chip: str, m: int, k: int, r: int, stride_xm: int, stride_xk: int, stride_ar: int, stride_ak: int,
    single: bool, precision: str, prob: float, scale: float,
) -> Launch:  # fmt: skip
    """A 2D grid (row strips, rank tiles)."""
    config = tile("lora_down", chip)
    br = rank_tile(r)
    rank_tiles = cdiv(r, br)
    bm = owned(config.BM, lambda size: cdiv(m, size) * rank_tiles)
    # Of the lowest strips a processor has one or two, which wait for memory alone: more of their steps are under way.
    lowest = bm == 16 and chip.startswith("sm_")
    drops, warps = threshold(prob) > 0, rank_warps(config.warps, br, chip, precision)
    if lowest and br == 16 and precision != "ieee" and not drops:
        warps //= 2  # which have one matrix instruction each; others would only read x once more
    return Launch(
        down_kernel,
        (cdiv(m, bm), rank_tiles),
        M=m,
        K=k,
        R=r,
        stride_xm=stride_xm,
        stride_xk=stride_xk,
        stride_ar=stride_ar,
        stride_ak=stride_ak,
        threshold=threshold(prob),
        scale=scale * keep_scale(prob),
        DROP=drops,
        BM=bm,
        BR=br,
        BK=depth(config.BK, bm, held_ranks(br, chip, precision), single),
        UNIT=unit(r, stride_ak),
        PRECISION=precision,
        num_warps=warps,
        num_stages=config.stages + 2 * lowest,
    )


def _launch(
    x: Tensor, a: Tensor, r: int, stride_ar: int, stride_ak: int, seed: Tensor | None, prob: float, scale: float
) -> Tensor:
    """scale * drop(x) aᵀ [M, R] for a of any strides."""
    m, k = x.shape
    t = torch.empty(m, r, dtype=a.dtype, device=a.device)
    if m == 0 or r == 0:
        return t
    chip = chip_of(x.device)
    launch = _plan(
        chip, m, k, r, *x.stride(), stride_ar, stride_ak, a.dtype is torch.float32,
        exact_precision(chip, x.dtype, a.dtype), prob, scale,
    )  # fmt: skip
    launch(x, a, seed_or(seed, prob, x), t)
    return t


def lora_down(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """One launch."""
    return _launch(x, a, a.shape[0], *a.stride(), seed, prob, 1.0)


def lora_dt(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch."""
    stride_n, stride_r = b.stride()
    return _launch(dy, b, b.shape[1], stride_r, stride_n, None, 0.0, scale)


def variants(chip: str):
    """What `lora_down` and `lora_dt` launch, for ahead-of-time checks."""
    largest = tile("lora_down", chip).BM
    points = (
        ("bf16", "bf16", 16, False, 16),
        ("bf16", "bf16", 16, True, 16),
        ("bf16", "bf16", 16, True, 32),
        ("bf16", "bf16", 16, True, largest),
        ("fp16", "fp16", 64, False, largest),
        ("bf16", "bf16", 128, True, 16),
        ("bf16", "bf16", 128, True, largest),
        ("bf16", "fp32", 16, True, 16),
        ("bf16", "fp32", 16, True, largest),
        ("bf16", "fp32", 64, True, largest),
        ("bf16", "fp32", 128, True, largest),
        ("fp32", "fp32", 16, False, 16),
        ("fp32", "fp32", 16, False, largest),
        ("fp32", "fp32", 64, True, largest),
    )
    # `lora_dt` drops nothing; on some chips the largest strip is not so large, and points coincide
    calls = [(*point, False) for point in points] + [(x, a, rank, False, bm, True) for x, a, rank, _, bm in points]
    for x, a, rank, drop, bm, turned in dict.fromkeys(calls):
        precision = exact_precision(chip, DTYPES[x], DTYPES[a])
        a_strides = (1, rank) if turned else (WIDTH, 1)
        launch = _plan(
            chip, PROGRAMS * bm, WIDTH, rank, WIDTH, 1, *a_strides, a == "fp32", precision, 0.1 * drop, 2.0
        )  # fmt: skip
        yield Variant(
            f"{'lora_dt' if turned else 'lora_down'} {x} M{bm} R{rank}{' drop' * drop}{' wide' * (x != a)}",
            launch,
            {"x_ptr": x, "a_ptr": a, "seed_ptr": "i64", "t_ptr": a},
            matrix=NO_MATRIX if x == "fp32" else ANY_MATRIX,
            quick=rank == 16 and x == a == "bf16" and (turned or drop),
        )
