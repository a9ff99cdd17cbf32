"""Triton: the norm of each row of W + s B A from one read of the stored weight."""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    MANY_SUMS,
    Tile,
    cdiv,
    chip_of,
    fed_by_warps,
    powers,
    rank_tile,
    tile,
    waiting,
)
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
def whole_norm(squared, rows, b_ptr, gram_ptr, out_ptr, N, R, stride_bn, stride_br, scale,
               BR: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Stores the root of `squared` + ‖s B A‖² of these rows, with BS columns of the Gram matrix at a time."""
    ranks = tl.arange(0, BR)
    row_in = rows < N
    b = tl.load(
        b_ptr + rows[:, None] * stride_bn + ranks[None, :] * stride_br,
        mask=row_in[:, None] & (ranks[None, :] < R),
        other=0.0,
    ).to(tl.float32)
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


@triton.jit
def norm_kernel(
    w0, w1, w2, w3, w4, table, a_ptr, b_ptr, gram_ptr, out_ptr,
    N, K, R, stride_n, stride_k, stride_ar, stride_ak, stride_bn, stride_br, scale,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
    BY_ONES: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BN norms, or the j-th of PARTS of ‖W‖² + 2 s Σ W Aᵀ ∘ B; with PARTS of 0, the norms.

    a_ptr: [R, K]; b_ptr: [N, R]; gram_ptr: fp32 [R, R]; out_ptr: fp32 [N], or, in PARTS, [PARTS, N].
    """
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    row_in = rows < N
    first, last = 0, K
    if PARTS > 1:
        each = tl.cdiv(tl.cdiv(K, BK), PARTS) * BK
        first = tl.program_id(1) * each
        last = min(first + each, K)
    product = tl.zeros((BN, BR), tl.float32)
    squares = tl.zeros((BN, 16), tl.float32)
    for k in range(first, tl.maximum(last, first + 1), BK):
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
    if PARTS:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * N + rows, squared, mask=row_in)
    else:
        whole_norm(squared, rows, b_ptr, gram_ptr, out_ptr, N, R, stride_bn, stride_br, scale, BR, BS, PRECISION)


@triton.jit
def norm_sum_kernel(
    part_ptr, b_ptr, gram_ptr, out_ptr, N, R, stride_bn, stride_br, scale,
    PARTS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program i computes BN norms of the parts of their squares, fp32 [PARTS, N], in their order."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squared = tl.zeros((BN,), tl.float32)
    for i in tl.static_range(PARTS):
        squared += tl.load(part_ptr + tl.cast(i, tl.int64) * N + rows, mask=rows < N, other=0.0)
    whole_norm(squared, rows, b_ptr, gram_ptr, out_ptr, N, R, stride_bn, stride_br, scale, BR, BS, PRECISION)


#: Elements of a mask that take as long to make as a weight to decode; cycles that a launch takes GPU and host; and for
#: how many a byte of a factor counts that a program takes apart and has in parts in shared memory (at least;
#: `tools/emulate.py --traffic`). Predictions, as `configs.waiting`.
_DECODED, _LAUNCH, _TAKEN_APART = 0.8, 8800, 1.5


def norm_tile(chip: str, w: Stored, r: int, size: int) -> tuple[Tile, int]:
    """The tile of one program, and in how many parts the squares are summed, 0 for all in one launch; see
    `lora_down_kernels.strip_tile`. Every program of a part reads all of it of the factor `a`, whose elements have
    `size` bytes."""
    config = tile("row_norm", chip)
    (n, k), dense, br = w.shape, w.format.startswith("dense"), rank_tile(r, MAX_RANK)
    stored = w.dtype.itemsize if dense else 1
    # what is read as it is takes no registers but the products': of few ranks, more of it can be under way
    bk, stages = (2 * config.BK, config.stages + 1) if _by_ones(chip, w, br) else (config.BK, config.stages)

    # what `exact_product` does not take as it is counts more in registers, beside what is decoded most
    held = br * (1 if w.dtype is torch.bfloat16 or not chip.startswith("sm_") else 2 if dense else 4)

    def columns(rows: int) -> int:
        return max(16, min(bk, 4096 // max(held, rows)))  # which leaves wide ranks and many rows room in shared memory

    def fits(rows: int, parts: int) -> bool:
        # the Gram matrix takes the registers of half the sums
        most = MANY_SUMS if parts else MANY_SUMS // 2
        low = rows * held <= most or rows == 32 and parts > 0
        return low and (parts < 2 or k >= 4 * parts * columns(rows))

    def taken(strip: tuple[int, int]) -> tuple[float, float]:
        rows, parts = strip[0], max(1, strip[1])
        programs, by_warps = cdiv(n, rows) * parts, fed_by_warps(chip, rows)
        decoded = 0 if dense else rows * _DECODED
        read = (rows * stored + r * size) / parts
        least, alone = waiting(programs, read, n * stored, decoded / parts, by_warps=by_warps)
        apart, _ = waiting(programs, (rows * stored + _TAKEN_APART * r * size) / parts, 0, by_warps=by_warps)
        return k * max(least, apart) + _LAUNCH * (strip[1] > 0), alone

    strips = [strip for strip in product(powers(config.BM, 32), (0, *powers(8, 1))) if fits(*strip)]
    rows, parts = min(strips, key=taken)
    # twice as many where a program's sums, and what it decodes, do not fit into the registers of few
    many = MANY_SUMS // (2 if dense else 4)
    warps = config.warps * (2 if chip.startswith("sm_") and rows * held >= many else 1)
    return config._replace(BM=rows, BK=columns(rows), warps=warps, stages=stages), parts


def _by_ones(chip: str, w: Stored, ranks: int) -> bool:
    """See `add_squares`."""
    return chip.startswith("sm_") and ranks <= 32 and w.format.startswith("dense") and w.dtype is torch.bfloat16


@planned
def _plan(
    chip: str, w: Stored, r: int, a_strides: tuple[int, ...], b_strides: tuple[int, ...], size: int, scale: float
) -> tuple[Launch, Launch | None]:
    """A 2D grid (row tiles, parts), and what makes norms of the parts: a 1D grid of row tiles."""
    (config, parts), br = norm_tile(chip, w, r, size), rank_tile(r, MAX_RANK)
    shared = {
        "R": r,
        "stride_bn": b_strides[0],
        "stride_br": b_strides[1],
        "scale": scale,
        "PARTS": parts,
        "BR": br,
        "BS": min(br, 8192 // br),
        # squares cancel where B A undoes W, so plain TF32 is never good enough here
        "PRECISION": "tf32x3" if chip.startswith("sm_") else "ieee",
        "enable_fp_fusion": False,  # the decode rounds step by step
    }
    launch = Launch(
        norm_kernel,
        (cdiv(w.shape[0], config.BM), max(1, parts)),
        **decode_arguments(w, config.BK),
        **shared,
        stride_ar=a_strides[0],
        stride_ak=a_strides[1],
        BN=config.BM,
        BK=config.BK,
        BY_ONES=_by_ones(chip, w, br),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not parts:
        return launch, None
    rows = 32 if br <= 64 else 16
    return launch, Launch(norm_sum_kernel, (cdiv(w.shape[0], rows),), N=w.shape[0], **shared, BN=rows, num_warps=4)


def row_norm(w: Operand, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """One or two launches beside the product of the factors. Raises ``ValueError`` for a rank above MAX_RANK."""
    n, r = w.shape[0], a.shape[0]
    if r > MAX_RANK:
        raise ValueError(f"row_norm: rank {r} is above {MAX_RANK}, the most the kernel holds")
    out = torch.empty(n, dtype=torch.float32, device=a.device)
    if n:
        kind, pointers = stored(w)
        launch, add_up = _plan(chip_of(a.device), kind, r, a.stride(), b.stride(), a.element_size(), scale)
        wide = a.float()
        gram = wide @ wide.t()
        written = out if add_up is None else out.new_empty(launch.arguments["PARTS"], n)
        launch(*pointers, a, b, gram, written)
        if add_up is not None:
            add_up(written, b, gram, out)
    return out


def variants(chip: str):
    """What `row_norm` launches, for ahead-of-time checks."""
    for format, n, rank in product(("dense", "nf4"), (WIDTH, 4 * WIDTH), (16, 64, 128)):
        w, pointers = stored_variant(format, n, WIDTH, format == "nf4", "bf16")
        pointers |= {"a_ptr": "fp32", "b_ptr": "fp32", "gram_ptr": "fp32", "out_ptr": "fp32"}
        launch, add_up = _plan(chip, w, rank, (WIDTH, 1), (rank, 1), 4, 2.0)
        yield Variant(f"row_norm {format} N{n} R{rank}", launch, pointers, matrix=ANY_MATRIX)
        if add_up is not None and format == "dense" and n == WIDTH:
            parts = {"part_ptr": "fp32", "b_ptr": "fp32", "gram_ptr": "fp32", "out_ptr": "fp32"}
            yield Variant(f"row_norm of parts R{rank}", add_up, parts, matrix=ANY_MATRIX)
