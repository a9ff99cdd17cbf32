"""out = y * g + shift + scale * t bᵀ: the output of DoRA (Liu et al., arXiv 2402.09353) from a base product y.

With g = m / norm, b already multiplied by g, and shift = bias (1 - g) this is g (y - bias + s t Bᵀ) + bias. One read of
y, one fp32 accumulator, one rounding. Shapes: y [M, N] with any strides, g and shift [N] in fp32, t [M, R], b [N, R] in
y's dtype or both in fp32.
"""

import torch
from torch import Tensor

from peftfast_kernels.lora_down import WIDE_CHUNK, lora_cases, make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks


def _reference(y: Tensor, g: Tensor, shift: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(y, g, t, b)
    out = y.to(dtype) * g.to(dtype) + t.to(dtype) @ b.to(dtype).t() * scale
    return out if shift is None else out + shift.to(dtype)


def _build(shifted, device, rows, cols, rank, prob, dtype, wide, strided):
    (y,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    t, b = make_inputs(device, [(rows, rank), (cols, rank)], torch.float32 if wide else dtype, 1, std=rank**-0.25)
    g, shift = make_inputs(device, [(1, cols), (1, cols)], torch.float32, seed=2)
    return {"y": y, "g": g[0], "shift": shift[0] if shifted else None, "t": t, "b": b, "scale": -1.5}


def _cases():
    for shifted in (False, True):
        for case in lora_cases(lambda *a, s=shifted: _build(s, *a)):
            yield Case(case.id + "-shift" * shifted, case.make)


def _cost(y: Tensor, g: Tensor, shift: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Cost:
    (m, n), r = y.shape, t.shape[1]
    # read y, t, b, g, shift once, write out once
    small = (m * r + n * r) * t.element_size() + n * g.element_size() * (1 if shift is None else 2)
    return Cost(2.0 * m * n * r + 2.0 * m * n, float(2 * m * n * y.element_size() + small))


@op(
    reference=_reference,
    module="dora_add_kernels",
    cases=_cases,
    cost=_cost,
    fake=lambda y, g, shift, t, b, scale: y.new_empty(y.shape),
)
def dora_add(y: Tensor, g: Tensor, shift: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns y * g + shift + scale * t bᵀ [M, N] in y's dtype; ``shift`` may be None."""
    dtype = accumulate_dtype(y, g, t, b)
    if y.dtype == dtype == g.dtype:
        out = torch.mul(y, g) if shift is None else torch.addcmul(shift.to(dtype), y, g)
        return out.addmm_(t.to(dtype), b.to(dtype).t(), alpha=scale)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g, bt = g.to(dtype), b.to(dtype).t()
    for rows in row_chunks(y.shape[0], y.shape[1], WIDE_CHUNK, y.device):
        update = torch.mm(t[rows].to(dtype), bt).mul_(scale)
        if shift is not None:
            update += shift.to(dtype)
        out[rows] = update.addcmul_(y[rows].to(dtype), g)
    return out
