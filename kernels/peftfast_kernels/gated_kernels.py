"""Triton: the middle of a gated MLP, forward and backward, each in one pass. Computed in fp32, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, tile
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.tiles import narrow
from peftfast_kernels.variants import ROWS, WIDTH, Variant


@triton.jit
def activation(g, ACT: tl.constexpr):
    """(act(g), act'(g)) for g fp32."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * cdf
        slope = cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACT == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1, so 0.5 (1 + tanh(u)) is a sigmoid
        u = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        s = tl.sigmoid(u)
        value = g * s
        # 1 - s would have lost its digits where s is nearly 1, and what it is multiplied by is large there
        slope = s + value * tl.sigmoid(-u) * (1.5957691216057308 + 0.2140644488 * g * g)
    else:
        tl.static_assert(ACT == "relu")
        value = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(g <= 0.0, 0.0, 1.0)
    return value, slope


@triton.jit
def gated_kernel(
    dh_ptr, gate_ptr, up_ptr, h_ptr, d_gate_ptr, d_up_ptr,
    M, N, stride_dm, stride_dn, stride_gm, stride_gn, stride_um, stride_un,
    ACT: tl.constexpr, GRAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes BM rows and BN columns of h = act(gate) * up; with GRAD also of both gradients.

    gate_ptr, up_ptr, dh_ptr: [M, N], the last read with GRAD only; h_ptr, d_gate_ptr, d_up_ptr: [M, N] contiguous.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    gate = tl.load(gate_ptr + rows[:, None] * stride_gm + cols[None, :] * stride_gn, mask=inside, other=0.0)
    up = tl.load(up_ptr + rows[:, None] * stride_um + cols[None, :] * stride_un, mask=inside, other=0.0)
    if GRAD:  # here, because no compiler reads it before h has been written, which might be the same memory
        dh = tl.load(dh_ptr + rows[:, None] * stride_dm + cols[None, :] * stride_dn, mask=inside, other=0.0)
    up = up.to(tl.float32)
    value, slope = activation(gate.to(tl.float32), ACT)
    out = rows[:, None] * N + cols[None, :]
    tl.store(h_ptr + out, narrow(value * up, h_ptr.dtype.element_ty, INTERP), mask=inside)
    if GRAD:
        dh = dh.to(tl.float32)
        tl.store(d_gate_ptr + out, narrow(dh * up * slope, d_gate_ptr.dtype.element_ty, INTERP), mask=inside)
        tl.store(d_up_ptr + out, narrow(dh * value, d_up_ptr.dtype.element_ty, INTERP), mask=inside)


@planned
def _plan(
    chip: str, m: int, n: int, dh_strides: tuple[int, ...], gate_strides: tuple[int, ...], up_strides: tuple[int, ...],
    act: str, grad: bool,
) -> Launch:  # fmt: skip
    """A 2D grid (row tiles, column tiles)."""
    config = tile("elementwise", chip)
    return Launch(
        gated_kernel,
        (cdiv(m, config.BM), cdiv(n, config.BN)),
        M=m,
        N=n,
        stride_dm=dh_strides[0],
        stride_dn=dh_strides[1],
        stride_gm=gate_strides[0],
        stride_gn=gate_strides[1],
        stride_um=up_strides[0],
        stride_un=up_strides[1],
        ACT=act,
        GRAD=grad,
        BM=config.BM,
        BN=config.BN,
        num_warps=config.warps,
    )


def _launch(dh: Tensor | None, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, ...]:
    m, n = gate.shape
    outs = [torch.empty(m, n, dtype=gate.dtype, device=gate.device) for _ in range(1 if dh is None else 3)]
    if m == 0 or n == 0:
        return tuple(outs)
    source = gate if dh is None else dh
    launch = _plan(
        chip_of(gate.device), m, n, source.stride(), gate.stride(), up.stride(), act, dh is not None
    )  # fmt: skip
    launch(source, gate, up, outs[0], outs[-1] if dh is None else outs[1], outs[-1])
    return tuple(outs)


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """One launch."""
    return _launch(None, gate, up, act)[0]


def gated_grad(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, ...]:
    """One launch."""
    return _launch(dh, gate, up, act)


def variants(chip: str):
    """What the launchers above run, for ahead-of-time checks."""
    pointers = dict.fromkeys(("dh_ptr", "gate_ptr", "up_ptr", "h_ptr", "d_gate_ptr", "d_up_ptr"), "bf16")
    for act in ("silu", "gelu", "gelu_tanh", "relu"):
        for gradient in (False, True):
            launch = _plan(chip, ROWS, WIDTH, (WIDTH, 1), (WIDTH, 1), (WIDTH, 1), act, gradient)
            yield Variant(f"gated{'_grad' * gradient} {act}", launch, pointers, quick=act == "silu")
