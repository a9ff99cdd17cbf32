"""Triton: y * s, and dy * s with the column sums of dy * y from the same read of dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, tile
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import narrow
from peftfast_kernels.variants import ROWS, WIDTH, Variant


@triton.jit
def scale_kernel(
    dy_ptr, y_ptr, s_ptr, out_ptr, ds_ptr, M, N, stride_dm, stride_dn, stride_ym, stride_yn, rows_per_part,
    GRAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) scales BN columns of the j-th part of the rows; with GRAD it also sums dy * y over them.

    dy_ptr: [M, N], what is scaled; y_ptr: [M, N], read with GRAD only; s_ptr: [N]; out_ptr: [M, N] contiguous;
    ds_ptr: fp32 [parts, N].
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    col_in = cols[None, :] < N
    wide_cols = cols.to(tl.int64)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_per_part
    last = tl.minimum(first + rows_per_part, M)
    s = tl.load(s_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    ds = tl.zeros((BN,), tl.float32)
    for m in range(first, last, BM):
        rows = m + tl.arange(0, BM).to(tl.int64)
        inside = (rows[:, None] < last) & col_in
        dy = tl.load(dy_ptr + rows[:, None] * stride_dm + wide_cols * stride_dn, mask=inside, other=0.0).to(tl.float32)
        if GRAD:
            y = tl.load(y_ptr + rows[:, None] * stride_ym + wide_cols * stride_yn, mask=inside, other=0.0)
            ds += tl.sum(dy * y.to(tl.float32), axis=0)
        out = narrow(dy * s[None, :], out_ptr.dtype.element_ty, INTERP)
        tl.store(out_ptr + rows[:, None] * N + wide_cols, out, mask=inside)
    if GRAD:
        tl.store(ds_ptr + tl.program_id(1).to(tl.int64) * N + cols, ds, mask=cols < N)


@planned
def _plan(
    chip: str, m: int, n: int, dy_strides: tuple[int, ...], y_strides: tuple[int, ...], grad: bool
) -> tuple[Launch, int]:  # fmt: skip
    """A 2D grid (column tiles, parts of the rows), and the number of parts, a function of the shape alone."""
    config = tile("elementwise", chip)
    column_tiles = cdiv(n, config.BN)
    parts = max(1, min(cdiv(m, 4 * config.BM), 1024 // column_tiles, 64))
    rows_per_part = cdiv(cdiv(m, parts), config.BM) * config.BM
    parts = cdiv(m, rows_per_part)
    launch = Launch(
        scale_kernel,
        (column_tiles, parts),
        M=m,
        N=n,
        stride_dm=dy_strides[0],
        stride_dn=dy_strides[1],
        stride_ym=y_strides[0],
        stride_yn=y_strides[1],
        rows_per_part=rows_per_part,
        GRAD=grad,
        BM=config.BM,
        BN=config.BN,
        num_warps=config.warps,
    )
    return launch, parts


def feature_scale(y: Tensor, s: Tensor) -> Tensor:
    """One launch."""
    (m, n), s = y.shape, s.contiguous()
    out = torch.empty(m, n, dtype=y.dtype, device=y.device)
    if m and n:
        launch, _ = _plan(chip_of(y.device), m, n, y.stride(), (0, 0), False)
        launch(y, y, s, out, s)
    return out


def feature_scale_grad(dy: Tensor, y: Tensor, s: Tensor, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same launch, and torch's sum of the parts of ds."""
    (m, n), s = dy.shape, s.contiguous()
    out = torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    if m == 0 or n == 0:
        return out, torch.zeros(n, dtype=grad_dtype, device=s.device)
    launch, parts = _plan(chip_of(dy.device), m, n, dy.stride(), y.stride(), True)
    sums = torch.empty(parts, n, dtype=torch.float32, device=s.device)
    launch(dy, y, s, out, sums)
    return out, sums.sum(0).to(grad_dtype)


def variants(chip: str):
    """What the launchers above run, for ahead-of-time checks."""
    pointers = {"dy_ptr": "bf16", "y_ptr": "bf16", "s_ptr": "fp32", "out_ptr": "bf16", "ds_ptr": "fp32"}
    for gradient in (False, True):
        launch, _ = _plan(chip, ROWS, WIDTH, (WIDTH, 1), (WIDTH, 1), gradient)
        yield Variant(f"feature_scale{'_grad' * gradient}", launch, pointers)
