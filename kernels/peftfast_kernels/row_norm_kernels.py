"""Triton: the norm of each row of W + s B A from one read of the stored weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, rank_tile, tile
from peftfast_kernels.decode import Operand
from peftfast_kernels.decode_kernels import Stored, decode_arguments, stored, stored_variant
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.row_norm import MAX_RANK
from peftfast_kernels.tiles import exact_product
from peftfast_kernels.variants import ANY_MATRIX, WIDTH, Variant


@triton.jit
def add_squares(w, acc, BY_ONES: tl.constexpr):
    """acc [BN, 16] + the squares of each row, some in every column.

    BY_ONES: as products of ones and the squares, which have 16 bits, in two parts. Then products are all that a stored
    bfloat16 w is for, and it lies in shared memory as those read it best; for sums by rows it would not, and they would
    wait for it eight times as long.
    """
    square = w.to(tl.float32) * w.to(tl.float32)
    if BY_ONES:
        ones = tl.full((w.shape[1], 16), 1 / 16, tl.bfloat16)
        most = square.to(tl.bfloat16)
        acc = tl.dot(tl.where(square == most, 0.0, square - most).to(tl.bfloat16), ones, acc)
        return tl.dot(most, ones, acc)
    return acc + tl.sum(square, axis=1)[:, None] * (1 / 16)


@triton.jit
def norm_kernel(
    w0, w1, w2, w3, w4, table, a_ptr, b_ptr, gram_ptr, out_ptr,
    N, K, R, stride_n, stride_k, stride_ar, stride_ak, stride_bn, stride_br, scale,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    BY_ONES: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program i computes BN norms, with BS columns of the Gram matrix at a time.

    a_ptr: [R, K]; b_ptr: [N, R]; gram_ptr: fp32 [R, R]; out_ptr: [N].
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    row_in = rows < N
    product = tl.zeros((BN, BR), tl.float32)
    squares = tl.zeros((BN, 16), tl.float32)
    for k in range(0, K, BK):
        w = DECODE(
            w0, w1, w2, w3, w4, table, rows, k, N, K, stride_n, stride_k, BK, BLOCK, NESTED, LAYOUT, DTYPE, INTERP
        )  # fmt: skip
        cols = k + tl.arange(0, BK)
        a = tl.load(
            a_ptr + ranks[None, :].to(tl.int64) * stride_ar + cols[:, None].to(tl.int64) * stride_ak,
            mask=(ranks[None, :] < R) & (cols[:, None] < K),
            other=0.0,
        ).to(tl.float32)
        product = exact_product(w, a, product, PRECISION, INTERP)
        squares = add_squares(w, squares, BY_ONES)
    b = tl.load(
        b_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br,
        mask=row_in[:, None] & (ranks[None, :] < R),
        other=0.0,
    ).to(tl.float32)
    squared = tl.sum(squares, axis=1) + tl.sum(product * b, axis=1) * scale * 2
    for r in range(0, BR, BS):
        some = r + tl.arange(0, BS)
        in_both = (ranks[:, None] < R) & (some[None, :] < R)
        gram = tl.load(gram_ptr + ranks[:, None] * R + some[None, :], mask=in_both, other=0.0)
        strip = tl.load(
            b_ptr + rows[:, None] * stride_bn + some[None, :] * stride_br,
            mask=row_in[:, None] & (some[None, :] < R),
            other=0.0,
        ).to(tl.float32)
        squared += tl.sum(tl.dot(b, gram, input_precision=PRECISION) * strip, axis=1) * scale * scale
    tl.store(out_ptr + rows, tl.sqrt(tl.maximum(squared, 0.0, propagate_nan=tl.PropagateNan.ALL)), mask=row_in)


@planned
def _plan(
    chip: str, w: Stored, r: int, a_strides: tuple[int, ...], b_strides: tuple[int, ...], scale: float
) -> Launch:  # fmt: skip
    """A 1D grid, one program per BN rows."""
    config = tile("row_norm", chip)
    nvidia, br = chip.startswith("sm_"), rank_tile(r, MAX_RANK)
    # what is read as it is takes no registers but the products': of few ranks, more of it can be under way
    by_ones = nvidia and br <= 32 and w.format.startswith("dense") and w.dtype is torch.bfloat16
    if by_ones:
        config = config._replace(BK=2 * config.BK, stages=config.stages + 1)
    bk = max(16, min(config.BK, 4096 // br))  # which leaves a wide rank room in shared memory
    return Launch(
        norm_kernel,
        (cdiv(w.shape[0], config.BM),),
        **decode_arguments(w, bk),
        R=r,
        stride_ar=a_strides[0],
        stride_ak=a_strides[1],
        stride_bn=b_strides[0],
        stride_br=b_strides[1],
        scale=scale,
        BN=config.BM,
        BK=bk,
        BR=br,
        BS=min(br, 8192 // br),
        BY_ONES=by_ones,
        # squares cancel where B A undoes W, so plain TF32 is never good enough here
        PRECISION="tf32x3" if nvidia else "ieee",
        # twice as many where a program's ranks do not fit into the registers of few
        num_warps=config.warps * (2 if nvidia and r > 64 else 1),
        num_stages=config.stages,
        enable_fp_fusion=False,  # the decode rounds step by step
    )


def row_norm(w: Operand, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch beside the product of the factors. Raises ``ValueError`` for a rank above MAX_RANK."""
    n, r = w.shape[0], a.shape[0]
    if r > MAX_RANK:
        raise ValueError(f"row_norm: rank {r} is above {MAX_RANK}, the most the kernel holds")
    out = torch.empty(n, dtype=torch.float32, device=a.device)
    if n:
        kind, pointers = stored(w)
        launch = _plan(chip_of(a.device), kind, r, a.stride(), b.stride(), scale)
        wide = a.float()
        launch(*pointers, a, b, wide @ wide.t(), out)
    return out


def variants(chip: str):
    """What `row_norm` launches, for ahead-of-time checks."""
    for format, rank in (("dense", 16), ("dense", 64), ("nf4", 16), ("dense", 128), ("nf4", 128)):
        w, pointers = stored_variant(format, WIDTH, WIDTH, format == "nf4", "bf16")
        pointers |= {"a_ptr": "fp32", "b_ptr": "fp32", "gram_ptr": "fp32", "out_ptr": "fp32"}
        launch = _plan(chip, w, rank, (WIDTH, 1), (rank, 1), 2.0)
        yield Variant(f"row_norm {format} R{rank}", launch, pointers, matrix=ANY_MATRIX)
