"""Triton: W + s B A in one pass over the stored weight, whatever its format."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, rank_tile, tile
from peftfast_kernels.decode import Operand
from peftfast_kernels.decode_kernels import Stored, decode_arguments, decode_variant, stored
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.lora_gemm_kernels import adapter_tile
from peftfast_kernels.op import is_interpreting
from peftfast_kernels.tiles import narrow
from peftfast_kernels.variants import NO_MATRIX, Variant


@triton.jit
def merge_kernel(
    w0, w1, w2, w3, w4, table, a_ptr, b_ptr, out_ptr,
    N, K, R, stride_n, stride_k, stride_ar, stride_ak, stride_bn, stride_br, scale,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BN rows and BK columns of W + scale * b a. out_ptr: [N, K] contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    cols = k0 + tl.arange(0, BK)
    acc = tl.zeros((BN, BK), tl.float32)
    acc = adapter_tile(
        acc, b_ptr, a_ptr, rows, cols, N, K, R, stride_bn, stride_br, stride_ar, stride_ak, BR, PRECISION, INTERP
    )  # fmt: skip
    w = DECODE(
        w0, w1, w2, w3, w4, table, rows, k0, N, K, stride_n, stride_k, BK, BLOCK, NESTED, LAYOUT, DTYPE, INTERP
    )  # fmt: skip
    acc = acc * scale + w.to(tl.float32)
    inside = (rows[:, None] < N) & (cols[None, :] < K)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], narrow(acc, out_ptr.dtype.element_ty, INTERP), mask=inside)


@planned
def _plan(
    chip: str, w: Stored, r: int, a_strides: tuple[int, ...], b_strides: tuple[int, ...], scale: float
) -> Launch:  # fmt: skip
    """A 2D grid, one program per [BN, BK] tile of the weight."""
    config = tile("merge", chip)
    return Launch(
        merge_kernel,
        (cdiv(w.shape[0], config.BM), cdiv(w.shape[1], config.BN)),
        **decode_arguments(w, config.BN),
        R=r,
        stride_ar=a_strides[0],
        stride_ak=a_strides[1],
        stride_bn=b_strides[0],
        stride_br=b_strides[1],
        scale=scale,
        BN=config.BM,
        BK=config.BN,
        BR=rank_tile(r, 32),
        # Never plain TF32 here: the result is stored, and a merged weight must not depend on a speed setting.
        PRECISION="ieee",
        INTERP=is_interpreting(),
        num_warps=config.warps,
        enable_fp_fusion=False,  # the decode rounds step by step
    )


def merged_weight(w: Operand, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """One launch."""
    out = torch.empty(w.shape, dtype=dtype, device=a.device)
    if out.numel():
        kind, pointers = stored(w)
        _plan(chip_of(a.device), kind, a.shape[0], a.stride(), b.stride(), scale)(*pointers, a, b, out)
    return out


def variants(chip: str):
    """What `merged_weight` launches, for ahead-of-time checks."""
    config = tile("merge", chip)
    for format in ("dense", "nf4"):
        pointers, constexprs = decode_variant(format, 64, format == "nf4", "bf16")
        yield Variant(
            name=f"merge {format}",
            kernel=merge_kernel,
            pointers={**pointers, "a_ptr": "fp32", "b_ptr": "fp32", "out_ptr": "bf16"},
            constexprs={
                **constexprs,
                "stride_ak": 1,
                "stride_br": 1,
                "BN": config.BM,
                "BK": config.BN,
                "BR": 16,
                "PRECISION": "ieee",
                "INTERP": False,
            },
            warps=config.warps,
            matrix=NO_MATRIX,
            fp_fusion=False,
        )
