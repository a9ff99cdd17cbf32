"""Triton: the big products of several linears that read one input, one launch each; tuples as in siblings_kernels.py.

The work itself is that of one linear: `gemm_tile`, `contract`, `masked_adapter`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import dispatch
from peftfast_kernels.configs import cdiv, chip_of, expand_ranks, expand_tile, update_precision
from peftfast_kernels.decode import Operand
from peftfast_kernels.decode_kernels import Stored, decode_arguments, stored, stored_variant
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_expand_kernels import adapter_tile, masked_adapter
from peftfast_kernels.lora_gemm import add_product_, base_product
from peftfast_kernels.lora_gemm_kernels import (
    add_up,
    contract,
    gemm_tile,
    own_part,
    product_parts,
    product_tile,
    swaps,
    written,
    written_as,
)
from peftfast_kernels.siblings import drops
from peftfast_kernels.siblings_gemm import add_input_products_, input_products
from peftfast_kernels.siblings_kernels import contiguous, keep_scales, masks, row_major, seeds_or
from peftfast_kernels.tiles import grouped_order, load_tile, owner, pick, store_tile, tile_counts, total
from peftfast_kernels.variants import ANY_MATRIX, BIG_MATRIX, DTYPES, ROWS, WIDTH, Variant


@triton.jit
def siblings_gemm_kernel(
    x_ptr, w0, w1, w2, w3, w4, table, bias_ptrs, t_ptrs, b_ptrs, y_ptrs,
    M, NS, K, RS, stride_xm, stride_xc, strides_n, strides_k, strides_tm, scales,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr,
    BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of one y, the j-th of PARTS of their sum; the columns of all
    siblings stand side by side.

    w0..w4: a tuple of pointers each; t_ptrs: [M, R_i], rows strides_tm apart; b_ptrs: [N_i, R_i] contiguous; y_ptrs as
    `gemm_tile` has its y_ptr.
    """
    counts = tile_counts(NS, BO)
    pid_m, pid_o = grouped_order(tl.program_id(0), tl.cdiv(M, BM), total(counts), GROUP)
    which, first = owner(pid_o, counts)
    R = pick(RS, which)
    gemm_tile(
        pid_m, pid_o - first, x_ptr,
        pick(w0, which), pick(w1, which), pick(w2, which), pick(w3, which), pick(w4, which), table,
        pick(bias_ptrs, which), pick(t_ptrs, which), pick(b_ptrs, which), x_ptr, pick(y_ptrs, which),
        M, pick(NS, which), K, R, stride_xm, stride_xc, pick(strides_n, which), pick(strides_k, which),
        pick(strides_tm, which), 1, 1, R, pick(scales, which), 0,
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, False, SWAP, HAS_BIAS, False, PARTS, BM, BO, BC, BR, PRECISION, INTERP,
    )  # fmt: skip


@triton.jit
def siblings_gemm_t_kernel(
    dy_ptrs, w0, w1, w2, w3, w4, table, p_ptrs, a_ptrs, dx_ptr,
    M, NS, K, RS, strides_m, strides_n, strides_k, strides_pm,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    ADD: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of dx, the j-th of PARTS of their sum, all siblings in one
    accumulator, with p a only where ADD.

    dy_ptrs: [M, N_i], rows strides_m apart; p_ptrs: [M, R_i], rows strides_pm apart; a_ptrs: [R_i, K] contiguous;
    dx_ptr as `gemm_tile` has its y_ptr.
    """
    pid_m, pid_o = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BO), GROUP)
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = pid_o * BO + tl.arange(0, BO)
    dx_ptr, first = own_part(dx_ptr, M, K, PARTS)
    acc = tl.zeros((BM, BO), tl.float32)
    if ADD:
        for i in tl.static_range(len(p_ptrs)):
            acc = adapter_tile(
                acc, p_ptrs[i], a_ptrs[i], rows, cols, M, K, RS[i] * first, strides_pm[i], 1, K, 1, BR, PRECISION,
                INTERP,
            )  # fmt: skip
    acc = contract(
        acc, dy_ptrs, w0, w1, w2, w3, w4, table, rows, cols, pid_o * BO, M, NS, K, strides_m, 1, strides_n, strides_k,
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, True, False, PARTS, BO, BC, PRECISION, INTERP,
    )  # fmt: skip
    store_tile(acc, dx_ptr, rows, cols, M, K, INTERP)


@triton.jit
def siblings_expand_kernel(
    y_ptrs, t_ptrs, b_ptrs, bias_ptrs, M, NS, RS, LS, strides_tm, scales,
    ADD: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of one y = scale * t bᵀ + bias, or, where ADD, adds scale * t bᵀ
    to what is there; see `siblings_gemm_kernel`.

    bias_ptrs: [L_i], where L_i is N_i, or 0 without a bias; not read where ADD.
    """
    which, first = owner(tl.program_id(1), tile_counts(NS, BO))
    O, R = pick(NS, which), pick(RS, which)
    y_ptr = pick(y_ptrs, which)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(1) - first) * BO + tl.arange(0, BO)
    if ADD:
        y = load_tile(y_ptr, rows, cols, M, O, O, 1)
    acc = masked_adapter(
        pick(t_ptrs, which), pick(b_ptrs, which), y_ptr, rows, cols, M, O, R, pick(strides_tm, which), 1, 1, R,
        pick(scales, which), 0, False, BM, BO, BR, PRECISION, INTERP,
    )  # fmt: skip
    if ADD:
        acc += y.to(tl.float32)
    else:
        bias = tl.load(pick(bias_ptrs, which) + cols, mask=cols < pick(LS, which), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    store_tile(acc, y_ptr, rows, cols, M, O, INTERP)


@triton.jit
def siblings_expand_t_kernel(
    dx_ptr, p_ptrs, a_ptrs, seed_ptrs, M, K, RS, strides_pm, scales, thresholds,
    ADD: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes the sum of all scale * mask(p a) for BM rows and BO columns of dx, and adds it to what is
    there where ADD."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BO + tl.arange(0, BO)
    if ADD:
        dx = load_tile(dx_ptr, rows, cols, M, K, K, 1)
    acc = tl.zeros((BM, BO), tl.float32)
    for i in tl.static_range(len(p_ptrs)):
        acc += masked_adapter(
            p_ptrs[i], a_ptrs[i], seed_ptrs[i], rows, cols, M, K, RS[i], strides_pm[i], 1, K, 1, scales[i],
            thresholds[i], DROP, BM, BO, BR, PRECISION, INTERP,
        )  # fmt: skip
    if ADD:
        acc += dx.to(tl.float32)
    store_tile(acc, dx_ptr, rows, cols, M, K, INTERP)


# -- launchers ---------------------------------------------------------------------------------------------------------


def _stored_alike(ws: Sequence[Operand]) -> tuple[tuple[Stored, ...], tuple] | None:
    """What is to know of all siblings' weights, and pointers w0 to w4 (tuples) and table; None where one kernel cannot
    read them all."""
    each = [stored(w) for w in ws]
    kind, pointers = each[0]
    alike = (kind.format, kind.shape[1], kind.dtype, kind.block, kind.nested_block)
    for other, others in each[1:]:
        if (other.format, other.shape[1], other.dtype, other.block, other.nested_block) != alike:
            return None
        if any(one.dtype != two.dtype for one, two in zip(pointers[:5], others[:5], strict=True)):
            return None
    own = zip(*[pointers[:5] for _, pointers in each], strict=True)
    return tuple([kind for kind, _ in each]), (*own, pointers[5])


def _decode_arguments(ws: tuple[Stored, ...], bk: int) -> dict:
    """`decode_arguments` of all siblings."""
    arguments = decode_arguments(ws[0]._replace(in_words=all(w.in_words for w in ws)), bk)
    del arguments["N"], arguments["stride_n"], arguments["stride_k"]
    strides_n, strides_k = zip(*[w.strides for w in ws], strict=True)
    return {**arguments, "NS": tuple([w.shape[0] for w in ws]), "strides_n": strides_n, "strides_k": strides_k}


@planned
def _expand_plan(
    chip: str, m: int, widths: tuple[int, ...], biases: tuple[int, ...], ranks: tuple[int, ...],
    t_strides: tuple[int, ...], single: bool, precision: str, scales: tuple[float, ...], add: bool,
) -> Launch:  # fmt: skip
    """A 2D grid (row tiles, column tiles of every y)."""
    config = expand_tile(chip, single)
    return Launch(
        siblings_expand_kernel,
        (cdiv(m, config.BM), sum(cdiv(n, config.BN) for n in widths)),
        M=m,
        NS=widths,
        RS=ranks,
        LS=biases,
        strides_tm=t_strides,
        scales=tuple(map(float, scales)),
        ADD=add,
        BM=config.BM,
        BO=config.BN,
        BR=expand_ranks(max(ranks), config.BK, chip, precision),
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@planned
def _gemm_plan(
    chip: str, m: int, w: tuple[Stored, ...], ranks: tuple[int, ...], x_strides: tuple[int, ...],
    t_strides: tuple[int, ...], single: bool, precision: str, biased: bool, scales: tuple[float, ...],
) -> Launch:  # fmt: skip
    """A grid over the tiles of all outputs, and the parts of each."""
    widths = [one.shape[0] for one in w]
    config = product_tile(chip, w[0].format, single, False, m, widths)
    count = product_parts(w[0].format, config, m, widths, (w[0].shape[1],))
    return Launch(
        siblings_gemm_kernel,
        (cdiv(m, config.BM) * sum(cdiv(width, config.BN) for width in widths), count),
        M=m,
        RS=ranks,
        stride_xm=x_strides[0],
        stride_xc=x_strides[1],
        strides_tm=t_strides,
        scales=tuple(map(float, scales)),
        **_decode_arguments(w, config.BK),
        SWAP=swaps(w[0].format, False),
        HAS_BIAS=biased,
        PARTS=count,
        BM=config.BM,
        BO=config.BN,
        BC=config.BK,
        BR=expand_ranks(max(ranks), 32, chip, precision),
        GROUP=8,
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # see lora_gemm_kernels
    )


def siblings_gemm(
    x: Tensor, w: list[Operand], bias: list[Tensor | None], t: list[Tensor], b: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """One launch over the tiles of all outputs, or, where few programs would decode all weights, two; where one of them
    prefers cuBLAS or reads otherwise: one pass for all updates and biases, and their products by cuBLAS, or, where
    updates are wide, the products and one pass."""
    chip, m, dtype = chip_of(x.device), x.shape[0], x.dtype
    biases = tuple([0 if one is None else one.shape[0] for one in bias])
    biased = any(biases)
    alike = None
    if biased == all(biases):
        members = [(x, *own) for own in zip(w, bias, t, b, scales, strict=True)]
        if dispatch.fuses_together("siblings_gemm", (x, w, bias, t, b, scales), "lora_gemm", members):
            alike = _stored_alike(w)
    ranks = tuple([one.shape[1] for one in t])
    t_rows, t_strides = row_major(t)
    precision = update_precision(chip, dtype, t[0].dtype)
    wide, single = t[0].dtype != dtype, dtype is torch.float32
    if alike is None and wide:
        ys = vectors = [base_product(x, *own) for own in zip(w, bias, strict=True)]  # which have the biases in them
    else:
        ys = [torch.empty(m, one.shape[0], dtype=dtype, device=x.device) for one in w]
        vectors = [x if one is None else one.to(dtype).contiguous() for one in bias]
    if not m:
        return ys
    if alike is None:
        widths = tuple([one.shape[0] for one in w])
        launch = _expand_plan(chip, m, widths, biases, ranks, t_strides, single, precision, tuple(scales), wide)
        launch(tuple(ys), t_rows, contiguous(b), tuple(vectors))
        return ys if wide else [add_product_(y, x, one) for y, one in zip(ys, w, strict=True)]
    kinds, pointers = alike
    launch = _gemm_plan(chip, m, kinds, ranks, x.stride(), t_strides, single, precision, biased, tuple(scales))
    sums = written(launch, *ys)
    launch(x, *pointers, tuple(vectors), t_rows, contiguous(b), sums)
    add_up(sums, *ys)
    return ys


@planned
def _gemm_t_plan(
    chip: str, m: int, w: tuple[Stored, ...], ranks: tuple[int, ...], dy_strides: tuple[int, ...],
    p_strides: tuple[int, ...], single: bool, precision: str, add: bool,
) -> Launch:  # fmt: skip
    """A grid over the tiles of dx, and the parts of each."""
    width = w[0].shape[1]
    config = product_tile(chip, w[0].format, single, True, m, (width,))
    count = product_parts(w[0].format, config, m, (width,), [one.shape[0] for one in w])
    return Launch(
        siblings_gemm_t_kernel,
        (cdiv(m, config.BM) * cdiv(width, config.BN), count),
        M=m,
        RS=ranks,
        strides_m=dy_strides,
        strides_pm=p_strides,
        **_decode_arguments(w, config.BN),
        ADD=add,
        PARTS=count,
        BM=config.BM,
        BO=config.BN,
        BC=config.BK,
        BR=expand_ranks(max(ranks), 32, chip, precision),
        GROUP=8,
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # see lora_gemm_kernels
    )


@planned
def _expand_t_plan(
    chip: str, m: int, k: int, ranks: tuple[int, ...], p_strides: tuple[int, ...], single: bool, precision: str,
    probs: tuple[float, ...], add: bool,
) -> Launch:  # fmt: skip
    """A 2D grid over the tiles of dx."""
    config = expand_tile(chip, single)
    bm = max(16, config.BM // 2)  # a masked tile and the sum of those before it are held at once
    return Launch(
        siblings_expand_t_kernel,
        (cdiv(m, bm), cdiv(k, config.BN)),
        M=m,
        K=k,
        RS=ranks,
        strides_pm=p_strides,
        scales=keep_scales(probs),
        ADD=add,
        **masks(probs),
        BM=bm,
        BO=config.BN,
        BR=expand_ranks(max(ranks), config.BK, chip, precision),
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def siblings_gemm_t(
    dys: list[Tensor], w: list[Operand], p: list[Tensor], a: list[Tensor], seeds: list[Tensor | None],
    probs: list[float],
) -> Tensor:  # fmt: skip
    """One launch, and with dropout a second one for the masked updates: a masked tile beside the accumulator would not
    fit into registers. Where one product prefers cuBLAS or is read otherwise: the updates, and all products added to
    them by cuBLAS, or the other way round where updates are wide."""
    first = dys[0]
    m, dtype, chip = first.shape[0], first.dtype, chip_of(first.device)
    args = (dys, w, p, a, seeds, probs)
    members = list(zip(*args, strict=True))
    alike = None
    if dispatch.fuses_together("siblings_gemm_t", args, "lora_gemm_t", members):
        alike = _stored_alike(w)
    k, seed_pointers = w[0].shape[1], seeds_or(seeds, probs, first)
    wide, single = p[0].dtype != dtype, dtype is torch.float32
    if alike is None and wide:
        dx = input_products(dys, w)
    else:
        dx = torch.empty(m, k, dtype=dtype, device=first.device)
    if m == 0:
        return dx
    ranks, dropping = tuple([one.shape[1] for one in p]), drops(probs)
    (p_rows, p_strides), factors = row_major(p), contiguous(a)
    precision = update_precision(chip, dtype, p[0].dtype)
    if alike is not None:
        kinds, pointers = alike
        dy_rows, dy_strides = row_major(dys)
        launch = _gemm_t_plan(chip, m, kinds, ranks, dy_strides, p_strides, single, precision, not dropping)
        sums = written(launch, dx)
        launch(dy_rows, *pointers, p_rows, factors, *sums)
        add_up(sums, dx)
    if alike is None or dropping:
        add = wide or alike is not None
        launch = _expand_t_plan(chip, m, k, ranks, p_strides, single, precision, tuple(probs), add)
        launch(dx, p_rows, factors, seed_pointers)
    if alike is None and not wide:
        add_input_products_(dx, dys, w)
    return dx


def variants(chip: str):
    """What the two products launch, for ahead-of-time checks: q, k and v, and gate and up."""
    precision = update_precision(chip, torch.bfloat16, torch.bfloat16)
    for format, transposed, rows, members in (
        ("dense", False, ROWS, 3),
        ("dense", True, ROWS, 3),
        ("nf4", False, ROWS, 3),
        ("nf4", False, 16, 2),
        ("nf4", False, 64, 2),
        ("nf4", True, ROWS, 3),
        ("nf4", True, 16, 3),
        ("nf4", True, 64, 3),
    ):
        few, ranks, each = rows < ROWS, (16,) * members, ("bf16",) * members
        w, pointers = stored_variant(format, 1024, WIDTH, format == "nf4" and not transposed, "bf16")
        ws = (w,) * members
        pointers = {name: kind if name == "table" else (kind,) * members for name, kind in pointers.items()}
        if transposed:
            widths = (1024,) * members
            launch = _gemm_t_plan(chip, rows, ws, ranks, widths, ranks, False, precision, True)
            pointers |= {"dy_ptrs": each, "p_ptrs": each, "a_ptrs": each, "dx_ptr": written_as(launch, "bf16")}
        else:
            launch = _gemm_plan(
                chip, rows, ws, ranks, (WIDTH, 1), ranks, False, precision, members == 2, (2.0,) * members
            )  # fmt: skip
            outs = (written_as(launch, "bf16"),) * members
            pointers |= {"x_ptr": "bf16", "bias_ptrs": each, "t_ptrs": each, "b_ptrs": each, "y_ptrs": outs}
        yield Variant(
            f"siblings_gemm{'_t' * transposed} {format} bf16 x{members}{f' {rows} rows' * few}",
            launch,
            pointers,
            matrix=ANY_MATRIX if few else BIG_MATRIX,
            weights=launch.arguments["BO"] * launch.arguments["BC"] if format == "nf4" else 0,
            quick=not few and not transposed,
        )
    for factors, rank in (("bf16", 16), ("fp32", 64)):
        wide, ranks, each = factors == "fp32", (rank,) * 3, (factors,) * 3
        precision = update_precision(chip, torch.bfloat16, DTYPES[factors])
        name = f"{' wide' * wide} R{rank}"
        yield Variant(
            f"siblings_expand{name}",
            _expand_plan(chip, ROWS, (1024,) * 3, (1024,) * 3, ranks, ranks, False, precision, (2.0,) * 3, wide),
            {"y_ptrs": ("bf16",) * 3, "t_ptrs": each, "b_ptrs": each, "bias_ptrs": ("bf16",) * 3},
            matrix=ANY_MATRIX,
        )
        yield Variant(
            f"siblings_expand_t drop{name}",
            _expand_t_plan(chip, ROWS, WIDTH, ranks, ranks, False, precision, (0.1,) * 3, True),
            {"dx_ptr": "bf16", "p_ptrs": each, "a_ptrs": each, "seed_ptrs": ("i64",) * 3},
            matrix=ANY_MATRIX,
        )
