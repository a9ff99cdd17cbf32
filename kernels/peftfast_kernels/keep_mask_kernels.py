"""Triton: the keep mask written out, for tests, exported models and layers that processes share; the other kernels make
it again in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, tile
from peftfast_kernels.keep_mask import threshold
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import keep_tile, row_keys
from peftfast_kernels.variants import ROWS, WIDTH, Variant


@triton.jit
def mask_kernel(seed_ptr, out_ptr, M, N, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Program (i, j) writes BM rows and BN columns of the mask. seed_ptr: int64 []; out_ptr: bool [M, N]."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    keep = keep_tile(row_keys(seed_ptr, rows), 0, cols, threshold)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], keep, mask=inside)


@planned
def _plan(chip: str, rows: int, cols: int, prob: float) -> Launch:
    """A 2D grid, one program per [BM, BN] tile of the mask."""
    config = tile("elementwise", chip)
    return Launch(
        mask_kernel,
        (cdiv(rows, config.BM), cdiv(cols, config.BN)),
        M=rows,
        N=cols,
        threshold=threshold(prob),
        BM=config.BM,
        BN=config.BN,
        num_warps=config.warps,
    )


def keep_mask(seed: Tensor | None, prob: float, rows: int, cols: int, device: torch.device) -> Tensor:
    """One launch."""
    if threshold(prob) == 0 or rows == 0 or cols == 0:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    if seed is None:
        raise ValueError(f"dropout with probability {prob} needs a seed tensor")
    out = torch.empty(rows, cols, dtype=torch.bool, device=device)
    _plan(chip_of(seed.device), rows, cols, prob)(seed, out)
    return out


def variants(chip: str):
    """What `keep_mask` launches, for ahead-of-time checks."""
    yield Variant("keep_mask", _plan(chip, ROWS, WIDTH, 0.1), {"seed_ptr": "i64", "out_ptr": "i1"}, quick=True)
