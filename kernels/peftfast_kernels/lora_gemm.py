"""The big products with the adapter inside: y = x Wᵀ + bias + s t bᵀ and dx = dy W + drop'(p a).

Shapes: x [M, K], W [N, K] in any storage (`Operand`), bias [N], t = drop(x) aᵀ [M, R], b [N, R], y [M, N];
dy [M, N], p = s dy b [M, R], a [R, K], dx [M, K]. drop'(v) = keep_mask * v / (1 - p), the transpose of dropout.

Fused: base product, bias, adapter and dropout share one fp32 accumulator and one rounding. Elsewhere the adapter comes
first and cuBLAS adds the big product to it, reading what is there while it multiplies (beta = 1): a pass over y less
than adding a rank-sized product to a big one. *Wide* means fp32 factors with half-precision activations: t and b are
never rounded then, and neither is their product before it is added, so that one comes last, in one pass by a kernel, in
chunks by torch.
"""

import torch
from torch import Tensor

from peftfast_kernels import dispatch
from peftfast_kernels.decode import Operand, decoder_of, random_operand, weight_again, weight_kn
from peftfast_kernels.keep_mask import keep_mask, keep_scale, masked_rows, small_keep, threshold
from peftfast_kernels.lora_down import WIDE_CHUNK, lora_cases, make_inputs, make_seed
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks, transposed, zero_like

#: Rows below which products of libraries may add their terms to y one by one, each with a rounding as large as y.
_FEW_ROWS = 4


def base_product(x: Tensor, w: Operand, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias [M, N], by torch."""
    wt = weight_kn(w, x.dtype)
    return torch.mm(x, wt) if bias is None else torch.addmm(bias.to(x.dtype), x, wt)


def input_product(dy: Tensor, w: Operand) -> Tensor:
    """dy W [M, K], by torch."""
    return torch.mm(dy, weight_again(w, dy.dtype))


def add_product_(y: Tensor, x: Tensor, w: Operand) -> Tensor:
    """y += x Wᵀ, in place, by torch."""
    return _add_product_(y, x, weight_kn(w, x.dtype))


def add_input_product_(dx: Tensor, dy: Tensor, w: Operand) -> Tensor:
    """dx += dy W, in place, by torch."""
    return _add_product_(dx, dy, weight_again(w, dy.dtype))


def _add_product_(y: Tensor, x: Tensor, wt: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and y.shape[0] < _FEW_ROWS:  # a compiler would hold on to the number
        return y.add_(torch.mm(x, wt))
    return y.addmm_(x, wt)


def update(t: Tensor, bt: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * t bt + bias [M, N], by torch; t [M, R], bt [R, N]."""
    if bias is None:
        return torch.addmm(zero_like(t), t, bt, beta=0, alpha=scale)
    return torch.addmm(bias.to(t.dtype), t, bt, alpha=scale)


def masked_update(p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """keep_mask * (p a) / (1 - prob) [M, K], by torch; p [M, R], a [R, K]."""
    scale, shape = keep_scale(prob), (p.shape[0], a.shape[1])
    if threshold(prob) == 0:
        return update(p, a, None, scale)
    keep = small_keep(*shape, seed, prob, p.dtype)
    if keep is not None:
        return update(p, a, None, scale).mul_(keep)
    y, zero = torch.empty(shape, dtype=p.dtype, device=p.device), zero_like(p)
    for rows, dropped in masked_rows(*shape, seed, prob):
        torch.addmm(zero, p[rows], a, beta=0, alpha=scale, out=y[rows]).masked_fill_(dropped, 0)
    return y


def add_wide_update_(y: Tensor, t: Tensor, bt: Tensor, scale: float) -> Tensor:
    """y += scale * t bt, in place; t [M, R] and bt [R, N] are wider than y."""
    for rows in row_chunks(*y.shape, WIDE_CHUNK, y.device):
        # Mixed-precision add: computed in fp32, rounded to y's dtype once.
        y[rows].add_(torch.mm(t[rows], bt), alpha=scale)
    return y


def add_wide_masked_update_(y: Tensor, p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """y += keep_mask * (p a) / (1 - prob), in place; p [M, R] and a [R, K] are wider than y."""
    scale = keep_scale(prob)
    if threshold(prob) == 0:
        return add_wide_update_(y, p, a, scale)
    for rows, dropped in masked_rows(*y.shape, seed, prob):
        y[rows].add_(update(p[rows], a, None, scale).masked_fill_(dropped, 0))
    return y


def _masked_update_reference(p: Tensor, a: Tensor, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Tensor:
    kept = keep_mask.reference(seed, prob, p.shape[0], a.shape[1], p.device)
    update = p.to(dtype) @ a.to(dtype) * keep_scale(prob)
    return torch.where(kept, update, 0)


# -- y = x Wᵀ + bias + s t bᵀ ------------------------------------------------------------------------------------------


def _gemm_reference(x: Tensor, w: Operand, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(x, t, b)
    y = x.to(dtype) @ decoder_of(w).reference(w).to(dtype).t() + t.to(dtype) @ b.to(dtype).t() * scale
    return y if bias is None else y + bias.to(dtype)


def _gemm_build(format, device, rows, cols, rank, prob, dtype, wide, strided):
    n = cols + 19
    (x,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    t, b = make_inputs(device, [(rows, rank), (n, rank)], torch.float32 if wide else dtype, seed=1, std=rank**-0.25)
    (bias,) = make_inputs(device, [(1, n)], dtype, seed=2)
    return {
        "x": x,
        "w": random_operand(format, n, cols, dtype, device, nested=rank == 3),
        "bias": bias[0] if rows % 2 else None,
        "t": t,
        "b": b,
        "scale": 0.5,
    }


def _format_cases(build):
    for format in ("dense", "dense_t", "nf4", "fp4", "int8"):
        for case in lora_cases(lambda device, *a, f=format: build(f, device, *a)):
            yield Case(f"{format}-{case.id}", case.make)


def operand_bytes(w: Operand) -> float:
    """Bytes a kernel reads to see the whole weight once."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in w.tensors))


def _gemm_cost(x: Tensor, w: Operand, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Cost:
    (m, k), (n, r) = x.shape, b.shape
    # read x, W, t, b once, write y once
    moved = (m * k + m * n) * x.element_size() + operand_bytes(w) + (m * r + n * r) * t.element_size()
    return Cost(2.0 * m * n * k + 2.0 * m * n * r, moved)


@op(
    reference=_gemm_reference,
    module="lora_gemm_kernels",
    cases=lambda: _format_cases(_gemm_build),
    cost=_gemm_cost,
    fake=lambda x, w, bias, t, b, scale: x.new_empty(x.shape[0], w.shape[0]),
    # In the wide case the launcher adds the fp32 update in one pass, even where cuBLAS does the base product.
    accepts=lambda x, w, bias, t, b, scale: t.dtype != x.dtype or dispatch.fuses("lora_gemm", x, w, bias, t, b, scale),
)
def lora_gemm(x: Tensor, w: Operand, bias: Tensor | None, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns y [M, N] = x Wᵀ + bias + scale t bᵀ in x's dtype.

    x [M, K], w an operand [N, K], bias [N] or None, t [M, R] and b [N, R] in x's dtype or both in fp32.
    """
    bt = transposed(b)
    if t.dtype == x.dtype:
        return add_product_(update(t, bt, bias, scale), x, w)
    return add_wide_update_(base_product(x, w, bias), t, bt, scale)


# -- dx = dy W + drop'(p a) --------------------------------------------------------------------------------------------


def _gemm_t_reference(dy: Tensor, w: Operand, p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    dtype = accumulate_dtype(dy, p, a)
    return dy.to(dtype) @ decoder_of(w).reference(w).to(dtype) + _masked_update_reference(p, a, seed, prob, dtype)


def _gemm_t_build(format, device, rows, cols, rank, prob, dtype, wide, strided):
    n = cols + 19
    (dy,) = make_inputs(device, [(rows, n)], dtype, strided=strided)
    p, a = make_inputs(device, [(rows, rank), (rank, cols)], torch.float32 if wide else dtype, 1, std=rank**-0.25)
    w = random_operand(format, n, cols, dtype, device, nested=rank == 3)
    return {"dy": dy, "w": w, "p": p, "a": a, "seed": make_seed(device, prob), "prob": prob}


def _gemm_t_cost(dy: Tensor, w: Operand, p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Cost:
    (m, n), (r, k) = dy.shape, a.shape
    # read dy, W, p, a once, write dx once
    moved = (m * n + m * k) * dy.element_size() + operand_bytes(w) + (m * r + r * k) * p.element_size()
    return Cost(2.0 * m * n * k + 2.0 * m * k * r, moved)


@op(
    reference=_gemm_t_reference,
    module="lora_gemm_kernels",
    cases=lambda: _format_cases(_gemm_t_build),
    cost=_gemm_t_cost,
    fake=lambda dy, w, p, a, seed, prob: dy.new_empty(dy.shape[0], w.shape[1]),
    # With dropout the launcher is used in any case: it masks in registers even where cuBLAS does the base product.
    accepts=lambda dy, w, p, a, seed, prob: (
        prob > 0 or p.dtype != dy.dtype or dispatch.fuses("lora_gemm_t", dy, w, p, a, seed, prob)
    ),
)
def lora_gemm_t(dy: Tensor, w: Operand, p: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """Returns dx [M, K] = dy W + keep_mask * (p a) / (1 - prob) in dy's dtype.

    dy [M, N], w an operand [N, K], p [M, R] and a [R, K] in dy's dtype or both in fp32. ``seed`` may be None where
    ``prob`` is 0; raises ``ValueError`` where it is missing.
    """
    if p.dtype == dy.dtype:
        return add_input_product_(masked_update(p, a, seed, prob), dy, w)
    return add_wide_masked_update_(input_product(dy, w), p, a, seed, prob)


# -- the adapter alone, for a base layer that was called as a module --------------------------------------------------


def _add_reference(y: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(y, t, b)
    return y.to(dtype) + t.to(dtype) @ b.to(dtype).t() * scale


def _add_build(device, rows, cols, rank, prob, dtype, wide, strided):
    (y,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    t, b = make_inputs(device, [(rows, rank), (cols, rank)], torch.float32 if wide else dtype, 1, std=rank**-0.25)
    return {"y": y, "t": t, "b": b, "scale": -1.5}


def _add_cost(y: Tensor, t: Tensor, b: Tensor, scale: float) -> Cost:
    (m, n), r = y.shape, t.shape[1]
    # read y, t, b once, write y once
    return Cost(2.0 * m * n * r, 2 * m * n * y.element_size() + (m * r + n * r) * t.element_size())


@op(
    reference=_add_reference,
    module="lora_expand_kernels",
    cases=lambda: lora_cases(_add_build),
    cost=_add_cost,
    fake=lambda y, t, b, scale: y.new_empty(y.shape),
    accepts=lambda y, t, b, scale: dispatch.fuses("lora_add", y, t, b, scale) or t.dtype != y.dtype,
)
def lora_add(y: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns y + scale t bᵀ in y's dtype, out of place; y [M, N], t [M, R], b [N, R] in y's dtype or both fp32."""
    if t.dtype == y.dtype:
        return torch.addmm(y, t, transposed(b), alpha=scale)
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device).copy_(y)
    return add_wide_update_(out, t, transposed(b), scale)


def _dx_reference(p: Tensor, a: Tensor, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Tensor:
    return _masked_update_reference(p, a, seed, prob, accumulate_dtype(p, a))


def _dx_build(device, rows, cols, rank, prob, dtype, wide, strided):
    factors = torch.float32 if wide else dtype
    p, a = make_inputs(device, [(rows, rank), (rank, cols)], factors, strided=strided, std=rank**-0.25)
    return {"p": p, "a": a, "seed": make_seed(device, prob), "prob": prob, "dtype": dtype}


def _dx_cost(p: Tensor, a: Tensor, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Cost:
    (m, r), k = p.shape, a.shape[1]
    # read p, a once, write dx once
    return Cost(2.0 * m * k * r, (m * r + r * k) * p.element_size() + m * k * dtype.itemsize)


@op(
    reference=_dx_reference,
    module="lora_expand_kernels",
    cases=lambda: lora_cases(_dx_build),
    cost=_dx_cost,
    fake=lambda p, a, seed, prob, dtype: p.new_empty(p.shape[0], a.shape[1], dtype=dtype),
    accepts=lambda p, a, seed, prob, dtype: prob > 0 or p.dtype != dtype,
)
def lora_dx(p: Tensor, a: Tensor, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Tensor:
    """Returns keep_mask * (p a) / (1 - prob) [M, K] in ``dtype``, for p [M, R] and a [R, K]."""
    if p.dtype == dtype:
        return masked_update(p, a, seed, prob)
    dx = torch.zeros(p.shape[0], a.shape[1], dtype=dtype, device=p.device)
    return add_wide_masked_update_(dx, p, a, seed, prob)
