"""Triton: p and db from one read of dy, da from one read of x; fp32 partial sums, added in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import Tile, chip_of, dot_precision, rank_tile, splits, tile
from peftfast_kernels.keep_mask import keep_scale, threshold
from peftfast_kernels.op import is_interpreting
from peftfast_kernels.tiles import keep_tile, narrow, operand, row_keys, sum_parts, sum_parts_kernel
from peftfast_kernels.variants import ANY_MATRIX, NO_MATRIX, Variant


@triton.jit
def up_grad_kernel(
    dy_ptr, t_ptr, b_ptr, p_ptr, db_ptr,
    M, N, R, stride_dm, stride_dn, stride_tm, stride_tr, stride_bn, stride_br, rows_per_part, p_scale, db_scale,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j, s) reads BN columns of the s-th part of dy's rows once, for ranks j * BR on.

    dy_ptr: [M, N]; t_ptr: [M, R]; b_ptr: [N, R]. p_ptr: [column tiles, M, R], the part of dy b that these columns
    give; db_ptr: [parts, N, R], the part of dyᵀ t that these rows give.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    first = tl.program_id(2).to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    col_in = cols < N
    rank_in = ranks < R
    b = tl.load(
        b_ptr + cols[:, None].to(tl.int64) * stride_bn + ranks[None, :] * stride_br,
        mask=col_in[:, None] & rank_in[None, :],
        other=0.0,
    )
    b = operand(b, INTERP)
    db = tl.zeros((BN, BR), tl.float32)
    p_plane = p_ptr + tl.program_id(0).to(tl.int64) * M * R
    for m in range(first, last, BM):
        rows = m + tl.arange(0, BM)
        row_in = rows < last
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dm + cols[None, :].to(tl.int64) * stride_dn,
            mask=row_in[:, None] & col_in[None, :],
            other=0.0,
        )
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + ranks[None, :] * stride_tr,
            mask=row_in[:, None] & rank_in[None, :],
            other=0.0,
        )
        dy = operand(dy, INTERP).to(b.dtype)
        p = tl.dot(dy, b, input_precision=PRECISION)
        db = tl.dot(tl.trans(dy), operand(t, INTERP), db, input_precision=PRECISION)
        tl.store(
            p_plane + rows[:, None] * R + ranks[None, :],
            narrow(p * p_scale, p_ptr.dtype.element_ty, INTERP),
            mask=row_in[:, None] & rank_in[None, :],
        )
    db_plane = db_ptr + tl.program_id(2).to(tl.int64) * N * R
    tl.store(
        db_plane + cols[:, None].to(tl.int64) * R + ranks[None, :],
        narrow(db * db_scale, db_ptr.dtype.element_ty, INTERP),
        mask=col_in[:, None] & rank_in[None, :],
    )


@triton.jit
def down_grad_kernel(
    x_ptr, p_ptr, seed_ptr, da_ptr,
    M, K, R, stride_xm, stride_xk, stride_pm, stride_pr, rows_per_part, threshold, scale,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j, s) computes BR ranks and BK columns of pᵀ drop(x) over the s-th part of the rows.

    x_ptr: [M, K]; p_ptr: [M, R]; da_ptr: [parts, R, K] contiguous, in its own dtype.
    """
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    first = tl.program_id(2).to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    col_in = cols[None, :] < K
    acc = tl.zeros((BR, BK), tl.float32)
    for m in range(first, last, BM):
        rows = m + tl.arange(0, BM)
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + cols[None, :].to(tl.int64) * stride_xk,
            mask=(rows[:, None] < last) & col_in,
            other=0.0,
        )
        # Read transposed, so that the product needs no transposition of a register tile.
        p = tl.load(
            p_ptr + rows[None, :] * stride_pm + ranks[:, None] * stride_pr,
            mask=(rows[None, :] < last) & (ranks[:, None] < R),
            other=0.0,
        )
        p = operand(p, INTERP)
        x = operand(x, INTERP).to(p.dtype)
        if DROP:
            x = tl.where(keep_tile(row_keys(seed_ptr, rows), cols, threshold), x, 0.0)
        acc = tl.dot(p, x, acc, input_precision=PRECISION)
    offsets = tl.program_id(2).to(tl.int64) * R * K + ranks[:, None].to(tl.int64) * K + cols[None, :]
    tl.store(da_ptr + offsets, narrow(acc * scale, da_ptr.dtype.element_ty, INTERP), mask=(ranks[:, None] < R) & col_in)


def warps_of(config: Tile, single: bool) -> int:
    """fp32 factors are multiplied without, or with three, matrix products: twice the warps halve their registers."""
    return config.warps * 2 if single else config.warps


def row_tile(config: Tile, single: bool) -> int:
    """Rows per step: fp32 tiles take twice the shared memory."""
    return config.BM // 2 if single and config.BM > 32 else config.BM


def _rows_per_part(m: int, tiles: int, bm: int) -> int:
    # At least 8 row tiles per part: every part costs a plane of fp32 partial sums.
    parts = splits(tiles, triton.cdiv(m, 8 * bm))
    return triton.cdiv(triton.cdiv(m, parts), bm) * bm


def lora_up_grad(dy: Tensor, t: Tensor, b: Tensor, scale: float, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launches a 3D grid (column tiles, rank tiles, parts of the rows), then adds the planes of p and db in order."""
    (m, n), r = dy.shape, t.shape[1]
    p = torch.empty(m, r, dtype=b.dtype, device=b.device)
    db = torch.empty(n, r, dtype=grad_dtype, device=b.device)
    if m == 0 or n == 0:
        return p.zero_(), db.zero_()
    chip, interp = chip_of(dy.device), is_interpreting()
    config = tile("lora_up_grad", chip)
    br = rank_tile(r, 64)
    bm = row_tile(config, b.dtype == torch.float32)
    planes = triton.cdiv(n, config.BN)
    rows_per_part = _rows_per_part(m, planes * triton.cdiv(r, br), bm)
    parts = triton.cdiv(m, rows_per_part)
    p_out = p if planes == 1 else torch.empty(planes, m, r, dtype=torch.float32, device=b.device)
    db_out = db if parts == 1 else torch.empty(parts, n, r, dtype=torch.float32, device=b.device)
    up_grad_kernel[(planes, triton.cdiv(r, br), parts)](
        dy_ptr=dy,
        t_ptr=t,
        b_ptr=b,
        p_ptr=p_out,
        db_ptr=db_out,
        M=m,
        N=n,
        R=r,
        stride_dm=dy.stride(0),
        stride_dn=dy.stride(1),
        stride_tm=t.stride(0),
        stride_tr=t.stride(1),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        rows_per_part=rows_per_part,
        p_scale=scale if planes == 1 else 1.0,
        db_scale=scale if parts == 1 else 1.0,
        BM=bm,
        BN=config.BN,
        BR=br,
        PRECISION=dot_precision(chip, dy.dtype, b.dtype),
        INTERP=interp,
        num_warps=warps_of(config, b.dtype == torch.float32),
        num_stages=config.stages,
    )
    if planes > 1:
        sum_parts(p_out, p, scale, interp)
    if parts > 1:
        sum_parts(db_out, db, scale, interp)
    return p, db


def lora_down_grad(x: Tensor, p: Tensor, seed: Tensor | None, prob: float, grad_dtype: torch.dtype) -> Tensor:
    """Launches a 3D grid (column tiles, rank tiles, parts of the rows), then adds the parts in order."""
    (m, k), r = x.shape, p.shape[1]
    da = torch.empty(r, k, dtype=grad_dtype, device=x.device)
    if m == 0 or k == 0:
        return da.zero_()
    dropping = threshold(prob) > 0
    if dropping and seed is None:
        raise ValueError(f"dropout with probability {prob} needs a seed tensor")
    chip, interp = chip_of(x.device), is_interpreting()
    config = tile("lora_down_grad", chip)
    br = rank_tile(r, 64)
    bm = row_tile(config, p.dtype == torch.float32)
    tiles = triton.cdiv(k, config.BN) * triton.cdiv(r, br)
    rows_per_part = _rows_per_part(m, tiles, bm)
    parts = triton.cdiv(m, rows_per_part)
    out = da if parts == 1 else torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    scale = keep_scale(prob) if dropping else 1.0
    down_grad_kernel[(triton.cdiv(k, config.BN), triton.cdiv(r, br), parts)](
        x_ptr=x,
        p_ptr=p,
        seed_ptr=seed if dropping else x,
        da_ptr=out,
        M=m,
        K=k,
        R=r,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_pm=p.stride(0),
        stride_pr=p.stride(1),
        rows_per_part=rows_per_part,
        threshold=threshold(prob),
        scale=scale if parts == 1 else 1.0,
        DROP=dropping,
        BM=bm,
        BK=config.BN,
        BR=br,
        PRECISION=dot_precision(chip, x.dtype, p.dtype),
        INTERP=interp,
        num_warps=warps_of(config, p.dtype == torch.float32),
        num_stages=config.stages,
    )
    if parts > 1:
        sum_parts(out, da, scale, interp)
    return da


def variants(chip: str):
    """What the gradients launch, for ahead-of-time checks."""
    for x, f, rank, drop in (
        ("bf16", "bf16", 16, True),
        ("fp16", "fp16", 64, False),
        ("bf16", "fp32", 16, True),
        ("fp32", "fp32", 16, False),
    ):
        wide = x != f
        name = f"{x} R{rank}{' wide' * wide}"
        precision = dot_precision(chip, torch.bfloat16 if wide else torch.float32)
        matrix = NO_MATRIX if x == "fp32" else ANY_MATRIX
        config = tile("lora_up_grad", chip)
        yield Variant(
            name=f"lora_up_grad {name}",
            kernel=up_grad_kernel,
            pointers={"dy_ptr": x, "t_ptr": f, "b_ptr": f, "p_ptr": "fp32", "db_ptr": "fp32"},
            constexprs={
                "stride_dn": 1,
                "stride_tr": 1,
                "stride_br": 1,
                "BM": row_tile(config, f == "fp32"),
                "BN": config.BN,
                "BR": rank_tile(rank, 64),
                "PRECISION": precision,
                "INTERP": False,
            },
            warps=warps_of(config, f == "fp32"),
            stages=config.stages,
            matrix=matrix,
            quick=rank == 16 and x == f == "bf16",
        )
        config = tile("lora_down_grad", chip)
        yield Variant(
            name=f"lora_down_grad {name}{' drop' * drop}",
            kernel=down_grad_kernel,
            pointers={"x_ptr": x, "p_ptr": f, "seed_ptr": "i64", "da_ptr": "fp32"},
            constexprs={
                "stride_xk": 1,
                "stride_pr": 1,
                "DROP": drop,
                "BM": row_tile(config, f == "fp32"),
                "BK": config.BN,
                "BR": rank_tile(rank, 64),
                "PRECISION": precision,
                "INTERP": False,
            },
            warps=warps_of(config, f == "fp32"),
            stages=config.stages,
            matrix=matrix,
            quick=rank == 16 and x == f == "bf16",
        )
    yield Variant(
        name="sum_parts",
        kernel=sum_parts_kernel,
        pointers={"parts_ptr": "fp32", "out_ptr": "bf16"},
        constexprs={"BLOCK": 1024, "INTERP": False},
        warps=4,
    )
