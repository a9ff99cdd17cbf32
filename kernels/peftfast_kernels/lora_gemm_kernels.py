"""Triton: base product, adapter, dropout and bias in one fp32 accumulator.

One kernel serves both directions. Forward: out [M, N] = x Wᵀ, contraction over K, factors t and bᵀ. Backward:
out [M, K] = dy W, contraction over N, factors p and a, mask applied to their product before dy W is added to it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import dispatch
from peftfast_kernels.configs import (
    PROGRAMS,
    TALL_DECODE,
    Tile,
    cdiv,
    chip_of,
    expand_ranks,
    parts,
    tile,
    update_precision,
)
from peftfast_kernels.decode import Operand
from peftfast_kernels.decode_kernels import Stored, decode_arguments, stored, stored_variant
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_expand_kernels import expand, lora_dx, masked_adapter, turned
from peftfast_kernels.lora_gemm import add_input_product_, base_product, input_product
from peftfast_kernels.tiles import (
    grouped_order,
    load_tile,
    operand,
    owner,
    padded,
    pick,
    store_tile,
    tile_counts,
    total,
)
from peftfast_kernels.variants import ANY_MATRIX, BIG_MATRIX, DTYPES, NO_MATRIX, ROWS, WIDTH, Variant


@triton.jit
def contract(
    acc, x_ptrs, w0, w1, w2, w3, w4, table, rows, cols, first_col, M, NS, K,
    strides_xm, stride_xc, strides_n, strides_k,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, PARTS: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """acc + the sum of all x op(W) for these rows and columns, in one loop over the members of a tuple; of its steps
    the program's own, of PARTS.

    x_ptrs: [M, C_i], rows strides_xm apart; C_i = N_i where TRANSPOSED, K otherwise.
    """
    spans = padded(NS if TRANSPOSED else (K,), BC)
    start = 0
    end = total(spans)
    if PARTS > 1:
        each = tl.cdiv(tl.cdiv(end, BC), PARTS) * BC
        start = tl.program_id(1) * each
        end = tl.minimum(start + each, end)
    for position in range(start, end, BC):
        which, first = owner(position, spans)
        c = position - first
        N = pick(NS, which)
        C = N if TRANSPOSED else K
        inner = c + tl.arange(0, BC)
        x = tl.load(
            pick(x_ptrs, which) + rows[:, None] * pick(strides_xm, which) + inner[None, :].to(tl.int64) * stride_xc,
            mask=(rows[:, None] < M) & (inner[None, :] < C),
            other=0.0,
        )
        if TRANSPOSED:
            w = DECODE(
                pick(w0, which), pick(w1, which), pick(w2, which), pick(w3, which), pick(w4, which), table,
                inner, first_col, N, K, pick(strides_n, which), pick(strides_k, which),
                BO, BLOCK, NESTED, LAYOUT, DTYPE, INTERP,
            )  # fmt: skip
        else:
            w = DECODE(
                w0[0], w1[0], w2[0], w3[0], w4[0], table, cols, c, N, K, strides_n[0], strides_k[0],
                BC, BLOCK, NESTED, LAYOUT, DTYPE, INTERP,
            )  # fmt: skip
        x = operand(x, INTERP)
        w = operand(w, INTERP).to(x.dtype)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        elif TRANSPOSED:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc


@triton.jit
def own_part(y_ptr, M, O, PARTS: tl.constexpr):
    """(y_ptr, first): where a program's part of y goes, in [PARTS, M, O], and whether it is the first, 1 or 0, which
    alone has the adapter and the bias."""
    first = 1
    if PARTS > 1:
        y_ptr += tl.program_id(1).to(tl.int64) * M * O
        first = (tl.program_id(1) == 0).to(tl.int32)
    return y_ptr, first


@triton.jit
def gemm_tile(
    pid_m, pid_o, x_ptr, w0, w1, w2, w3, w4, table, bias_ptr, t_ptr, b_ptr, seed_ptr, y_ptr,
    M, N, K, R, stride_xm, stride_xc, stride_n, stride_k, stride_tm, stride_tr, stride_br, stride_bo,
    scale, threshold,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """BM rows and BO columns of y = x op(W) + scale * mask(t b) + bias.

    x_ptr: [M, C]; y_ptr: [M, O] contiguous, or, in PARTS, fp32 [PARTS, M, O], whose sum is y; t_ptr: [M, R]; b_ptr:
    [R, O]; bias_ptr: [O]. Forward O = N, C = K; TRANSPOSED O = K, C = N. SWAP computes yᵀ = W xᵀ: a decoded weight then
    stays in registers as the left operand, and few rows fill the narrow side of a matrix instruction.
    """
    O = K if TRANSPOSED else N
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = pid_o * BO + tl.arange(0, BO)
    y_ptr, first = own_part(y_ptr, M, O, PARTS)
    # The adapter comes first: its mask must not touch the base product, and the accumulator is already there.
    acc = masked_adapter(
        t_ptr, b_ptr, seed_ptr, rows, cols, M, O, R * first, stride_tm, stride_tr, stride_br, stride_bo, scale,
        threshold, DROP, BM, BO, BR, PRECISION, INTERP,
    )  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    acc = contract(
        acc, (x_ptr,), (w0,), (w1,), (w2,), (w3,), (w4,), table, rows, cols, pid_o * BO, M, (N,), K,
        (stride_xm,), stride_xc, (stride_n,), (stride_k,),
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, TRANSPOSED, SWAP, PARTS, BO, BC, PRECISION, INTERP,
    )  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < O * first, other=0.0).to(tl.float32)[None, :]
    store_tile(acc, y_ptr, rows, cols, M, O, INTERP)


@triton.jit
def gemm_kernel(
    x_ptr, w0, w1, w2, w3, w4, table, bias_ptr, t_ptr, b_ptr, seed_ptr, y_ptr,
    M, N, K, R, stride_xm, stride_xc, stride_n, stride_k, stride_tm, stride_tr, stride_br, stride_bo,
    scale, threshold,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of y, the j-th of PARTS of their sum; see `gemm_tile`."""
    O = K if TRANSPOSED else N
    pid_m, pid_o = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(O, BO), GROUP)
    gemm_tile(
        pid_m, pid_o, x_ptr, w0, w1, w2, w3, w4, table, bias_ptr, t_ptr, b_ptr, seed_ptr, y_ptr,
        M, N, K, R, stride_xm, stride_xc, stride_n, stride_k, stride_tm, stride_tr, stride_br, stride_bo,
        scale, threshold,
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, TRANSPOSED, SWAP, HAS_BIAS, DROP, PARTS, BM, BO, BC, BR, PRECISION,
        INTERP,
    )  # fmt: skip


@triton.jit
def sum_kernel(
    part_ptrs, y_ptrs, M, NS, PARTS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, INTERP: tl.constexpr
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of one y [M, N_i] contiguous, the sum of fp32 [PARTS, M, N_i]."""
    which, first = owner(tl.program_id(1), tile_counts(NS, BO))
    O = pick(NS, which)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(1) - first) * BO + tl.arange(0, BO)
    acc = tl.zeros((BM, BO), tl.float32)
    for i in tl.static_range(PARTS):
        acc += load_tile(pick(part_ptrs, which) + tl.cast(i, tl.int64) * M * O, rows, cols, M, O, O, 1)
    store_tile(acc, pick(y_ptrs, which), rows, cols, M, O, INTERP)


def swaps(format: str, transposed: bool) -> bool:
    """Whether `gemm_kernel` puts the weight on the left: where it is decoded row by row."""
    return not transposed and not format.startswith("dense")


def product_tile(chip: str, format: str, single: bool, transposed: bool, rows: int, widths: Sequence[int]) -> Tile:
    """The tile of a big product of so many rows and output columns; fp32 (`single`) tiles are smaller.

    No more rows than the power of two that holds all. A weight that is decoded in the main loop is decoded once for
    every tile of rows: tall ones, where the chip has them, decode it less often. Where few programs would decode it,
    more of them take fewer columns and, for as many bytes under way, longer steps: not fewer than half of the tile's,
    64, so that each of the four warps multiplies rows of its own of a decoded weight. With 32 two read the same, and
    all wait 1.7 times as long for shared memory, which is what they wait for (`tools/emulate.py --traffic`).
    """
    decodes = not format.startswith("dense")
    config = tile("lora_gemm_fp32" if single else "lora_gemm_decode" if decodes else "lora_gemm", chip)
    if decodes and not single and rows > config.BM and chip in TALL_DECODE:
        return TALL_DECODE[chip][transposed]
    bm, columns = min(config.BM, max(16, 1 << (rows - 1).bit_length())), config.BN
    if decodes:
        least = max(16, columns // 2)
        while columns > least and cdiv(rows, bm) * sum(cdiv(width, columns) for width in widths) < PROGRAMS:
            columns //= 2
    return config._replace(BM=bm, BN=columns, BK=config.BK * (config.BN // columns))


def product_parts(format: str, config: Tile, rows: int, outputs: Sequence[int], contraction: Sequence[int]) -> int:
    """In how many parts a big product with these tiles is summed: one, of a weight that is not decoded."""
    if format.startswith("dense"):
        return 1
    programs = cdiv(rows, config.BM) * sum(cdiv(width, config.BN) for width in outputs)
    return parts(programs, sum(cdiv(width, config.BK) for width in contraction))


@planned
def _gemm_plan(
    chip: str, m: int, r: int, w: Stored, x_strides: tuple[int, ...], t_strides: tuple[int, ...],
    b_strides: tuple[int, int], single: bool, precision: str, biased: bool, transposed: bool, prob: float, scale: float,
) -> Launch:  # fmt: skip
    """A grid of [BM, BN] tiles of y, row tiles grouped so that weight tiles are reused in L2, and the parts of each."""
    contraction, width = w.shape if transposed else w.shape[::-1]
    config = product_tile(chip, w.format, single, transposed, m, (width,))
    count = product_parts(w.format, config, m, (width,), (contraction,))
    return Launch(
        gemm_kernel,
        (cdiv(m, config.BM) * cdiv(width, config.BN), count),
        **decode_arguments(w, config.BN if transposed else config.BK),
        M=m,
        R=r,
        stride_xm=x_strides[0],
        stride_xc=x_strides[1],
        stride_tm=t_strides[0],
        stride_tr=t_strides[1],
        stride_br=b_strides[0],
        stride_bo=b_strides[1],
        scale=scale,
        threshold=threshold(prob),
        TRANSPOSED=transposed,
        SWAP=swaps(w.format, transposed),
        HAS_BIAS=biased,
        DROP=threshold(prob) > 0,
        PARTS=count,
        BM=config.BM,
        BO=config.BN,
        BC=config.BK,
        BR=expand_ranks(r, 32, chip, precision),
        GROUP=8,
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # the decode rounds step by step; the products are matrix instructions anyway
    )


@planned
def _sum_plan(chip: str, m: int, widths: tuple[int, ...], count: int) -> Launch:
    """A 2D grid (row tiles, column tiles of every y)."""
    config = tile("sum", chip)
    return Launch(
        sum_kernel,
        (cdiv(m, config.BM), sum(cdiv(n, config.BN) for n in widths)),
        M=m,
        NS=widths,
        PARTS=count,
        BM=config.BM,
        BO=config.BN,
        num_warps=config.warps,
    )


def written(launch: Launch, *ys: Tensor) -> tuple[Tensor, ...]:
    """What a big product writes for its outputs [M, N_i]: these, or the parts of their sums, fp32 [parts, M, N_i]."""
    count = launch.arguments["PARTS"]
    return ys if count == 1 else tuple([y.new_empty(count, *y.shape, dtype=torch.float32) for y in ys])


def written_as(launch: Launch, dtype: str) -> str:
    """The type of what is `written` for outputs of this type, for ahead-of-time checks."""
    return dtype if launch.arguments["PARTS"] == 1 else "fp32"


def add_up(sums: tuple[Tensor, ...], *ys: Tensor) -> None:
    """Adds what was `written` up in its order, in one launch, where it was parts."""
    if sums[0] is not ys[0]:
        _sum_plan(chip_of(ys[0].device), len(ys[0]), tuple([y.shape[1] for y in ys]), len(sums[0]))(sums, ys)


def _gemm(
    x: Tensor, w: Operand, bias: Tensor | None, t: Tensor, b: Tensor, b_strides: tuple[int, int], scale: float,
    seed: Tensor | None, prob: float, transposed: bool,
) -> Tensor:  # fmt: skip
    """b is read as [R, O] through b_strides: bᵀ forward, a backward."""
    m = x.shape[0]
    y = torch.empty(m, w.shape[1 if transposed else 0], dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    chip = chip_of(x.device)
    kind, pointers = stored(w)
    launch = _gemm_plan(
        chip, m, t.shape[1], kind, x.stride(), t.stride(), b_strides, x.dtype is torch.float32,
        update_precision(chip, x.dtype, t.dtype), bias is not None, transposed, prob, scale,
    )  # fmt: skip
    sums = written(launch, y)
    launch(x, *pointers, x if bias is None else bias.contiguous(), t, b, seed_or(seed, prob, x), *sums)
    add_up(sums, y)
    return y


def lora_gemm(x: Tensor, w: Operand, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch, or, where few programs would decode all of a weight, two; where the table prefers cuBLAS: its
    product, and one pass for the wide update."""
    if dispatch.fuses("lora_gemm", x, w, bias, t, b, scale):
        return _gemm(x, w, bias, t, b, turned(b), scale, None, 0.0, transposed=False)
    y = base_product(x, w, bias)
    return expand(y, t, b, turned(b), scale, None, 0.0, out=y)


def lora_gemm_t(dy: Tensor, w: Operand, p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """Launches the same kernel transposed; where the table prefers cuBLAS: one masked pass and its product, or, where
    the update is wide, its product and one masked pass."""
    if dispatch.fuses("lora_gemm_t", dy, w, p, a, seed, prob):
        return _gemm(dy, w, None, p, a, a.stride(), keep_scale(prob), seed, prob, transposed=True)
    if p.dtype == dy.dtype:
        return add_input_product_(lora_dx(p, a, seed, prob, dy.dtype), dy, w)
    dx = input_product(dy, w)
    return expand(dx, p, a, a.stride(), keep_scale(prob), seed, prob, out=dx)


def variants(chip: str):
    """What the products launch, for ahead-of-time checks."""
    for format, dtype, factors, transposed, drop, rows in (
        ("dense", "bf16", "bf16", False, False, ROWS),
        ("dense", "bf16", "bf16", True, True, ROWS),
        ("dense", "fp32", "fp32", False, False, ROWS),
        ("nf4", "bf16", "bf16", False, False, ROWS),
        ("nf4", "bf16", "bf16", False, False, 16),
        ("nf4", "bf16", "bf16", False, False, 64),
        ("nf4", "bf16", "fp32", False, False, 64),
        ("nf4", "bf16", "bf16", True, True, ROWS),
        ("nf4", "bf16", "bf16", True, True, 16),
        ("nf4", "bf16", "bf16", True, True, 64),
        ("nf4", "bf16", "fp32", True, True, 64),
        ("int8", "fp16", "fp16", False, False, ROWS),
    ):
        few, single, wide = rows < ROWS, dtype == "fp32", factors != dtype
        rank = 64 if wide else 16
        w, pointers = stored_variant(format, WIDTH, WIDTH, format == "nf4" and not transposed, dtype)
        launch = _gemm_plan(
            chip, rows, rank, w, (WIDTH, 1), (rank, 1), (WIDTH, 1) if transposed else (1, rank), single,
            update_precision(chip, DTYPES[dtype], DTYPES[factors]), not transposed, transposed, 0.1 * drop, 2.0,
        )  # fmt: skip
        name = f"{format} {dtype}{' wide' * wide}{' drop' * drop}{f' {rows} rows' * few}"
        pointers |= {"x_ptr": dtype, "bias_ptr": dtype, "t_ptr": factors, "b_ptr": factors}
        pointers["y_ptr"] = written_as(launch, dtype)
        yield Variant(
            f"lora_gemm{'_t' * transposed} {name}",
            launch,
            {**pointers, "seed_ptr": "i64"},
            matrix=NO_MATRIX if single else ANY_MATRIX if few else BIG_MATRIX,
            weights=launch.arguments["BO"] * launch.arguments["BC"] if format == "nf4" else 0,
            quick=not transposed and not few and dtype == "bf16",
        )
    yield Variant("sum", _sum_plan(chip, 64, (WIDTH,), 4), {"part_ptrs": ("fp32",), "y_ptrs": ("bf16",)}, quick=True)
