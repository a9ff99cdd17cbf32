"""Gradients of the low-rank factors: p = s dy b and db = s dyᵀ t from one read of dy; da = pᵀ drop(x) from one of x.

Shapes: dy [M, N], t = drop(x) aᵀ [M, R], b [N, R], p [M, R] in b's dtype, db [N, R] and da [R, K] in ``grad_dtype``
(fp32 masters receive their gradient unrounded from the fp32 accumulator). x, dy may have any strides. Sums over rows
are split in fixed parts that are added in order: results do not change from run to run.
"""

import torch
from torch import Tensor

from peftfast_kernels.keep_mask import keep_mask, keep_scale, masked_rows, small_keep, threshold
from peftfast_kernels.lora_down import WIDE_CHUNK, lora_cases, make_inputs, make_seed
from peftfast_kernels.op import Cost, accumulate_dtype, op, row_chunks, zero_like


def _mm(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * left right in ``dtype``; on CUDA half-precision operands leave the accumulator in fp32."""
    if left.dtype == dtype:
        if scale == 1.0:
            return torch.mm(left, right)
        return torch.addmm(zero_like(left), left, right, beta=0, alpha=scale)
    if left.is_cuda and dtype == torch.float32:
        # addmm has no such form with a broadcast 0-d input, so the scale is applied to the small result.
        out = torch.mm(left, right, out_dtype=torch.float32)
        return out if scale == 1.0 else out.mul_(scale)
    return _mm(left, right, scale, left.dtype).to(dtype)


# -- p and db ----------------------------------------------------------------------------------------------------------


def _up_reference(dy: Tensor, t: Tensor, b: Tensor, scale: float, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(dy, t, b)
    dy = dy.to(dtype)
    return dy @ b.to(dtype) * scale, dy.t() @ t.to(dtype) * scale


def _up_build(device, rows, cols, rank, prob, dtype, wide, strided):
    (dy,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    t, b = make_inputs(device, [(rows, rank), (cols, rank)], torch.float32 if wide else dtype, 1)
    grad_dtype = torch.float32 if wide or rows % 2 else dtype
    return {"dy": dy, "t": t, "b": b, "scale": 0.25, "grad_dtype": grad_dtype}


def _up_cost(dy: Tensor, t: Tensor, b: Tensor, scale: float, grad_dtype: torch.dtype) -> Cost:
    (m, n), r = dy.shape, t.shape[1]
    # read dy, t, b once, write p and db once
    moved = m * n * dy.element_size() + (2 * m * r + n * r) * t.element_size() + n * r * grad_dtype.itemsize
    return Cost(4.0 * m * n * r, moved)


@op(
    reference=_up_reference,
    module="lora_grad_kernels",
    cases=lambda: lora_cases(_up_build),
    cost=_up_cost,
    fake=lambda dy, t, b, scale, grad_dtype: (b.new_empty(t.shape), b.new_empty(b.shape, dtype=grad_dtype)),
)
def lora_up_grad(dy: Tensor, t: Tensor, b: Tensor, scale: float, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns p [M, R] = scale dy b in b's dtype and db [N, R] = scale dyᵀ t in ``grad_dtype``.

    dy [M, N], t [M, R] and b [N, R] in dy's dtype or both in fp32; accumulated in fp32.
    """
    if dy.dtype == b.dtype:
        return _mm(dy, b, scale, b.dtype), _mm(dy.t(), t, scale, grad_dtype)
    p = torch.empty(t.shape, dtype=b.dtype, device=b.device)
    db = torch.zeros(b.shape, dtype=b.dtype, device=b.device)
    zero = zero_like(b)
    for rows in row_chunks(dy.shape[0], dy.shape[1], WIDE_CHUNK):
        part = dy[rows].to(b.dtype)
        torch.addmm(zero, part, b, beta=0, alpha=scale, out=p[rows])
        db.addmm_(part.t(), t[rows], alpha=scale)
    return p, db.to(grad_dtype)


# -- da ----------------------------------------------------------------------------------------------------------------


def _down_reference(x: Tensor, p: Tensor, seed: Tensor | None, prob: float, grad_dtype: torch.dtype) -> Tensor:
    dtype = accumulate_dtype(x, p)
    kept = keep_mask.reference(seed, prob, x.shape[0], x.shape[1], x.device)
    return p.to(dtype).t() @ torch.where(kept, x.to(dtype), 0) * (keep_scale(prob) if threshold(prob) else 1.0)


def _down_build(device, rows, cols, rank, prob, dtype, wide, strided):
    (x,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    (p,) = make_inputs(device, [(rows, rank)], torch.float32 if wide else dtype, seed=1)
    grad_dtype = torch.float32 if wide or rows % 2 else dtype
    return {"x": x, "p": p, "seed": make_seed(device, prob), "prob": prob, "grad_dtype": grad_dtype}


def _down_cost(x: Tensor, p: Tensor, seed: Tensor | None, prob: float, grad_dtype: torch.dtype) -> Cost:
    (m, k), r = x.shape, p.shape[1]
    # read x and p once, write da once
    return Cost(2.0 * m * k * r, m * k * x.element_size() + m * r * p.element_size() + r * k * grad_dtype.itemsize)


@op(
    reference=_down_reference,
    module="lora_grad_kernels",
    cases=lambda: lora_cases(_down_build),
    cost=_down_cost,
    fake=lambda x, p, seed, prob, grad_dtype: x.new_empty(p.shape[1], x.shape[1], dtype=grad_dtype),
)
def lora_down_grad(x: Tensor, p: Tensor, seed: Tensor | None, prob: float, grad_dtype: torch.dtype) -> Tensor:
    """Returns da [R, K] = pᵀ drop(x) in ``grad_dtype``, for x [M, K] and p [M, R] in x's dtype or in fp32.

    ``seed`` may be None where ``prob`` is 0; raises ``ValueError`` where it is missing.
    """
    if threshold(prob) == 0 and x.dtype == p.dtype:
        return _mm(p.t(), x, 1.0, grad_dtype)
    dtype = torch.promote_types(p.dtype, torch.float32)
    keep = small_keep(*x.shape, seed, prob, dtype) if x.dtype == p.dtype == dtype and threshold(prob) else None
    if keep is not None:
        return torch.addmm(zero_like(p), p.t(), x * keep, beta=0, alpha=keep_scale(prob)).to(grad_dtype)
    da = torch.zeros(p.shape[1], x.shape[1], dtype=dtype, device=x.device)
    if threshold(prob) == 0:
        for rows in row_chunks(x.shape[0], x.shape[1], WIDE_CHUNK):
            da.addmm_(p[rows].t(), x[rows].to(dtype))
        return da.to(grad_dtype)
    # Masked chunks are small, so they are summed in fp32 whatever the dtype of x: a running half-precision sum drifts.
    scale = keep_scale(prob)
    for rows, dropped in masked_rows(x.shape[0], x.shape[1], seed, prob):
        da.addmm_(p[rows].t().to(dtype), x[rows].to(dtype).masked_fill(dropped, 0), alpha=scale)
    return da.to(grad_dtype)
