"""Low-rank linears that read one input (q, k and v; gate and up): their big products, each in one launch.

As in siblings.py, with W_i [N_i, K], bias_i [N_i] and y_i [M, N_i]. Forward, the tiles of all outputs are one grid;
backward, dx is summed over the siblings in one accumulator instead of in memory. Where cuBLAS is faster
(`dispatch.fuses_together`), one pass makes all updates and it adds the products to them, or the other way round where
updates are wide, as in lora_gemm.py.
"""

import torch
from torch import Tensor

from peftfast_kernels.decode import Operand, random_operand
from peftfast_kernels.lora_down import make_inputs
from peftfast_kernels.lora_gemm import (
    add_input_product_,
    add_wide_masked_update_,
    input_product,
    lora_gemm,
    lora_gemm_t,
    masked_update,
    update,
)
from peftfast_kernels.op import Case, Cost, op
from peftfast_kernels.siblings import drops, make_factors, make_seeds, siblings_cases, summed

# -- y_i = x W_iᵀ + bias_i + s_i t_i b_iᵀ ------------------------------------------------------------------------------


def _gemm_reference(
    x: Tensor, w: list[Operand], bias: list[Tensor | None], t: list[Tensor], b: list[Tensor], scales: list[float]
) -> list[Tensor]:
    return [lora_gemm.reference(x, *own) for own in zip(w, bias, t, b, scales, strict=True)]


def _operands(device, format, widths, cols, dtype, nested):
    return [random_operand(format, n, cols, dtype, device, nested=nested, seed=i) for i, n in enumerate(widths)]


def _format_cases(build):
    for format in ("dense", "dense_t", "nf4", "int8"):
        for case in siblings_cases(lambda device, *a, f=format: build(f, device, *a)):
            yield Case(f"{format}-{case.id}", case.make)


def _gemm_build(format, device, rows, cols, widths, ranks, probs, dtype, wide, strided):
    (x,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    t = make_factors(device, [(rows, r) for r in ranks], dtype, wide)
    b = make_factors(device, list(zip(widths, ranks, strict=True)), dtype, wide, seed=2, std=0.5)
    bias = make_inputs(device, [(n, 1) for n in widths], dtype, seed=3)
    return {
        "x": x, "w": _operands(device, format, widths, cols, dtype, nested=rows == 33),
        "bias": [one[:, 0] if rows % 2 else None for one in bias], "t": t, "b": b,
        "scales": [0.5 + i for i in range(len(b))],
    }  # fmt: skip


def _gemm_cost(
    x: Tensor, w: list[Operand], bias: list[Tensor | None], t: list[Tensor], b: list[Tensor], scales: list[float]
) -> Cost:
    return summed(lora_gemm.cost(x, *own) for own in zip(w, bias, t, b, scales, strict=True))


@op(
    reference=_gemm_reference,
    module="siblings_gemm_kernels",
    cases=lambda: _format_cases(_gemm_build),
    cost=_gemm_cost,
    fake=None,
    accepts=lambda x, w, bias, t, b, scales: len(w) > 1,
)
def siblings_gemm(
    x: Tensor, w: list[Operand], bias: list[Tensor | None], t: list[Tensor], b: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """Returns all y_i [M, N_i] in x's dtype, as `lora_gemm` does for each."""
    return [lora_gemm(x, *own) for own in zip(w, bias, t, b, scales, strict=True)]


# -- dx = Σ dy_i W_i + drop_i'(p_i a_i) --------------------------------------------------------------------------------


def _gemm_t_reference(
    dys: list[Tensor], w: list[Operand], p: list[Tensor], a: list[Tensor], seeds: list[Tensor | None],
    probs: list[float],
) -> Tensor:  # fmt: skip
    return sum(lora_gemm_t.reference(*own) for own in zip(dys, w, p, a, seeds, probs, strict=True))


def _gemm_t_build(format, device, rows, cols, widths, ranks, probs, dtype, wide, strided):
    dys = make_inputs(device, [(rows, n) for n in widths], dtype, strided=strided)
    p = make_factors(device, [(rows, r) for r in ranks], dtype, wide)
    a = make_factors(device, [(r, cols) for r in ranks], dtype, wide, seed=2, std=0.5)
    return {
        "dys": dys, "w": _operands(device, format, widths, cols, dtype, nested=rows == 33), "p": p, "a": a,
        "seeds": make_seeds(device, probs), "probs": probs,
    }  # fmt: skip


def _gemm_t_cost(
    dys: list[Tensor], w: list[Operand], p: list[Tensor], a: list[Tensor], seeds: list[Tensor | None],
    probs: list[float],
) -> Cost:  # fmt: skip
    again = (len(w) - 1) * dys[0].shape[0] * w[0].shape[1] * dys[0].element_size()  # dx is written once
    flops, moved = summed(lora_gemm_t.cost(*own) for own in zip(dys, w, p, a, seeds, probs, strict=True))
    return Cost(flops, moved - again)


def add_input_products_(dx: Tensor, dys: list[Tensor], w: list[Operand]) -> Tensor:
    """dx += Σ dy_i W_i, in place, by torch."""
    for dy, one in zip(dys, w, strict=True):
        add_input_product_(dx, dy, one)
    return dx


def input_products(dys: list[Tensor], w: list[Operand]) -> Tensor:
    """Σ dy_i W_i [M, K], by torch, summed where it is computed."""
    return add_input_products_(input_product(dys[0], w[0]), dys[1:], w[1:])


@op(
    reference=_gemm_t_reference,
    module="siblings_gemm_kernels",
    cases=lambda: _format_cases(_gemm_t_build),
    cost=_gemm_t_cost,
    fake=None,
    accepts=lambda dys, w, p, a, seeds, probs: len(w) > 1,
)
def siblings_gemm_t(
    dys: list[Tensor], w: list[Operand], p: list[Tensor], a: list[Tensor], seeds: list[Tensor | None],
    probs: list[float],
) -> Tensor:  # fmt: skip
    """Returns dx [M, K] in dy's dtype, the sum of what `lora_gemm_t` gives for each."""
    if len(w) == 1:
        return lora_gemm_t(dys[0], w[0], p[0], a[0], seeds[0], probs[0])
    if p[0].dtype != dys[0].dtype:
        dx = input_products(dys, w)
        for own in zip(p, a, seeds, probs, strict=True):
            add_wide_masked_update_(dx, *own)
        return dx
    if not drops(probs):
        return add_input_products_(update(torch.cat(p, dim=1), torch.cat(a), None, 1.0), dys, w)
    first, *others = zip(p, a, seeds, probs, strict=True)
    dx = masked_update(*first)
    for own in others:
        dx += masked_update(*own)
    return add_input_products_(dx, dys, w)
