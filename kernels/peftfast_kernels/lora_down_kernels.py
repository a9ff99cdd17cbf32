"""Triton: t = drop(x) aᵀ and p = s dy b. The mask is applied to x in registers, scales to the fp32 sum.

Every strip of rows and ranks has one owner, which walks the whole contraction: one launch, nothing to add up
afterwards. Of few rows, a strip is one row and as few ranks as there are processors for.
"""

from collections.abc import Sequence
from itertools import product
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    PROGRAMS,
    Tile,
    cdiv,
    chip_of,
    depth,
    exact_precision,
    fed_by_warps,
    held_ranks,
    powers,
    rank_tile,
    shared_tile,
    skinny_warps,
    tile,
    waiting,
)
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import exact_product, keep_tile, narrow, operand, pick, row_keys
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, ROWS, WIDTH, Variant


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
    for k in range(0, tl.maximum(K, 1), BK):
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
                kept = tl.where(keep_tile(keys[i], k, tl.arange(0, BK), thresholds[i]), kept, 0.0)
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


@triton.jit
def row_sums(
    x_ptr, f_ptr, ranks, C, R, stride_xc, stride_fr, stride_fc,
    BR: tl.constexpr, BC: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """f x for these BR ranks, fp32 [BR]. x_ptr: [C], f_ptr: [R, C], both through strides."""
    acc = tl.zeros((BR, BC), tl.float32)
    for c in range(0, C, BC):
        cols = c + tl.arange(0, BC)
        wide_cols = cols.to(tl.int64)
        inside = cols < C
        x = tl.load(x_ptr + wide_cols * stride_xc, mask=inside, other=0.0)
        f = tl.load(
            f_ptr + ranks[:, None].to(tl.int64) * stride_fr + wide_cols[None, :] * stride_fc,
            mask=(ranks[:, None] < R) & inside[None, :],
            other=0.0,
        )
        acc += operand(f, INTERP).to(tl.float32) * operand(x, INTERP).to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def row_down_kernel(
    x_ptrs, f_ptrs, t_ptrs, K, RS, stride_xm, stride_xk, strides_fr, scales, rank_tiles,
    BR: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (m, j) computes BR ranks of row m of the t of factor j // rank_tiles, without dropout.

    x_ptrs: [M, K]; f_ptrs: [R_i, K], rows strides_fr apart; t_ptrs: [M, R_i] contiguous.
    """
    m = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1) // rank_tiles
    ranks = tl.program_id(1) % rank_tiles * BR + tl.arange(0, BR)
    R, x_ptr = pick(RS, which), pick(x_ptrs, which) + m * stride_xm
    t = row_sums(x_ptr, pick(f_ptrs, which), ranks, K, R, stride_xk, pick(strides_fr, which), 1, BR, BK, INTERP)
    value = narrow(t * pick(scales, which), t_ptrs[0].dtype.element_ty, INTERP)
    tl.store(pick(t_ptrs, which) + m * R + ranks, value, mask=ranks < R)


# -- launchers ---------------------------------------------------------------------------------------------------------


def unit(rank: int, stride: int) -> int:
    """The power of two up to 16 that divides both: the length of the vectors in which a factor's ranks are read."""
    return gcd(gcd(rank, stride), 16)


def strip_tile(
    chip: str, m: int, r: int, sizes: tuple[int, int], precision: str, drops: bool = False, linears: int = 1,
    inputs: int = 1, shares: Sequence[int] = (1,), alone: bool = False,
) -> tuple[Tile, int]:  # fmt: skip
    """The tile of one program, of m rows and r ranks, its columns, and the number of linears of which it has the ranks:
    small where a processor would have much to read alone, large where programs would read the same again and again.

    Args:
        sizes: bytes of an element of the activations, and of the factor.
        linears: whose products these are, of so many `inputs`; `shares` of them may be one program's.
        alone: a program may also have one row, without matrix instructions.
    """
    config = tile("lora_down", chip)

    def taken(strip: tuple[int, int, int]) -> tuple[float, float]:
        rows, ranks, share = strip
        moved = min(rows, m) * sizes[0] + min(ranks, r) * sizes[1] * share
        programs = cdiv(m, rows) * cdiv(r, ranks) * (linears // share)
        once, masked = m * sizes[0] * inputs, rows * drops * share
        return waiting(programs, moved, once, masked, by_warps=fed_by_warps(chip, rows))

    highest = min(config.BN if drops else config.BM, max(16, 1 << (m - 1).bit_length()))
    strips = [(*strip, share) for share in shares for strip in product(powers(highest), powers(shared_tile(r, share)))]
    if alone:
        strips += [(1, ranks, 1) for ranks in powers(rank_tile(r), 1)]
    rows, ranks, share = min(strips, key=taken)
    warps, stages = config.warps, config.stages
    if rows > 1:
        warps = skinny_warps(warps, rows, ranks * share, chip, precision, 64 if share > 1 else 32)
    # Of the lowest strips a processor has one or two, which wait for memory alone: more of their steps are under way.
    programs = cdiv(m, rows) * cdiv(r, ranks) * (linears // share)
    if rows == 16 and share == 1 and programs <= 2 * PROGRAMS and chip.startswith("sm_"):
        stages += 2
        if ranks == 16 and precision != "ieee" and not drops:
            warps //= 2  # which have one matrix instruction each; others would only read x once more
    return config._replace(BM=rows, BN=ranks, warps=warps, stages=stages), share


def row_columns(columns: int, ranks: int, warps: int) -> int:
    """Columns that a program of one row holds at a time, of so many ranks each: all of them, or registers for 64 sums a
    thread."""
    return min(warps * 32 * 64 // ranks, max(16, 1 << (columns - 1).bit_length()))


def row_launch(
    config: Tile, m: int, k: int, ranks: tuple[int, ...], x_strides: tuple[int, ...], strides: tuple[int, ...],
    scales: tuple[float, ...],
) -> Launch:  # fmt: skip
    """A 2D grid (rows, linears x rank tiles), by a tile with one row."""
    rank_tiles = cdiv(max(ranks), config.BN)
    return Launch(
        row_down_kernel,
        (m, rank_tiles * len(ranks)),
        K=k,
        RS=ranks,
        stride_xm=x_strides[0],
        stride_xk=x_strides[1],
        strides_fr=strides,
        scales=scales,
        rank_tiles=rank_tiles,
        BR=config.BN,
        BK=row_columns(k, config.BN, config.warps),
        num_warps=config.warps,
    )


@planned
def _plan(
    chip: str, m: int, k: int, r: int, stride_xm: int, stride_xk: int, stride_ar: int, stride_ak: int,
    sizes: tuple[int, int], precision: str, prob: float, scale: float,
) -> tuple[Launch, bool]:  # fmt: skip
    """A 2D grid (row strips, rank tiles), and whether strips are single rows."""
    drops = threshold(prob) > 0
    config, _ = strip_tile(chip, m, r, sizes, precision, drops, alone=stride_ak == 1 and not drops)
    if config.BM == 1:
        return row_launch(config, m, k, (r,), (stride_xm, stride_xk), (stride_ar,), (float(scale),)), True
    bm, br, bk, warps, stages = config
    launch = Launch(
        down_kernel,
        (cdiv(m, bm), cdiv(r, br)),
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
        BK=depth(bk, bm, held_ranks(br, chip, precision), sizes[1] == 4),
        UNIT=unit(r, stride_ak),
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )
    return launch, False


def _launch(
    x: Tensor, a: Tensor, r: int, stride_ar: int, stride_ak: int, seed: Tensor | None, prob: float, scale: float
) -> Tensor:
    """scale * drop(x) aᵀ [M, R] for a of any strides."""
    m, k = x.shape
    t = torch.empty(m, r, dtype=a.dtype, device=a.device)
    if m == 0 or r == 0:
        return t
    chip = chip_of(x.device)
    launch, alone = _plan(
        chip, m, k, r, *x.stride(), stride_ar, stride_ak, (x.dtype.itemsize, a.dtype.itemsize),
        exact_precision(chip, x.dtype, a.dtype), prob, scale,
    )  # fmt: skip
    if alone:
        launch((x,), (a,), (t,))
    else:
        launch(x, a, seed_or(seed, prob, x), t)
    return t


def lora_down(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """One launch."""
    return _launch(x, a, a.shape[0], *a.stride(), seed, prob, 1.0)


def lora_dt(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch."""
    stride_n, stride_r = b.stride()
    return _launch(dy, b, b.shape[1], stride_r, stride_n, None, 0.0, scale)


def strip_name(launch: Launch) -> str:
    return f"{launch.arguments.get('BM', 1)}x{launch.arguments['BR']}"


def apart_pointers(x: str, factors: tuple[str, ...]) -> dict:
    """What kernels take of which each program works for one factor, for a `Variant`."""
    return {"x_ptrs": (x,) * len(factors), "f_ptrs": factors, "t_ptrs": factors}


def variants(chip: str):
    """What `lora_down` and `lora_dt` launch, for ahead-of-time checks."""
    points = (
        ("bf16", "bf16", 16, False, 16),
        ("bf16", "bf16", 16, True, 16),
        ("bf16", "bf16", 16, True, 4096),
        ("bf16", "bf16", 16, True, ROWS),
        ("fp16", "fp16", 64, False, ROWS),
        ("bf16", "bf16", 64, False, 2048),
        ("bf16", "bf16", 64, False, 1),
        ("bf16", "bf16", 128, True, 16),
        ("bf16", "bf16", 128, True, ROWS),
        ("bf16", "bf16", 256, True, 2048),
        ("bf16", "fp32", 16, False, 16),
        ("bf16", "fp32", 16, True, 16),
        ("bf16", "fp32", 16, True, ROWS),
        ("bf16", "fp32", 64, True, ROWS),
        ("bf16", "fp32", 128, True, ROWS),
        ("fp32", "fp32", 16, False, 16),
        ("fp32", "fp32", 16, False, ROWS),
        ("fp32", "fp32", 64, True, ROWS),
        ("fp32", "fp32", 256, False, ROWS),
    )
    # `lora_dt` drops nothing
    calls = [(*point, False) for point in points] + [(x, a, rank, False, rows, True) for x, a, rank, _, rows in points]
    for x, a, rank, drop, rows, turned in dict.fromkeys(calls):
        x_dtype, a_dtype = DTYPES[x], DTYPES[a]
        a_strides = (1, rank) if turned else (WIDTH, 1)
        launch, alone = _plan(
            chip, rows, WIDTH, rank, WIDTH, 1, *a_strides, (x_dtype.itemsize, a_dtype.itemsize),
            exact_precision(chip, x_dtype, a_dtype), 0.1 * drop, 2.0,
        )  # fmt: skip
        name = f"{x} M{rows} R{rank} {strip_name(launch)}{' drop' * drop}{' wide' * (x != a)}"
        yield Variant(
            f"{'lora_dt' if turned else 'lora_down'} {name}",
            launch,
            apart_pointers(x, (a,)) if alone else {"x_ptr": x, "a_ptr": a, "seed_ptr": "i64", "t_ptr": a},
            matrix=NO_MATRIX if alone or x == "fp32" else ANY_MATRIX,
            quick=rank == 16 and x == a == "bf16" and (turned or drop or alone),
        )
