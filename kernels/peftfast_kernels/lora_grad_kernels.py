"""Triton: db = s dyᵀ t and da = pᵀ drop(x) in one launch. Every tile of columns, of dy or of x, has one owner."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    MANY_SUMS,
    Tile,
    cdiv,
    chip_of,
    depth,
    exact_precision,
    fed_by_warps,
    powers,
    rank_tile,
    skinny_warps,
    tile,
    waiting,
)
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_down_kernels import unit
from peftfast_kernels.tiles import exact_product, keep_tile, narrow, operand, row_keys
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, ROWS, WIDTH, Variant


@triton.jit
def column_gradient(
    first_col, first_rank, x_ptr, f_ptrs, seed_ptrs, out_ptrs,
    M, C, RS, stride_xm, stride_xc, strides_fm, stride_fr, stride_oc, stride_or, thresholds, scales,
    DROP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """scale_i * drop_i(x)ᵀ f_i for BC columns and BR ranks, for every factor of a tuple: x_ptr [M, C], read once for
    all; f_ptrs [M, R_i]; out_ptrs [C, R_i], all with the same strides.

    R_i and strides_fm are multiples of UNIT. The columns are on the left: large matrix instructions want 64 there, and
    no more than 8 on the right, and `exact_product` takes what is on the left as it is.
    """
    cols = first_col + tl.arange(0, BC)
    ranks = first_rank + tl.arange(0, BR)
    wide_cols = cols.to(tl.int64)
    accs = ()
    for _ in tl.static_range(len(f_ptrs)):
        accs = accs + (tl.zeros((BC, BR), tl.float32),)
    for m in range(0, tl.maximum(M, 1), BM):
        rows = m + tl.arange(0, BM).to(tl.int64)
        # Read transposed, so that the product needs no transposition of a register tile.
        x = tl.load(
            x_ptr + rows[None, :] * stride_xm + wide_cols[:, None] * stride_xc,
            mask=(rows[None, :] < M) & (cols[:, None] < C),
            other=0.0,
        )
        x = operand(x, INTERP)
        sums = ()
        for i in tl.static_range(len(f_ptrs)):
            rank_in = ranks[None, :] < RS[i] // UNIT * UNIT  # what the compiler then knows, see `strip`
            f = tl.load(
                f_ptrs[i] + rows[:, None] * (strides_fm[i] // UNIT * UNIT) + ranks[None, :] * stride_fr,
                mask=(rows[:, None] < M) & rank_in,
                other=0.0,
            )
            kept = x
            if DROP:
                keep = keep_tile(row_keys(seed_ptrs[i], rows), 0, cols, thresholds[i])
                kept = tl.where(tl.trans(keep), kept, 0.0)
            sums = sums + (exact_product(kept, operand(f, INTERP), accs[i], PRECISION, INTERP),)
        accs = sums
    for i in tl.static_range(len(f_ptrs)):
        out = out_ptrs[i] + wide_cols[:, None] * stride_oc + ranks[None, :].to(tl.int64) * stride_or
        value = narrow(accs[i] * scales[i], out_ptrs[i].dtype.element_ty, INTERP)
        tl.store(out, value, mask=(cols[:, None] < C) & (ranks[None, :] < RS[i] // UNIT * UNIT))


@triton.jit
def factor_grads_kernel(
    dy_ptr, t_ptr, db_ptr, x_ptr, p_ptr, da_ptr, seed_ptr,
    M, N, K, RT, RP, stride_dm, stride_dn, stride_tm, stride_tr, stride_xm, stride_xk, stride_pm, stride_pr,
    db_tiles, da_tiles, db_programs, threshold, db_scale, da_scale,
    DB: tl.constexpr, DA: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BRT: tl.constexpr, BRP: tl.constexpr, UNIT_T: tl.constexpr, UNIT_P: tl.constexpr,
    PRECISION_B: tl.constexpr, PRECISION_A: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """The first db_programs programs own BC columns of dy and BRT ranks each, the others BC columns of x and BRP ranks.

    dy_ptr: [M, N]; t_ptr: [M, RT]; db_ptr: [N, RT] contiguous, absent without DB. x_ptr: [M, K]; p_ptr: [M, RP];
    da_ptr: [RP, K] contiguous, absent without DA.
    """
    program = tl.program_id(0)
    if DB:
        if program < db_programs:
            column_gradient(
                program % db_tiles * BC, program // db_tiles * BRT, dy_ptr, (t_ptr,), (seed_ptr,), (db_ptr,),
                M, N, (RT,), stride_dm, stride_dn, (stride_tm,), stride_tr, RT, 1, (threshold,), (db_scale,),
                False, BM, BC, BRT, UNIT_T, PRECISION_B, INTERP,
            )  # fmt: skip
    if DA:
        if program >= db_programs:
            program -= db_programs
            column_gradient(
                program % da_tiles * BC, program // da_tiles * BRP, x_ptr, (p_ptr,), (seed_ptr,), (da_ptr,),
                M, K, (RP,), stride_xm, stride_xk, (stride_pm,), stride_pr, 1, K, (threshold,), (da_scale,),
                DROP, BM, BC, BRP, UNIT_P, PRECISION_A, INTERP,
            )  # fmt: skip


def gradient_tile(
    chip: str, owners: Callable[[int], tuple[int, int]], width: int, ranks: int, sizes: tuple[int, int],
    precision: str, masks: int,
) -> Tile:  # fmt: skip
    """The tile of one program, which owns its columns; see `strip_tile`.

    Args:
        owners: columns of each -> how many programs have those of dy, and of x. width: columns there are.
        ranks: of one program. sizes: bytes of an element of dy and x, and of their factors.
        masks: made of every element of x.
    """
    config = tile("lora_grad", chip)

    def taken(columns: int) -> tuple[float, float]:
        of_dy, of_x = owners(columns)
        moved = columns * sizes[0] + ranks * sizes[1]
        by_warps = fed_by_warps(chip, columns)
        return waiting(of_dy + of_x, moved, width * sizes[0], columns * masks, of_x, by_warps)

    # more sums do not fit into registers, of fp32 factors half as many
    highest = min(config.BN, 4 * MANY_SUMS // (ranks * sizes[1]))
    columns = min(powers(highest), key=taken)
    warps = skinny_warps(config.warps, columns, ranks, chip, precision, 0)
    return config._replace(BM=depth(config.BK, columns, ranks, sizes[1] == 4), BN=columns, warps=warps)


@planned
def _plan(
    chip: str, m: int, n: int, k: int, rt: int, rp: int, dy_strides: tuple[int, ...], t_strides: tuple[int, ...],
    x_strides: tuple[int, ...], p_strides: tuple[int, ...], sizes: tuple[int, int], precisions: tuple[str, str],
    prob: float, scale: float,
) -> Launch:  # fmt: skip
    """A 1D grid: (column tiles of dy) x (rank tiles of t), then (column tiles of x) x (rank tiles of p).

    What is absent has n or k of 0.
    """
    brt, brp = rank_tile(rt), rank_tile(rp)
    rank_tiles_t, rank_tiles_p = cdiv(rt, brt), cdiv(rp, brp)
    drops = threshold(prob) > 0
    bm, bc, _, warps, stages = gradient_tile(
        chip, lambda size: (cdiv(n, size) * rank_tiles_t, cdiv(k, size) * rank_tiles_p), n + k, max(brt, brp), sizes,
        precisions[0] if n else precisions[1], drops,
    )  # fmt: skip
    db_tiles, da_tiles = cdiv(n, bc), cdiv(k, bc)
    db_programs = db_tiles * rank_tiles_t
    return Launch(
        factor_grads_kernel,
        (db_programs + da_tiles * rank_tiles_p,),
        M=m,
        N=n,
        K=k,
        RT=rt,
        RP=rp,
        stride_dm=dy_strides[0],
        stride_dn=dy_strides[1],
        stride_tm=t_strides[0],
        stride_tr=t_strides[1],
        stride_xm=x_strides[0],
        stride_xk=x_strides[1],
        stride_pm=p_strides[0],
        stride_pr=p_strides[1],
        db_tiles=db_tiles,
        da_tiles=da_tiles,
        db_programs=db_programs,
        threshold=threshold(prob),
        db_scale=scale,
        da_scale=keep_scale(prob),
        DB=n > 0,
        DA=k > 0,
        DROP=drops,
        BM=bm,
        BC=bc,
        BRT=brt,
        BRP=brp,
        UNIT_T=unit(rt, t_strides[0]),
        UNIT_P=unit(rp, p_strides[0]),
        PRECISION_B=precisions[0],
        PRECISION_A=precisions[1],
        num_warps=warps,
        num_stages=stages,
    )


def _half(chip: str, x: Tensor | None, f: Tensor | None) -> tuple[int, int, tuple, tuple, str, int]:
    """What there is to know of activations [M, C] and their factor [M, R]: C, R, strides, how they are multiplied, and
    the bytes of an element of the factor."""
    if x is None:
        return 0, 0, (0, 0), (0, 0), "ieee", 0
    return x.shape[1], f.shape[1], x.stride(), f.stride(), exact_precision(chip, x.dtype, f.dtype), f.dtype.itemsize


def lora_factor_grads(
    dy: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    prob: float,
    scale: float,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> list[Tensor]:
    """One launch; pointers that it does not read still have to be some."""
    some = x if dy is None else dy
    m, device = some.shape[0], some.device
    chip = chip_of(device)
    n, rt, dy_strides, t_strides, precision_b, t_size = _half(chip, dy, t)
    k, rp, x_strides, p_strides, precision_a, p_size = _half(chip, x, p)
    prob = 0.0 if x is None else prob
    seed = seed_or(seed, prob, some)
    grads = [] if dy is None else [torch.empty(n, rt, dtype=db_dtype, device=device)]
    grads += [] if x is None else [torch.empty(rp, k, dtype=da_dtype, device=device)]
    if m == 0:
        return [grad.zero_() for grad in grads]
    launch = _plan(
        chip, m, n, k, rt, rp, dy_strides, t_strides, x_strides, p_strides,
        (some.dtype.itemsize, max(t_size, p_size)), (precision_b, precision_a), prob, scale,
    )  # fmt: skip
    launch(
        some if dy is None else dy, some if t is None else t, grads[0],
        some if x is None else x, some if p is None else p, grads[-1], seed,
    )  # fmt: skip
    return grads


def variants(chip: str):
    """What `lora_factor_grads` launches, for ahead-of-time checks."""
    for x, f, (rt, rp), drop, width in (
        ("bf16", "bf16", (16, 16), False, WIDTH),
        ("bf16", "bf16", (16, 16), True, WIDTH),
        ("bf16", "bf16", (16, 16), True, 2 * WIDTH),
        ("bf16", "bf16", (16, 16), True, 1024),
        ("bf16", "bf16", (16, 0), False, 2 * WIDTH),
        ("bf16", "bf16", (16, 64), False, WIDTH),
        ("fp16", "fp16", (64, 64), False, WIDTH),
        ("bf16", "bf16", (128, 128), True, WIDTH),
        ("bf16", "bf16", (256, 256), True, 2 * WIDTH),
        ("bf16", "fp32", (16, 16), True, WIDTH),
        ("bf16", "fp32", (128, 128), True, WIDTH),
        ("fp32", "fp32", (16, 16), False, WIDTH),
        ("fp32", "fp32", (128, 128), False, WIDTH),
    ):
        n, k = (width, width) if rp else (width, 0)
        x_dtype, f_dtype = DTYPES[x], DTYPES[f]
        precision = exact_precision(chip, x_dtype, f_dtype)
        launch = _plan(
            chip, ROWS, n, k, rt, rp, (n, 1), (rt, 1), (k, 1), (rp, 1), (x_dtype.itemsize, f_dtype.itemsize),
            (precision, precision), 0.1 * drop, 2.0,
        )  # fmt: skip
        pointers = {"dy_ptr": x, "t_ptr": f, "db_ptr": "fp32", "x_ptr": x, "p_ptr": f, "da_ptr": "fp32"}
        name = f"C{launch.arguments['BC']} R{rt}/{rp}{' drop' * drop}{' wide' * (x != f)}"
        yield Variant(
            f"lora_factor_grads {x} N{width} {name}",
            launch,
            {**pointers, "seed_ptr": "i64"},
            matrix=NO_MATRIX if x == "fp32" else ANY_MATRIX,
            quick=rt == 16 and x == f == "bf16",
        )
