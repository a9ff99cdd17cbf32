"""‖W + s B A‖ per output row without the whole sum in memory: the norm of DoRA (Liu et al., arXiv 2402.09353).

The kernel builds none of it: norm² = ‖W_i‖² + 2 s Σ (W Aᵀ ∘ B)_i + s² Σ (B (A Aᵀ) ∘ B)_i, from one read of W. torch
builds some rows at a time, which takes it half of that formula's operations. Shapes: W [N, K] in any storage, a [R, K],
b [N, R].
"""

import torch
from torch import Tensor

from peftfast_kernels.decode import Operand, decoder_of, random_operand, weight_nk
from peftfast_kernels.lora_down import make_inputs
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks

CHUNK = 1 << 18  # fp32 elements of the changed weight held at a time: 1 MiB
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of a weight that the kernel reads; torch reads any
MAX_RANK = 128  # the kernel keeps all ranks of its rows in registers, which hold no more


def _reference(w: Operand, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(a, b)
    return (decoder_of(w).reference(w).to(dtype) + b.to(dtype) @ a.to(dtype) * scale).norm(dim=1)


def _cases():
    """Formats, ranks up to nearly the largest, dtypes, and columns in several parts."""
    for format, n, k, rank, stored, factors in (
        ("dense", 33, 70, 1, torch.float32, torch.float32),
        ("dense", 40, 64, MAX_RANK - 8, torch.float32, torch.float32),
        ("dense", 65, 47, 24, torch.bfloat16, torch.float32),
        ("dense_t", 20, 90, 8, torch.float16, torch.float16),
        ("nf4", 37, 96, 16, torch.float16, torch.float32),
        ("fp4", 9, 35, 3, torch.float32, torch.float32),
        ("int8", 50, 66, 5, torch.bfloat16, torch.float32),
        ("dense", 35, 515, 100, torch.bfloat16, torch.float32),
    ):
        name = f"{format}-N{n}-K{k}-R{rank}-{str(stored)[6:]}-{str(factors)[6:]}"
        yield Case(name, lambda device, c=(format, n, k, rank, stored, factors): _build(device, *c))


def _build(device, format, n, k, rank, stored, factors):
    a, b = make_inputs(device, [(rank, k), (n, rank)], factors, std=rank**-0.25 * k**-0.25)
    return {"w": random_operand(format, n, k, stored, device, nested=format == "nf4"), "a": a, "b": b, "scale": 0.5}


def _cost(w: Operand, a: Tensor, b: Tensor, scale: float) -> Cost:
    (n, k), r = w.shape, a.shape[0]
    # read W, a, b once, write [N]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in w.tensors)
    return Cost(2.0 * n * k * r + 2.0 * n * r * r, float(stored + (n + k) * r * a.element_size() + 4 * n))


@op(
    reference=_reference,
    module="row_norm_kernels",
    cases=_cases,
    cost=_cost,
    fake=lambda w, a, b, scale: a.new_empty(w.shape[0], dtype=accumulate_dtype(a, b)),
    accepts=lambda w, a, b, scale: a.shape[0] <= MAX_RANK and w.dtype in DTYPES,
)
def row_norm(w: Operand, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns the Euclidean norm of each row of W + scale b a, [N] in fp32.

    a [R, K], b [N, R].
    """
    dtype = accumulate_dtype(a, b)
    source, a = weight_nk(w, w.dtype), a.to(dtype)
    out = torch.empty(w.shape[0], dtype=dtype, device=a.device)
    for rows in row_chunks(w.shape[0], w.shape[1], CHUNK, w.device):
        part, factor = source[rows], b[rows].to(dtype)
        if part.dtype is dtype:
            changed = torch.addmm(part, factor, a, alpha=scale)
        else:
            changed = part.to(dtype).addmm_(factor, a, alpha=scale)
        # named for traces, in which the product has another dtype where autocast is on
        torch.linalg.vector_norm(changed, dim=1, dtype=dtype, out=out[rows])
    return out
