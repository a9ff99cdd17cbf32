"""Triton: per-row adapters. Many rows: tiles of rows in adapter order, each walking only the adapters it holds.

Few rows (decoding): a program a row, which reads its own adapter once. A tile of rows would hold as many adapters as
rows there, and walking them one after another would leave the other multiprocessors idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import (
    cdiv,
    chip_of,
    exact_precision,
    expand_ranks,
    powers,
    rank_tile,
    rank_warps,
    tile,
    update_precision,
    waiting,
)
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_down_kernels import row_columns, row_sums
from peftfast_kernels.op import is_interpreting
from peftfast_kernels.tiles import exact_product, narrow, operand
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, ROWS, WIDTH, Variant


@triton.jit
def sorted_rows(rows_ptr, order_ptr, M, BM: tl.constexpr):
    """(row indices int64 [BM], their adapters, first adapter, one past the last) of this program's tile.

    Rows past the end and rows without an adapter carry -1; a tile of only those has no adapters to walk.
    """
    places = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rows = tl.load(order_ptr + places, mask=places < M, other=0).to(tl.int64)
    adapters = tl.load(rows_ptr + rows, mask=places < M, other=-1)
    last = tl.max(adapters, axis=0)
    first = tl.min(tl.where(adapters < 0, last, adapters), axis=0)
    return rows, places < M, adapters, tl.maximum(first, 0), last + 1


@triton.jit
def routed_shrink_kernel(
    x_ptr, rows_ptr, order_ptr, f_ptr, scales_ptr, t_ptr,
    M, C, R, stride_xm, stride_xc, stride_fg, stride_fr, stride_fc,
    SCALED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM sorted rows and BR ranks of t_m = scale_g f_g x_m. f_ptr: [G, R, C]; t_ptr: [M, R]."""
    rows, row_in, adapters, first, last = sorted_rows(rows_ptr, order_ptr, M, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    total = tl.zeros((BM, BR), tl.float32)
    for g in range(first, last):
        mine = adapters == g
        acc = tl.zeros((BM, BR), tl.float32)
        base = f_ptr + tl.cast(g, tl.int64) * stride_fg
        for c in range(0, C, BC):
            cols = c + tl.arange(0, BC)
            wide = cols.to(tl.int64)
            x = tl.load(
                x_ptr + rows[:, None] * stride_xm + wide[None, :] * stride_xc,
                mask=mine[:, None] & (cols[None, :] < C),
                other=0.0,
            )
            f = tl.load(
                base + ranks[None, :].to(tl.int64) * stride_fr + wide[:, None] * stride_fc,
                mask=(ranks[None, :] < R) & (cols[:, None] < C),
                other=0.0,
            )
            acc = exact_product(operand(x, INTERP), operand(f, INTERP), acc, PRECISION, INTERP)
        if SCALED:
            acc = acc * tl.load(scales_ptr + g)
        total = tl.where(mine[:, None], acc, total)  # not a sum: another adapter's factors may hold infinities
    inside = row_in[:, None] & (ranks[None, :] < R)
    tl.store(t_ptr + rows[:, None] * R + ranks[None, :], narrow(total, t_ptr.dtype.element_ty, INTERP), mask=inside)


@triton.jit
def routed_expand_kernel(
    y_ptr, t_ptr, rows_ptr, order_ptr, b_ptr, scales_ptr, out_ptr,
    M, N, R, stride_ym, stride_yn, stride_tm, stride_tr, stride_bg, stride_bn, stride_br,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM sorted rows and BN columns of y_m + scale_g b_g t_m. b_ptr: [G, N, R]."""
    rows, row_in, adapters, first, last = sorted_rows(rows_ptr, order_ptr, M, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for g in range(first, last):
        mine = adapters == g
        acc = tl.zeros((BM, BN), tl.float32)
        base = b_ptr + tl.cast(g, tl.int64) * stride_bg
        for r in range(0, R, BR):
            ranks = r + tl.arange(0, BR)
            t = tl.load(
                t_ptr + rows[:, None] * stride_tm + ranks[None, :] * stride_tr,
                mask=mine[:, None] & (ranks[None, :] < R),
                other=0.0,
            )
            b = tl.load(
                base + cols[None, :].to(tl.int64) * stride_bn + ranks[:, None].to(tl.int64) * stride_br,
                mask=(cols[None, :] < N) & (ranks[:, None] < R),
                other=0.0,
            )
            b = operand(b, INTERP)
            acc = tl.dot(operand(t, INTERP).to(b.dtype), b, acc, input_precision=PRECISION)
        total = tl.where(mine[:, None], acc * tl.load(scales_ptr + g), total)  # not a sum, see above
    inside = row_in[:, None] & (cols[None, :] < N)
    wide_cols = cols.to(tl.int64)[None, :]
    y = tl.load(y_ptr + rows[:, None] * stride_ym + wide_cols * stride_yn, mask=inside, other=0.0)
    out = narrow(total + y.to(tl.float32), out_ptr.dtype.element_ty, INTERP)
    tl.store(out_ptr + rows[:, None] * N + wide_cols, out, mask=inside)


@triton.jit
def row_shrink_kernel(
    x_ptr, rows_ptr, f_ptr, scales_ptr, t_ptr,
    C, R, stride_xm, stride_xc, stride_fg, stride_fr, stride_fc,
    SCALED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (m, j) computes BR ranks of t_m = scale_g f_g x_m; zero without an adapter.

    f_ptr: [G, R, C]; t_ptr: [M, R] contiguous.
    """
    m = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    own = tl.load(rows_ptr + m)
    g = tl.maximum(own, 0)
    last = tl.where(own >= 0, C, 0)
    t = row_sums(
        x_ptr + m * stride_xm, f_ptr + tl.cast(g, tl.int64) * stride_fg, ranks, last, R,
        stride_xc, stride_fr, stride_fc, BR, BC, INTERP,
    )  # fmt: skip
    if SCALED:
        t = t * tl.load(scales_ptr + g)
    tl.store(t_ptr + m * R + ranks, narrow(t, t_ptr.dtype.element_ty, INTERP), mask=ranks < R)


@triton.jit
def row_expand_kernel(
    y_ptr, t_ptr, rows_ptr, b_ptr, scales_ptr, out_ptr,
    N, R, stride_ym, stride_yn, stride_tm, stride_tr, stride_bg, stride_bn, stride_br,
    BN: tl.constexpr, BR: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (m, j) computes BN columns of y_m + scale_g b_g t_m, of y_m without an adapter. b_ptr: [G, N, R]."""
    m = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    wide_cols = cols.to(tl.int64)
    own = tl.load(rows_ptr + m)
    g = tl.maximum(own, 0)
    last = tl.where(own >= 0, R, 0)
    base = b_ptr + tl.cast(g, tl.int64) * stride_bg
    total = tl.zeros((BN,), tl.float32)
    for r in range(0, last, BR):
        ranks = r + tl.arange(0, BR)
        inside = ranks < last
        t = tl.load(t_ptr + m * stride_tm + ranks * stride_tr, mask=inside, other=0.0)
        b = tl.load(
            base + wide_cols[:, None] * stride_bn + ranks[None, :].to(tl.int64) * stride_br,
            mask=(cols[:, None] < N) & inside[None, :],
            other=0.0,
        )
        total += tl.sum(operand(b, INTERP).to(tl.float32) * operand(t, INTERP).to(tl.float32)[None, :], axis=1)
    y = tl.load(y_ptr + m * stride_ym + wide_cols * stride_yn, mask=cols < N, other=0.0).to(tl.float32)
    scale = tl.where(own >= 0, tl.load(scales_ptr + g), 0.0)  # another adapter's may be infinite
    total = total * scale
    tl.store(out_ptr + m * N + wide_cols, narrow(y + total, out_ptr.dtype.element_ty, INTERP), mask=cols < N)


#: Up to so many rows a program a row: predicted from bytes read out of L2 (M adapters' factors instead of G), to be
#: measured. The interpreter's test shapes have rows on both sides of its own.
ROW_BY_ROW, ROW_BY_ROW_INTERPRETED = 512, 48


def _row_by_row(rows: int) -> bool:
    return rows <= (ROW_BY_ROW_INTERPRETED if is_interpreting() else ROW_BY_ROW)


@planned
def _shrink_plan(
    chip: str, m: int, c: int, rank: int, x_strides: tuple[int, ...], f_strides: tuple[int, ...],
    sizes: tuple[int, int], scaled: bool, precision: str,
) -> tuple[Launch, bool]:  # fmt: skip
    """A 2D grid (rows or tiles of sorted rows, rank tiles), and whether it is rows."""
    config = tile("routed", chip)
    row_by_row, br = _row_by_row(m), rank_tile(rank, 64)
    if row_by_row:  # few rows have few programs, each with less of its adapter to read
        br = min(powers(br, 1), key=lambda ranks: waiting(m * cdiv(rank, ranks), sizes[0] + ranks * sizes[1], 0))
    arguments = {
        "C": c,
        "R": rank,
        "stride_xm": x_strides[0],
        "stride_xc": x_strides[1],
        "stride_fg": f_strides[0],
        "stride_fr": f_strides[1],
        "stride_fc": f_strides[2],
        "SCALED": scaled,
        "BR": br,
        "BC": row_columns(c, br, config.warps) if row_by_row else config.BK,
        "num_warps": config.warps,
    }
    if row_by_row:
        return Launch(row_shrink_kernel, (m, cdiv(rank, br)), **arguments), True
    grid = (cdiv(m, config.BM), cdiv(rank, br))
    arguments["num_warps"] = rank_warps(config.warps, rank, chip, precision, 16)
    options = {"M": m, "BM": config.BM, "PRECISION": precision, "num_stages": config.stages}
    return Launch(routed_shrink_kernel, grid, **arguments, **options), False


def shrink(x: Tensor, rows: Tensor, order: Tensor, factors: Tensor, scales: Tensor | None, dtype) -> Tensor:
    """t [M, R]: row m by the factors of its own adapter, [G, R, C] through any strides, times its scale if any."""
    (m, c), rank = x.shape, factors.shape[1]
    t = torch.empty(m, rank, dtype=dtype, device=x.device)
    if m == 0:
        return t
    chip = chip_of(x.device)
    precision = exact_precision(chip, x.dtype, factors.dtype)
    launch, by_row = _shrink_plan(
        chip, m, c, rank, x.stride(), factors.stride(), (x.dtype.itemsize, factors.dtype.itemsize),
        scales is not None, precision,
    )  # fmt: skip
    scale_pointer = rows if scales is None else scales.contiguous()
    if by_row:
        launch(x, rows, factors, scale_pointer, t)
    else:
        launch(x, rows, order, factors, scale_pointer, t)
    return t


def routed_down(x: Tensor, rows: Tensor, order: Tensor, starts: Tensor, a: Tensor) -> Tensor:
    """One launch."""
    return shrink(x, rows, order, a, None, a.dtype)


@planned
def _add_plan(
    chip: str, m: int, n: int, rank: int, y_strides: tuple[int, ...], t_strides: tuple[int, ...],
    b_strides: tuple[int, ...], precision: str,
) -> tuple[Launch, bool]:  # fmt: skip
    """A 2D grid (rows or tiles of sorted rows, column tiles), and whether it is rows."""
    config = tile("routed", chip)
    row_by_row = _row_by_row(m)
    br = rank_tile(rank, 32) if row_by_row else expand_ranks(rank, 32, chip, precision)
    bn = row_columns(n, br, config.warps) if row_by_row else config.BN
    arguments = {
        "N": n,
        "R": rank,
        "stride_ym": y_strides[0],
        "stride_yn": y_strides[1],
        "stride_tm": t_strides[0],
        "stride_tr": t_strides[1],
        "stride_bg": b_strides[0],
        "stride_bn": b_strides[1],
        "stride_br": b_strides[2],
        "BN": bn,
        "BR": br,
        "num_warps": config.warps,
    }
    if row_by_row:
        return Launch(row_expand_kernel, (m, cdiv(n, bn)), **arguments), True
    grid = (cdiv(m, config.BM), cdiv(n, bn))
    arguments["num_warps"] = rank_warps(config.warps, rank, chip, precision)
    options = {"M": m, "BM": config.BM, "PRECISION": precision, "num_stages": config.stages}
    return Launch(routed_expand_kernel, grid, **arguments, **options), False


def routed_add(y: Tensor, t: Tensor, rows: Tensor, order: Tensor, starts: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """One launch."""
    (m, n), rank = y.shape, t.shape[1]
    out = torch.empty(m, n, dtype=y.dtype, device=y.device)
    if m == 0:
        return out
    chip = chip_of(y.device)
    precision = update_precision(chip, y.dtype, b.dtype)
    launch, by_row = _add_plan(chip, m, n, rank, y.stride(), t.stride(), b.stride(), precision)
    if by_row:
        launch(y, t, rows, b, scales.contiguous(), out)
    else:
        launch(y, t, rows, order, b, scales.contiguous(), out)
    return out


def variants(chip: str):
    """What the launchers above run, for ahead-of-time checks."""
    indices = {"rows_ptr": "i32", "order_ptr": "i32", "scales_ptr": "fp32"}
    for rank, factors in ((16, "bf16"), (64, "bf16"), (32, "fp32"), (64, "fp32")):
        precisions = [choose(chip, torch.bfloat16, DTYPES[factors]) for choose in (exact_precision, update_precision)]
        shrunk = {**indices, "x_ptr": "bf16", "f_ptr": factors, "t_ptr": factors}
        expanded = {**indices, "y_ptr": "bf16", "t_ptr": factors, "b_ptr": factors, "out_ptr": "bf16"}
        for rows, kind in ((ROWS, "routed"), (ROW_BY_ROW, "row"), (4, "row")):
            name = f"M{rows} R{rank}{' wide' * (factors == 'fp32')}"
            by_row = {"quick": rank == 16} if kind == "row" else {"matrix": ANY_MATRIX}
            launch, _ = _shrink_plan(
                chip, rows, WIDTH, rank, (WIDTH, 1), (rank * WIDTH, WIDTH, 1), (2, DTYPES[factors].itemsize), False,
                precisions[0],
            )  # fmt: skip
            yield Variant(f"{kind}_shrink {name}", launch, shrunk, **by_row)
            launch, _ = _add_plan(
                chip, rows, WIDTH, rank, (WIDTH, 1), (rank, 1), (rank * WIDTH, rank, 1), precisions[1]
            )  # fmt: skip
            yield Variant(f"{kind}_expand {name}", launch, expanded, **by_row)
