"""Triton: t = drop(x) aᵀ. The mask is applied to x in registers, its scale to the fp32 sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import Tile, chip_of, dot_precision, rank_tile, splits, tile
from peftfast_kernels.keep_mask import keep_scale, threshold
from peftfast_kernels.op import is_interpreting
from peftfast_kernels.tiles import keep_tile, narrow, operand, row_keys, sum_parts
from peftfast_kernels.variants import ANY_MATRIX, NO_MATRIX, Variant


@triton.jit
def down_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    t_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    k_per_part,
    threshold,
    scale,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):
    """Program (i, j, s) computes BM rows and BR ranks of t over the s-th part of the contraction.

    x_ptr: [M, K], a_ptr: [R, K], seed_ptr: int64 []; t_ptr: [parts, M, R] contiguous, in its own dtype.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    k_first = tl.program_id(2) * k_per_part
    k_last = tl.minimum(k_first + k_per_part, K)
    row_in = rows[:, None] < M
    rank_in = ranks[None, :] < R
    if DROP:
        keys = row_keys(seed_ptr, rows)
    acc = tl.zeros((BM, BR), tl.float32)
    for k in range(k_first, k_last, BK):
        cols = k + tl.arange(0, BK)
        wide_cols = cols.to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + wide_cols[None, :] * stride_xk,
            mask=row_in & (cols[None, :] < k_last),
            other=0.0,
        )
        a = tl.load(
            a_ptr + ranks[None, :].to(tl.int64) * stride_ar + wide_cols[:, None] * stride_ak,
            mask=rank_in & (cols[:, None] < k_last),
            other=0.0,
        )
        x = operand(x, INTERP).to(operand(a, INTERP).dtype)
        if DROP:
            x = tl.where(keep_tile(keys, cols, threshold), x, 0.0)
        acc = tl.dot(x, operand(a, INTERP), acc, input_precision=PRECISION)
    offsets = tl.program_id(2).to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
    tl.store(t_ptr + offsets, narrow(acc * scale, t_ptr.dtype.element_ty, INTERP), mask=row_in & rank_in)


def contraction_tile(config: Tile, rank_tile: int, single: bool) -> int:
    """Columns per step: fp32 tiles and wide ranks take twice the shared memory each."""
    return max(config.BK // (2 if single else 1) // (2 if rank_tile > 64 else 1), 16)


def lora_down(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """Launches a 3D grid (row tiles, rank tiles, parts of the contraction) and adds the parts in order."""
    (m, k), r = x.shape, a.shape[0]
    t = torch.empty(m, r, dtype=a.dtype, device=a.device)
    if m == 0:
        return t
    dropping = threshold(prob) > 0
    if dropping and seed is None:
        raise ValueError(f"dropout with probability {prob} needs a seed tensor")
    chip = chip_of(x.device)
    interp = is_interpreting()
    config = tile("lora_down", chip)
    br = rank_tile(r)
    bk = contraction_tile(config, br, a.dtype == torch.float32)
    tiles = triton.cdiv(m, config.BM) * triton.cdiv(r, br)
    parts = splits(tiles, triton.cdiv(k, 4 * bk), wanted=256)
    k_per_part = triton.cdiv(triton.cdiv(k, parts), bk) * bk
    parts = triton.cdiv(k, k_per_part)
    out = t if parts == 1 else torch.empty(parts, m, r, dtype=torch.float32, device=a.device)
    down_kernel[(triton.cdiv(m, config.BM), triton.cdiv(r, br), parts)](
        x_ptr=x,
        a_ptr=a,
        seed_ptr=seed if dropping else x,
        t_ptr=out,
        M=m,
        K=k,
        R=r,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        k_per_part=k_per_part,
        threshold=threshold(prob),
        scale=keep_scale(prob) if dropping else 1.0,
        DROP=dropping,
        BM=config.BM,
        BR=br,
        BK=bk,
        PRECISION=dot_precision(chip, x.dtype, a.dtype),
        INTERP=interp,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts > 1:
        sum_parts(out, t, 1.0, interp)
    return t


def variants(chip: str):
    """What `lora_down` launches, for ahead-of-time checks."""
    config = tile("lora_down", chip)
    for x, a, rank, drop in (
        ("bf16", "bf16", 16, False),
        ("bf16", "bf16", 16, True),
        ("fp16", "fp16", 64, False),
        ("bf16", "bf16", 128, True),
        ("bf16", "fp32", 16, True),
        ("fp32", "fp32", 16, False),
    ):
        wide = x != a
        yield Variant(
            name=f"lora_down {x} R{rank}{' drop' * drop}{' wide' * wide}",
            kernel=down_kernel,
            pointers={"x_ptr": x, "a_ptr": a, "seed_ptr": "i64", "t_ptr": "fp32"},
            constexprs={
                "stride_xk": 1,
                "stride_ak": 1,
                "DROP": drop,
                "BM": config.BM,
                "BR": rank_tile(rank),
                "BK": contraction_tile(config, rank_tile(rank), a == "fp32"),
                "PRECISION": dot_precision(chip, torch.bfloat16 if wide else torch.float32),
                "INTERP": False,
            },
            warps=config.warps,
            stages=config.stages,
            matrix=NO_MATRIX if x == "fp32" else ANY_MATRIX,
            quick=rank == 16 and drop and not wide,
        )
