"""Triton: the skinny products of several linears that read one input, one launch each.

What differs from sibling to sibling comes in tuples. Where a program works for one sibling it picks that sibling's part
of each tuple; where siblings share what is read, the loops over the tuple are unrolled. The work itself is that of one
linear: `strip`, `column_gradient`.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    Tile,
    cdiv,
    chip_of,
    depth,
    dot_precision,
    exact_precision,
    held_ranks,
    rank_tile,
    shared_tile,
)
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_down_kernels import apart_pointers, row_launch, strip, strip_name, strip_tile
from peftfast_kernels.lora_grad_kernels import column_gradient, gradient_tile
from peftfast_kernels.siblings import drops
from peftfast_kernels.tiles import owner, pick, tile_counts
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, ROWS, WIDTH, Variant


@triton.jit
def siblings_down_kernel(
    x_ptr, a_ptrs, seed_ptrs, t_ptrs, M, K, RS, stride_xm, stride_xk, thresholds, scales,
    DROP: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BR ranks of every t. a_ptrs: [R_i, K] contiguous; see `strip`."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    strip(
        rows, tl.program_id(1) * BR, x_ptr, a_ptrs, seed_ptrs, t_ptrs, M, K, RS, stride_xm, stride_xk, K, 1,
        thresholds, scales, DROP, BM, BR, BK, 1, PRECISION, INTERP,
    )  # fmt: skip


@triton.jit
def siblings_apart_kernel(
    x_ptrs, f_ptrs, t_ptrs, M, CS, RS, strides_m, scales, rank_tiles,
    TURNED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BR ranks of the t of sibling j // rank_tiles, without dropout.

    x_ptrs: [M, C_i], rows strides_m apart; f_ptrs: [R_i, C_i], or [C_i, R_i] where TURNED, and t_ptrs: [M, R_i],
    contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    which = tl.program_id(1) // rank_tiles
    R, C = pick(RS, which), pick(CS, which)
    x_ptr = pick(x_ptrs, which)
    strip(
        rows, tl.program_id(1) % rank_tiles * BR, x_ptr, (pick(f_ptrs, which),), (x_ptr,), (pick(t_ptrs, which),),
        M, C, (R,), pick(strides_m, which), 1, 1 if TURNED else C, R if TURNED else 1, (0,), (pick(scales, which),),
        False, BM, BR, BK, UNIT, PRECISION, INTERP,
    )  # fmt: skip


@triton.jit
def siblings_grads_kernel(
    dy_ptrs, t_ptrs, db_ptrs, x_ptr, p_ptrs, da_ptrs, seed_ptrs,
    M, NS, K, RS, strides_m, strides_tm, stride_xm, stride_xk, strides_pm,
    db_tiles, da_tiles, rank_tiles, thresholds, db_scales, da_scales,
    DA: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BRT: tl.constexpr, BRP: tl.constexpr,
    UNIT_T: tl.constexpr, UNIT_P: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """The first db_tiles * rank_tiles programs own BC columns of one dy and BRT ranks each, the others BC columns of x
    and BRP ranks of every p.

    dy_ptrs: [M, N_i], t_ptrs and p_ptrs: [M, R_i], rows through strides; db_ptrs: [N_i, R_i] and da_ptrs: [R_i, K]
    contiguous, these absent without DA.
    """
    program = tl.program_id(0)
    db_programs = db_tiles * rank_tiles
    if program < db_programs:
        which, first = owner(program % db_tiles, tile_counts(NS, BC))
        R = pick(RS, which)
        dy_ptr = pick(dy_ptrs, which)
        column_gradient(
            (program % db_tiles - first) * BC, program // db_tiles * BRT, dy_ptr, (pick(t_ptrs, which),), (dy_ptr,),
            (pick(db_ptrs, which),), M, pick(NS, which), (R,), pick(strides_m, which), 1, (pick(strides_tm, which),), 1,
            R, 1, (0,), (pick(db_scales, which),), False, BM, BC, BRT, UNIT_T, PRECISION, INTERP,
        )  # fmt: skip
    if DA:
        if program >= db_programs:
            program -= db_programs
            column_gradient(
                program % da_tiles * BC, program // da_tiles * BRP, x_ptr, p_ptrs, seed_ptrs, da_ptrs,
                M, K, RS, stride_xm, stride_xk, strides_pm, 1, 1, K, thresholds, da_scales,
                DROP, BM, BC, BRP, UNIT_P, PRECISION, INTERP,
            )  # fmt: skip


# -- launchers ---------------------------------------------------------------------------------------------------------


def row_major(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors with adjacent columns, copied where they are not, and the strides of their rows."""
    made = tuple([one if one.stride(1) == 1 or one.shape[1] == 1 else one.contiguous() for one in tensors])
    return made, tuple([one.stride(0) for one in made])


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple([one.contiguous() for one in tensors])


def seeds_or(seeds: Sequence[Tensor | None], probs: Sequence[float], stand_in: Tensor) -> tuple[Tensor, ...]:
    """The seeds; a sibling without dropout takes another's, and drops nothing."""
    some = next((seed for seed in seeds if seed is not None), stand_in)
    return tuple([seed_or(seed, prob, some) for seed, prob in zip(seeds, probs, strict=True)])


def masks(probs: Sequence[float]) -> dict:
    """What kernels have to know of the siblings' dropout besides the seeds."""
    return {"thresholds": tuple([threshold(prob) for prob in probs]), "DROP": drops(probs)}


def keep_scales(probs: Sequence[float]) -> tuple[float, ...]:
    return tuple([keep_scale(prob) for prob in probs])


def _apart_launch(
    config: Tile, chip: str, m: int, columns: tuple[int, ...], ranks: tuple[int, ...], strides: tuple[int, ...],
    scales: tuple[float, ...], factor_size: int, precision: str, turned: bool,
) -> Launch:  # fmt: skip
    """A 2D grid (row strips, siblings x rank tiles)."""
    bm, br, bk, warps, stages = config
    rank_tiles = cdiv(max(ranks), br)
    return Launch(
        siblings_apart_kernel,
        (cdiv(m, bm), rank_tiles * len(ranks)),
        M=m,
        CS=columns,
        RS=ranks,
        strides_m=strides,
        scales=scales,
        rank_tiles=rank_tiles,
        TURNED=turned,
        BM=bm,
        BR=br,
        BK=depth(bk, bm, held_ranks(br, chip, precision), factor_size == 4),
        UNIT=gcd(16, *ranks) if turned else 1,
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )


@planned
def _down_plan(
    chip: str, m: int, k: int, ranks: tuple[int, ...], x_strides: tuple[int, ...], sizes: tuple[int, int],
    precision: str, probs: tuple[float, ...],
) -> tuple[Launch, bool]:  # fmt: skip
    """Strips of all siblings, strips of one sibling each, or single rows, and whether each is one sibling's."""
    many = len(ranks)
    shares = (many, 1) if x_strides[1] == 1 and not drops(probs) else (many,)
    config, share = strip_tile(
        chip, m, max(ranks), sizes, precision, drops(probs), many, 1, shares, alone=not drops(probs)
    )  # fmt: skip
    scales = keep_scales(probs)
    if config.BM == 1:
        return row_launch(config, m, k, ranks, x_strides, (k,) * many, scales), True
    if share == 1:
        columns, strides = (k,) * many, x_strides[:1] * many
        return _apart_launch(config, chip, m, columns, ranks, strides, scales, sizes[1], precision, False), True
    bm, br, bk, warps, stages = config
    held = (br + bm * drops(probs)) * many  # the tiles of all factors, and x once more for every mask
    launch = Launch(
        siblings_down_kernel,
        (cdiv(m, bm), cdiv(max(ranks), br)),
        M=m,
        K=k,
        RS=ranks,
        stride_xm=x_strides[0],
        stride_xk=x_strides[1],
        scales=scales,
        **masks(probs),
        BM=bm,
        BR=br,
        BK=depth(bk, bm, held, sizes[1] == 4),
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )
    return launch, False


def siblings_down(x: Tensor, a: list[Tensor], seeds: list[Tensor | None], probs: list[float]) -> list[Tensor]:
    """One launch."""
    (m, k), dtype, device = x.shape, a[0].dtype, x.device
    ranks = tuple([one.shape[0] for one in a])
    ts = [torch.empty(m, r, dtype=dtype, device=device) for r in ranks]
    if m:
        chip = chip_of(device)
        precision = dot_precision(chip, x.dtype, dtype)  # as much as the tiles of several take
        sizes = x.dtype.itemsize, dtype.itemsize
        launch, apart = _down_plan(chip, m, k, ranks, x.stride(), sizes, precision, tuple(probs))
        if apart:
            launch((x,) * len(a), contiguous(a), tuple(ts))
        else:
            launch(x, contiguous(a), seeds_or(seeds, probs, x), tuple(ts))
    return ts


@planned
def _dt_plan(
    chip: str, m: int, widths: tuple[int, ...], ranks: tuple[int, ...], strides: tuple[int, ...],
    sizes: tuple[int, int], precision: str, scales: tuple[float, ...],
) -> Launch:  # fmt: skip
    many = len(ranks)
    config, _ = strip_tile(chip, m, max(ranks), sizes, precision, linears=many, inputs=many)
    scales = tuple(map(float, scales))
    return _apart_launch(config, chip, m, widths, ranks, strides, scales, sizes[1], precision, True)


def siblings_dt(dys: list[Tensor], b: list[Tensor], scales: list[float]) -> list[Tensor]:
    """One launch."""
    m, dtype, device = dys[0].shape[0], b[0].dtype, b[0].device
    widths, ranks = zip(*[one.shape for one in b], strict=True)
    ps = [torch.empty(m, r, dtype=dtype, device=device) for r in ranks]
    if m:
        chip = chip_of(device)
        rows, strides = row_major(dys)
        precision = exact_precision(chip, dys[0].dtype, dtype)
        sizes = dys[0].dtype.itemsize, dtype.itemsize
        launch = _dt_plan(chip, m, widths, ranks, strides, sizes, precision, tuple(scales))
        launch(rows, contiguous(b), tuple(ps))
    return ps


@planned
def _grads_plan(
    chip: str, m: int, widths: tuple[int, ...], k: int, ranks: tuple[int, ...], dy_strides: tuple[int, ...],
    t_strides: tuple[int, ...], x_strides: tuple[int, ...], p_strides: tuple[int, ...], sizes: tuple[int, int],
    precision: str, probs: tuple[float, ...], scales: tuple[float, ...],
) -> Launch:  # fmt: skip
    """A 1D grid: (column tiles of every dy) x (rank tiles), then (column tiles of x) x (rank tiles). k: 0 without x."""
    brt, brp = rank_tile(max(ranks)), shared_tile(max(ranks), len(ranks))
    rank_tiles, shared_tiles = cdiv(max(ranks), brt), cdiv(max(ranks), brp)
    bm, bc, _, warps, stages = gradient_tile(
        chip, lambda size: (sum(cdiv(n, size) for n in widths) * rank_tiles, cdiv(k, size) * shared_tiles),
        sum(widths) + k, max(brt, brp * len(ranks)), sizes, precision, len(ranks) * drops(probs),
    )  # fmt: skip
    db_tiles, da_tiles = sum(cdiv(n, bc) for n in widths), cdiv(k, bc)
    return Launch(
        siblings_grads_kernel,
        (db_tiles * rank_tiles + da_tiles * shared_tiles,),
        M=m,
        NS=widths,
        K=k,
        RS=ranks,
        strides_m=dy_strides,
        strides_tm=t_strides,
        stride_xm=x_strides[0],
        stride_xk=x_strides[1],
        strides_pm=p_strides,
        db_tiles=db_tiles,
        da_tiles=max(da_tiles, 1),
        rank_tiles=rank_tiles,
        db_scales=tuple(map(float, scales)),
        da_scales=keep_scales(probs),
        **masks(probs),
        DA=k > 0,
        BM=bm,
        BC=bc,
        BRT=brt,
        BRP=brp,
        UNIT_T=gcd(16, *ranks, *t_strides),
        UNIT_P=gcd(16, *ranks, *p_strides),
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )


def siblings_factor_grads(
    dys: list[Tensor], t: list[Tensor], x: Tensor | None, p: list[Tensor], seeds: list[Tensor | None],
    probs: list[float], scales: list[float], db_dtype: torch.dtype, da_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """One launch; pointers that it does not read still have to be some."""
    first, dtype = dys[0], t[0].dtype
    m, device = first.shape[0], first.device
    widths, ranks = tuple([dy.shape[1] for dy in dys]), tuple([one.shape[1] for one in t])
    dbs = [torch.empty(n, r, dtype=db_dtype, device=device) for n, r in zip(widths, ranks, strict=True)]
    das, k, x_strides = [], 0, (0, 0)
    seed_pointers = seeds_or(seeds, probs, first)
    if x is not None:
        k, x_strides = x.shape[1], x.stride()
        das = [torch.empty(r, k, dtype=da_dtype, device=device) for r in ranks]
    if m == 0:
        return [grad.zero_() for grad in (*dbs, *das)]
    chip = chip_of(device)
    (dy_rows, dy_strides), (t_rows, t_strides), (p_rows, p_strides) = row_major(dys), row_major(t), row_major(p)
    launch = _grads_plan(
        chip, m, widths, k, ranks, dy_strides, t_strides, x_strides, p_strides, (first.dtype.itemsize, dtype.itemsize),
        exact_precision(chip, first.dtype, dtype), tuple(probs), tuple(scales),
    )  # fmt: skip
    launch(dy_rows, t_rows, tuple(dbs), first if x is None else x, p_rows, tuple(das or dbs), seed_pointers)
    return [*dbs, *das]


def variants(chip: str):
    """What these launchers launch, for ahead-of-time checks: q, k and v, and gate and up."""
    for members, rank, drop, rows, f in (
        (3, 16, False, 16, "bf16"),
        (3, 16, False, 256, "bf16"),
        (3, 16, True, 16, "bf16"),
        (3, 16, True, ROWS, "bf16"),
        (2, 64, True, ROWS, "bf16"),
        (3, 128, False, ROWS, "bf16"),
        (3, 16, True, ROWS, "fp32"),
        (3, 64, True, 2048, "fp32"),
        (3, 64, False, 256, "fp32"),
        (2, 64, True, ROWS, "fp32"),
    ):
        wide, dtypes = f == "fp32", (torch.bfloat16, DTYPES[f])
        ranks, factors, widths, probs = (rank,) * members, (f,) * members, (WIDTH,) * members, (0.1 * drop,) * members
        name, sizes = f"R{rank}x{members}{' drop' * drop}{' wide' * wide}", (2, dtypes[1].itemsize)
        launch, apart = _down_plan(chip, rows, WIDTH, ranks, (WIDTH, 1), sizes, dot_precision(chip, *dtypes), probs)
        strips = {"x_ptr": "bf16", "a_ptrs": factors, "seed_ptrs": ("i64",) * members, "t_ptrs": factors}
        yield Variant(
            f"siblings_down bf16 M{rows} {strip_name(launch)} {name}",
            launch,
            apart_pointers("bf16", factors) if apart else strips,
            matrix=ANY_MATRIX if "BM" in launch.arguments else NO_MATRIX,
            quick=members == 3 and (drop or rows == 16) and not wide,
        )
        if not drop or wide:
            precision = exact_precision(chip, *dtypes)
            launch = _dt_plan(chip, rows, widths, ranks, widths, sizes, precision, (2.0,) * members)
            yield Variant(
                f"siblings_dt bf16 M{rows} {strip_name(launch)} {name}",
                launch,
                apart_pointers("bf16", factors),
                matrix=ANY_MATRIX,
            )
    for members, rank, drop, width, f in (
        (3, 16, False, WIDTH, "bf16"),
        (3, 16, True, WIDTH, "bf16"),
        (3, 16, True, 512, "bf16"),
        (2, 64, True, WIDTH, "bf16"),
        (3, 128, True, WIDTH, "bf16"),
        (3, 16, True, WIDTH, "fp32"),
    ):
        dtypes = torch.bfloat16, DTYPES[f]
        ranks, widths, factors = (rank,) * members, (width,) * members, (f,) * members
        launch = _grads_plan(
            chip, ROWS, widths, width, ranks, widths, ranks, (width, 1), ranks, (2, dtypes[1].itemsize),
            exact_precision(chip, *dtypes), (0.1 * drop,) * members, (2.0,) * members,
        )  # fmt: skip
        name = f"R{rank}x{members}{' drop' * drop}{' wide' * (f == 'fp32')}"
        yield Variant(
            f"siblings_factor_grads N{width} C{launch.arguments['BC']} {name}",
            launch,
            {
                "dy_ptrs": ("bf16",) * members, "t_ptrs": factors, "db_ptrs": ("fp32",) * members, "x_ptr": "bf16",
                "p_ptrs": factors, "da_ptrs": ("fp32",) * members, "seed_ptrs": ("i64",) * members,
            },
            matrix=ANY_MATRIX,
            quick=drop and rank == 16 and width == WIDTH and f == "bf16",
        )  # fmt: skip
