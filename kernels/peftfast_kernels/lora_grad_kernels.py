"""Triton: db = s dyᵀ t and da = pᵀ drop(x) in one launch. Every tile of columns, of dy or of x, has one owner."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import PROGRAMS, cdiv, chip_of, depth, dot_precision, owned, rank_tile, tile
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_down_kernels import unit
from peftfast_kernels.tiles import keep_tile, narrow, operand, row_keys
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, ROWS, Variant


@triton.jit
def column_gradient(
    first_col, first_rank, x_ptr, f_ptrs, seed_ptrs, out_ptrs,
    M, C, RS, stride_xm, stride_xc, strides_fm, stride_fr, stride_oc, stride_or, thresholds, scales,
    DROP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """scale_i * f_iᵀ drop_i(x) for BC columns and BR ranks, for every factor of a tuple: x_ptr [M, C], read once for
    all; f_ptrs [M, R_i]; out_ptrs [R_i, C], all with the same strides.

    R_i and strides_fm are multiples of UNIT.
    """
    cols = first_col + tl.arange(0, BC)
    ranks = first_rank + tl.arange(0, BR)
    wide_cols = cols.to(tl.int64)[None, :]
    col_in = cols[None, :] < C
    accs = ()
    for _ in tl.static_range(len(f_ptrs)):
        accs = accs + (tl.zeros((BR, BC), tl.float32),)
    for m in range(0, M, BM):
        rows = m + tl.arange(0, BM).to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + wide_cols * stride_xc, mask=(rows[:, None] < M) & col_in, other=0.0
        )
        x = operand(x, INTERP)
        sums = ()
        for i in tl.static_range(len(f_ptrs)):
            rank_in = ranks[:, None] < RS[i] // UNIT * UNIT  # what the compiler then knows, see `strip`
            # Read transposed, so that the product needs no transposition of a register tile.
            f = tl.load(
                f_ptrs[i] + rows[None, :] * (strides_fm[i] // UNIT * UNIT) + ranks[:, None] * stride_fr,
                mask=(rows[None, :] < M) & rank_in,
                other=0.0,
            )
            f = operand(f, INTERP)
            kept = x.to(f.dtype)
            if DROP:
                kept = tl.where(keep_tile(row_keys(seed_ptrs[i], rows), cols, thresholds[i]), kept, 0.0)
            sums = sums + (tl.dot(f, kept, accs[i], input_precision=PRECISION),)
        accs = sums
    for i in tl.static_range(len(f_ptrs)):
        out = out_ptrs[i] + wide_cols * stride_oc + ranks[:, None].to(tl.int64) * stride_or
        value = narrow(accs[i] * scales[i], out_ptrs[i].dtype.element_ty, INTERP)
        tl.store(out, value, mask=col_in & (ranks[:, None] < RS[i] // UNIT * UNIT))


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


def grad_warps(warps: int, single: bool) -> int:
    """fp32 factors are multiplied without, or with three, matrix products: twice the warps halve their registers."""
    return warps * 2 if single else warps


@planned
def _plan(
    chip: str, m: int, n: int, k: int, rt: int, rp: int, dy_strides: tuple[int, ...], t_strides: tuple[int, ...],
    x_strides: tuple[int, ...], p_strides: tuple[int, ...], single: bool, precisions: tuple[str, str], prob: float,
    scale: float,
) -> Launch:  # fmt: skip
    """A 1D grid: (column tiles of dy) x (rank tiles of t), then (column tiles of x) x (rank tiles of p).

    What is absent has n or k of 0.
    """
    config = tile("lora_grad", chip)
    brt, brp = rank_tile(rt), rank_tile(rp)
    rank_tiles_t, rank_tiles_p = cdiv(rt, brt), cdiv(rp, brp)
    bc = owned(config.BN, lambda size: cdiv(n, size) * rank_tiles_t + cdiv(k, size) * rank_tiles_p)
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
        DROP=threshold(prob) > 0,
        BM=depth(config.BK, bc, max(brt, brp), single),
        BC=bc,
        BRT=brt,
        BRP=brp,
        UNIT_T=unit(rt, t_strides[0]),
        UNIT_P=unit(rp, p_strides[0]),
        PRECISION_B=precisions[0],
        PRECISION_A=precisions[1],
        num_warps=grad_warps(config.warps, single),
        num_stages=config.stages,
    )


def _half(chip: str, x: Tensor | None, f: Tensor | None) -> tuple[int, int, tuple, tuple, str, bool]:
    """What there is to know of activations [M, C] and their factor [M, R]: C, R, strides, how they are multiplied, and
    whether the factor is fp32."""
    if x is None:
        return 0, 0, (0, 0), (0, 0), "ieee", False
    single = f.dtype is torch.float32
    return x.shape[1], f.shape[1], x.stride(), f.stride(), dot_precision(chip, x.dtype, f.dtype), single


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
    n, rt, dy_strides, t_strides, precision_b, single_b = _half(chip, dy, t)
    k, rp, x_strides, p_strides, precision_a, single_a = _half(chip, x, p)
    prob = 0.0 if x is None else prob
    seed = seed_or(seed, prob, some)
    grads = [] if dy is None else [torch.empty(n, rt, dtype=db_dtype, device=device)]
    grads += [] if x is None else [torch.empty(rp, k, dtype=da_dtype, device=device)]
    if m == 0:
        return [grad.zero_() for grad in grads]
    launch = _plan(
        chip, m, n, k, rt, rp, dy_strides, t_strides, x_strides, p_strides, single_b or single_a,
        (precision_b, precision_a), prob, scale,
    )  # fmt: skip
    launch(
        some if dy is None else dy, some if t is None else t, grads[0],
        some if x is None else x, some if p is None else p, grads[-1], seed,
    )  # fmt: skip
    return grads


def variants(chip: str):
    """What `lora_factor_grads` launches, for ahead-of-time checks."""
    largest = tile("lora_grad", chip).BN
    for x, f, (rt, rp), drop, bc in (
        ("bf16", "bf16", (16, 16), True, largest),
        ("bf16", "bf16", (16, 16), True, largest // 2),
        ("bf16", "bf16", (16, 16), True, 16),
        ("bf16", "bf16", (16, 0), False, largest),
        ("bf16", "bf16", (16, 64), False, largest),
        ("fp16", "fp16", (64, 64), False, largest),
        ("bf16", "bf16", (128, 128), True, largest),
        ("bf16", "fp32", (16, 16), True, largest),
        ("bf16", "fp32", (128, 128), True, largest),
        ("fp32", "fp32", (16, 16), False, largest),
    ):
        n = PROGRAMS * bc  # of dy and of x together
        n, k = (n // 2, n // 2) if rp else (n, 0)
        precision = dot_precision(chip, DTYPES[x], DTYPES[f])
        launch = _plan(
            chip, ROWS, n, k, rt, rp, (n, 1), (rt, 1), (k, 1), (rp, 1), f == "fp32", (precision, precision), 0.1 * drop,
            2.0,
        )  # fmt: skip
        pointers = {"dy_ptr": x, "t_ptr": f, "db_ptr": "fp32", "x_ptr": x, "p_ptr": f, "da_ptr": "fp32"}
        yield Variant(
            f"lora_factor_grads {x} C{bc} R{rt}/{rp}{' drop' * drop}{' wide' * (x != f)}",
            launch,
            {**pointers, "seed_ptr": "i64"},
            matrix=NO_MATRIX if x == "fp32" else ANY_MATRIX,
            quick=rt == 16 and x == f == "bf16",
        )
