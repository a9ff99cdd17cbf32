"""Triton: out = y * g + shift + scale * t bᵀ, one program per tile of y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import chip_of, update_precision
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_expand_kernels import adapter_tile, over_output, turned
from peftfast_kernels.tiles import load_tile, store_tile
from peftfast_kernels.variants import ANY_MATRIX, DTYPES, ROWS, WIDTH, Variant


@triton.jit
def dora_add_kernel(
    y_ptr, g_ptr, shift_ptr, t_ptr, b_ptr, out_ptr,
    M, O, R, stride_ym, stride_yo, stride_tm, stride_tr, stride_br, stride_bo, scale,
    SHIFT: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BO columns.

    y_ptr: [M, O] through strides; g_ptr, shift_ptr: [O]; t_ptr: [M, R]; b_ptr: [R, O]; out_ptr: [M, O] contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BO + tl.arange(0, BO)
    y = load_tile(y_ptr, rows, cols, M, O, stride_ym, stride_yo)
    acc = tl.zeros((BM, BO), tl.float32)
    acc = adapter_tile(
        acc, t_ptr, b_ptr, rows, cols, M, O, R, stride_tm, stride_tr, stride_br, stride_bo, BR, PRECISION, INTERP
    )  # fmt: skip
    acc = acc * scale
    g = tl.load(g_ptr + cols, mask=cols < O, other=0.0).to(tl.float32)
    acc += y.to(tl.float32) * g[None, :]
    if SHIFT:
        acc += tl.load(shift_ptr + cols, mask=cols < O, other=0.0).to(tl.float32)[None, :]
    store_tile(acc, out_ptr, rows, cols, M, O, INTERP)


@planned
def _plan(
    chip: str, m: int, o: int, r: int, y_strides: tuple[int, ...], t_strides: tuple[int, ...],
    b_strides: tuple[int, ...], single: bool, shifts: bool, precision: str, scale: float,
) -> Launch:  # fmt: skip
    return over_output(
        dora_add_kernel, chip, m, o, r, y_strides, t_strides, b_strides, single, precision, scale=scale, SHIFT=shifts
    )


def dora_add(y: Tensor, g: Tensor, shift: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """One launch."""
    m, o = y.shape
    out = torch.empty(m, o, dtype=y.dtype, device=y.device)
    if m == 0 or o == 0:
        return out
    chip = chip_of(y.device)
    launch = _plan(
        chip, m, o, t.shape[1], y.stride(), t.stride(), turned(b), y.dtype is torch.float32, shift is not None,
        update_precision(chip, y.dtype, t.dtype), scale,
    )  # fmt: skip
    launch(y, g.contiguous(), g if shift is None else shift.contiguous(), t, b, out)
    return out


def variants(chip: str):
    """What `dora_add` launches, for ahead-of-time checks."""
    for shift, factors, rank in ((True, "bf16", 16), (False, "fp32", 16), (True, "fp32", 64)):
        precision = update_precision(chip, torch.bfloat16, DTYPES[factors])
        launch = _plan(chip, ROWS, WIDTH, rank, (WIDTH, 1), (rank, 1), (1, rank), False, shift, precision, 2.0)
        pointers = {"y_ptr": "bf16", "g_ptr": "fp32", "shift_ptr": "fp32", "t_ptr": factors, "b_ptr": factors}
        yield Variant(
            f"dora_add{' bias' * shift}{' wide' * (factors == 'fp32')} R{rank}",
            launch,
            {**pointers, "out_ptr": "bf16"},
            matrix=ANY_MATRIX,
            quick=factors == "bf16",
        )
