"""Triton: what an adapter adds to an output, s mask(t b), and the output that it is added to; in one pass over it."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, expand_ranks, expand_tile, update_precision
from peftfast_kernels.keep_mask import keep_scale, seed_or, threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import keep_tile, load_tile, operand, row_keys, store_tile
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, NO_MATRIX, ROWS, WIDTH, Variant


@triton.jit
def adapter_tile(
    acc, t_ptr, b_ptr, rows, cols, M, O, R, stride_tm, stride_tr, stride_br, stride_bo,
    BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """acc + t b for these rows and columns, fp32. t_ptr: [M, R], b_ptr: [R, O], both through strides."""
    for r in range(0, R, BR):
        ranks = r + tl.arange(0, BR)
        t = tl.load(
            t_ptr + rows[:, None] * stride_tm + ranks[None, :] * stride_tr,
            mask=(rows[:, None] < M) & (ranks[None, :] < R),
            other=0.0,
        )
        b = tl.load(
            b_ptr + ranks[:, None].to(tl.int64) * stride_br + cols[None, :].to(tl.int64) * stride_bo,
            mask=(ranks[:, None] < R) & (cols[None, :] < O),
            other=0.0,
        )
        acc = tl.dot(operand(t, INTERP), operand(b, INTERP), acc, input_precision=PRECISION)
    return acc


@triton.jit
def masked_adapter(
    t_ptr, b_ptr, seed_ptr, rows, cols, M, O, R, stride_tm, stride_tr, stride_br, stride_bo, scale, threshold,
    DROP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """scale * mask(t b), fp32 [BM, BO]."""
    acc = tl.zeros((BM, BO), tl.float32)
    acc = adapter_tile(
        acc, t_ptr, b_ptr, rows, cols, M, O, R, stride_tm, stride_tr, stride_br, stride_bo, BR, PRECISION, INTERP
    )  # fmt: skip
    acc = acc * scale
    if DROP:
        acc = tl.where(keep_tile(row_keys(seed_ptr, rows), 0, cols, threshold), acc, 0.0)
    return acc


@triton.jit
def expand_kernel(
    y_ptr, t_ptr, b_ptr, seed_ptr, out_ptr,
    M, O, R, stride_ym, stride_yo, stride_tm, stride_tr, stride_br, stride_bo, scale, threshold,
    ADD: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns of out = y + scale * mask(t b), without y unless ADD.

    y_ptr: [M, O] through strides, may be out_ptr itself; out_ptr: [M, O] contiguous; t_ptr: [M, R]; b_ptr: [R, O].
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BO + tl.arange(0, BO)
    if ADD:
        y = load_tile(y_ptr, rows, cols, M, O, stride_ym, stride_yo)
    acc = masked_adapter(
        t_ptr, b_ptr, seed_ptr, rows, cols, M, O, R, stride_tm, stride_tr, stride_br, stride_bo, scale, threshold,
        DROP, BM, BO, BR, PRECISION, INTERP,
    )  # fmt: skip
    if ADD:
        acc += y.to(tl.float32)
    store_tile(acc, out_ptr, rows, cols, M, O, INTERP)


def over_output(
    kernel: Any, chip: str, m: int, o: int, r: int, y_strides: Sequence[int], t_strides: Sequence[int],
    b_strides: Sequence[int], single: bool, precision: str, **own: Any,
) -> Launch:  # fmt: skip
    """A 2D grid, one program per [BM, BO] tile of y [M, O] and of t b, t [M, R] and b [R, O], which is added to it."""
    config = expand_tile(chip, single)
    return Launch(
        kernel,
        (cdiv(m, config.BM), cdiv(o, config.BN)),
        M=m,
        O=o,
        R=r,
        stride_ym=y_strides[0],
        stride_yo=y_strides[1],
        stride_tm=t_strides[0],
        stride_tr=t_strides[1],
        stride_br=b_strides[0],
        stride_bo=b_strides[1],
        BM=config.BM,
        BO=config.BN,
        BR=expand_ranks(r, config.BK, chip, precision),
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
        **own,
    )


@planned
def _expand_plan(
    chip: str, m: int, o: int, r: int, y_strides: tuple[int, ...], t_strides: tuple[int, ...],
    b_strides: tuple[int, int], single: bool, add: bool, precision: str, prob: float, scale: float,
) -> Launch:  # fmt: skip
    return over_output(
        expand_kernel, chip, m, o, r, y_strides, t_strides, b_strides, single, precision,
        scale=scale, threshold=threshold(prob), ADD=add, DROP=threshold(prob) > 0,
    )  # fmt: skip


def expand(
    y: Tensor | None, t: Tensor, b: Tensor, b_strides: tuple[int, int], scale: float, seed: Tensor | None, prob: float,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """out = (y or 0) + scale * mask(t b), b read as [R, O] through b_strides; y may be out."""
    m, o = out.shape
    if m == 0 or o == 0:
        return out
    chip = chip_of(t.device)
    source = out if y is None else y
    launch = _expand_plan(
        chip, m, o, t.shape[1], source.stride(), t.stride(), b_strides, out.dtype is torch.float32, y is not None,
        update_precision(chip, out.dtype, t.dtype), prob, scale,
    )  # fmt: skip
    launch(source, t, b, seed_or(seed, prob, t), out)
    return out


def turned(b: Tensor) -> tuple[int, int]:
    """The strides of bᵀ."""
    stride_o, stride_r = b.stride()
    return stride_r, stride_o


def lora_add(y: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch."""
    return expand(y, t, b, turned(b), scale, None, 0.0, torch.empty(y.shape, dtype=y.dtype, device=y.device))


def lora_dx(p: Tensor, a: Tensor, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Tensor:
    """One launch."""
    out = torch.empty(p.shape[0], a.shape[1], dtype=dtype, device=p.device)
    return expand(None, p, a, a.stride(), keep_scale(prob), seed, prob, out)


def variants(chip: str):
    """What the two launch, for ahead-of-time checks."""
    for add, drop, dtype, factors, rank in (
        (True, False, "bf16", "bf16", 16),
        (True, False, "bf16", "bf16", 64),
        (False, True, "bf16", "bf16", 16),
        (True, False, "bf16", "fp32", 16),
        (True, True, "bf16", "fp32", 16),
        (False, True, "bf16", "fp32", 16),
        (True, False, "bf16", "fp32", 64),
        (True, True, "bf16", "fp32", 64),
        (True, True, "fp32", "fp32", 64),
    ):
        precision = update_precision(chip, DTYPES[dtype], DTYPES[factors])
        b_strides = (WIDTH, 1) if drop else (1, rank)
        launch = _expand_plan(
            chip, ROWS, WIDTH, rank, (WIDTH, 1), (rank, 1), b_strides, dtype == "fp32", add, precision, 0.1 * drop, 2.0
        )  # fmt: skip
        yield Variant(
            f"expand {dtype}{' add' * add}{' drop' * drop}{' wide' * (factors != dtype)} R{rank}",
            launch,
            {"y_ptr": dtype, "t_ptr": factors, "b_ptr": factors, "seed_ptr": "i64", "out_ptr": dtype},
            matrix=NO_MATRIX if dtype == "fp32" else ANY_MATRIX,
            quick=drop and rank == 16,
        )
