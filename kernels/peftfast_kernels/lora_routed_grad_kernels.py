"""Triton: gradients of per-row adapters' factors, and what flows on to the input. One program owns a piece of one
adapter's gradient and walks the rows of that adapter alone, in their order, so nothing is added up between programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, exact_precision, rank_tile, rank_warps, tile
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_routed_kernels import shrink
from peftfast_kernels.tiles import exact_product, narrow, operand
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, WIDTH, Variant


@triton.jit
def routed_outer_kernel(
    x_ptr, p_ptr, order_ptr, starts_ptr, scales_ptr, out_ptr,
    C, R, stride_xm, stride_xc, stride_pm, stride_pr, stride_og, stride_or, stride_oc,
    SCALED: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j, g) owns BC columns and BR ranks of adapter g: the sum over its rows of x_m p_mᵀ, in their order.

    x_ptr: [M, C]; p_ptr: [M, R]; out_ptr: [G, R, C] through strides.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    g = tl.program_id(2)
    first = tl.load(starts_ptr + g)
    last = tl.load(starts_ptr + g + 1)
    wide_cols = cols.to(tl.int64)
    acc = tl.zeros((BC, BR), tl.float32)
    for m in range(first, last, BM):
        places = m + tl.arange(0, BM)
        rows = tl.load(order_ptr + places, mask=places < last, other=0).to(tl.int64)
        # Read transposed, as in `column_gradient`.
        x = tl.load(
            x_ptr + rows[None, :] * stride_xm + wide_cols[:, None] * stride_xc,
            mask=(places[None, :] < last) & (cols[:, None] < C),
            other=0.0,
        )
        p = tl.load(
            p_ptr + rows[:, None] * stride_pm + ranks[None, :] * stride_pr,
            mask=(places[:, None] < last) & (ranks[None, :] < R),
            other=0.0,
        )
        acc = exact_product(operand(x, INTERP), operand(p, INTERP), acc, PRECISION, INTERP)
    if SCALED:
        acc = acc * tl.load(scales_ptr + g)
    offsets = g.to(tl.int64) * stride_og + ranks[None, :].to(tl.int64) * stride_or + wide_cols[:, None] * stride_oc
    inside = (ranks[None, :] < R) & (cols[:, None] < C)
    tl.store(out_ptr + offsets, narrow(acc, out_ptr.dtype.element_ty, INTERP), mask=inside)


@planned
def _outer_plan(
    chip: str, adapters: int, c: int, rank: int, x_strides: tuple[int, ...], p_strides: tuple[int, ...],
    out_strides: tuple[int, ...], scaled: bool, precision: str,
) -> Launch:  # fmt: skip
    """A 3D grid (column tiles, rank tiles, adapters)."""
    config = tile("routed", chip)
    br = rank_tile(rank, 64)
    return Launch(
        routed_outer_kernel,
        (cdiv(c, config.BN), cdiv(rank, br), adapters),
        C=c,
        R=rank,
        stride_xm=x_strides[0],
        stride_xc=x_strides[1],
        stride_pm=p_strides[0],
        stride_pr=p_strides[1],
        stride_og=out_strides[0],
        stride_or=out_strides[1],
        stride_oc=out_strides[2],
        SCALED=scaled,
        BM=config.BM,
        BC=config.BN,
        BR=br,
        PRECISION=precision,
        num_warps=rank_warps(config.warps, br, chip, precision),
        num_stages=config.stages,
    )


def _outer(x: Tensor, p: Tensor, order: Tensor, starts: Tensor, scales: Tensor | None, out: Tensor) -> None:
    """out is [G, R, C] through any strides; adapters without rows are written as zeros."""
    chip = chip_of(x.device)
    adapters, rank, c = out.shape
    launch = _outer_plan(
        chip, adapters, c, rank, x.stride(), p.stride(), out.stride(), scales is not None,
        exact_precision(chip, x.dtype, p.dtype),
    )  # fmt: skip
    launch(x, p, order, starts, starts if scales is None else scales.contiguous(), out)


def routed_up_grad(
    dy: Tensor,
    t: Tensor,
    rows: Tensor,
    order: Tensor,
    starts: Tensor,
    b: Tensor,
    scales: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The shrink with bᵀ as its factors, then one owner per (adapter, column tile) for db."""
    p = shrink(dy, rows, order, b.transpose(1, 2), scales, t.dtype)
    db = torch.empty(b.shape, dtype=grad_dtype, device=b.device)
    _outer(dy, t, order, starts, scales, db.transpose(1, 2))
    return p, db


def routed_down_grad(
    x: Tensor, p: Tensor, rows: Tensor, order: Tensor, starts: Tensor, grad_dtype: torch.dtype
) -> Tensor:
    """One launch."""
    da = torch.empty(starts.shape[0] - 1, p.shape[1], x.shape[1], dtype=grad_dtype, device=x.device)
    _outer(x, p, order, starts, None, da)
    return da


def variants(chip: str):
    """What the launchers above run, for ahead-of-time checks."""
    pointers = {"x_ptr": "bf16", "order_ptr": "i32", "starts_ptr": "i32", "scales_ptr": "fp32", "out_ptr": "fp32"}
    for rank, factors in ((16, "bf16"), (64, "bf16"), (64, "fp32")):
        precision = exact_precision(chip, torch.bfloat16, DTYPES[factors])
        launch = _outer_plan(
            chip, 8, WIDTH, rank, (WIDTH, 1), (rank, 1), (rank * WIDTH, WIDTH, 1), False, precision
        )  # fmt: skip
        name = f"routed_outer R{rank}{' wide' * (factors == 'fp32')}"
        yield Variant(name, launch, {**pointers, "p_ptr": factors}, matrix=ANY_MATRIX)
