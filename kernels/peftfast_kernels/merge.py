"""W' = W + s B A, rounded once: what merging an adapter into its base weight stores.

Shapes: W [N, K] in any storage, a [R, K], b [N, R]. The sum is formed in fp32 from the decoded weight and the unrounded
factors; the product B A is never rounded on its own, and never exists as a whole.
"""

import torch
from torch import Tensor

from peftfast_kernels.decode import Operand, decoder_of, random_operand, weight_nk
from peftfast_kernels.lora_down import make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks

CHUNK = 1 << 20  # fp32 elements of the sum held at a time: 4 MiB


def _reference(w: Operand, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    wide = accumulate_dtype(a, b)
    return decoder_of(w).reference(w).to(wide) + b.to(wide) @ a.to(wide) * scale


def weight_cases(build, wide=200):
    """Formats, ranks up to `wide` and dtypes for the ops that read a whole weight and its factors."""
    for format, n, k, rank, stored, factors in (
        ("dense", 33, 70, 1, torch.float32, torch.float32),
        ("dense", 40, 64, wide, torch.float32, torch.float32),
        ("dense", 65, 47, 24, torch.bfloat16, torch.float32),
        ("dense_t", 20, 90, 8, torch.float16, torch.float16),
        ("nf4", 37, 96, 16, torch.float16, torch.float32),
        ("fp4", 9, 35, 3, torch.float32, torch.float32),
        ("int8", 50, 66, 5, torch.bfloat16, torch.float32),
    ):
        name = f"{format}-N{n}-K{k}-R{rank}-{str(stored)[6:]}-{str(factors)[6:]}"
        yield Case(name, lambda device, c=(format, n, k, rank, stored, factors): build(device, *c))


def make_weight_inputs(device, format, n, k, rank, stored, factors):
    """An operand and its factors for a test case."""
    a, b = make_inputs(device, [(rank, k), (n, rank)], factors, std=rank**-0.25 * k**-0.25)
    return {"w": random_operand(format, n, k, stored, device, nested=format == "nf4"), "a": a, "b": b, "scale": 0.5}


def _build(device, format, n, k, rank, stored, factors):
    return {**make_weight_inputs(device, format, n, k, rank, stored, factors), "dtype": stored}


def _cost(w: Operand, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Cost:
    (n, k), r = w.shape, a.shape[0]
    # read W, a, b once, write W' once
    stored = sum(tensor.numel() * tensor.element_size() for tensor in w.tensors)
    return Cost(2.0 * n * k * r, float(stored + n * k * dtype.itemsize + (n + k) * r * a.element_size()))


@op(
    reference=_reference,
    module="merge_kernels",
    cases=lambda: weight_cases(_build),
    cost=_cost,
    fake=lambda w, a, b, scale, dtype: a.new_empty(w.shape, dtype=dtype),
)
def merged_weight(w: Operand, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Returns W + scale b a [N, K] in ``dtype``, a fresh tensor rounded once; a [R, K], b [N, R]."""
    wide = accumulate_dtype(a, b)
    source, a = weight_nk(w, w.dtype), a.to(wide)
    out = torch.empty(w.shape, dtype=dtype, device=a.device)
    for rows in row_chunks(w.shape[0], w.shape[1], CHUNK):
        out[rows] = torch.addmm(source[rows].to(wide), b[rows].to(wide), a, alpha=scale)
    return out
