"""‖W + s B A‖ per output row without building the sum: the norm of DoRA (Liu et al., arXiv 2402.09353).

norm² = ‖W_i‖² + 2 s Σ (W Aᵀ ∘ B)_i + s² Σ (B (A Aᵀ) ∘ B)_i. Shapes: W [N, K] in any storage, a [R, K], b [N, R].
‖W_i‖² never changes while W is frozen: compute it once with `row_squares` and pass it in.
"""

import torch
from torch import Tensor

from peftfast_kernels.decode import Operand, decoder_of, weight_nk
from peftfast_kernels.merge import make_weight_inputs, weight_cases
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks

CHUNK = 1 << 20  # fp32 elements of the weight held at a time: 4 MiB
MAX_RANK = 128  # the kernel keeps all ranks of its rows in registers, which hold no more


def _reference(w: Operand, a: Tensor, b: Tensor, scale: float, squares: Tensor | None) -> Tensor:
    dtype = accumulate_dtype(a, b)
    return (decoder_of(w).reference(w).to(dtype) + b.to(dtype) @ a.to(dtype) * scale).norm(dim=1)


def _build(squares, *case):
    made = make_weight_inputs(*case)
    return {**made, "squares": row_squares(made["w"]) if squares else None}


def _cases():
    for cached in (False, True):
        for case in weight_cases(lambda *a, c=cached: _build(c, *a), MAX_RANK - 8):
            yield Case(case.id + "-cached" * cached, case.make)


def _cost(w: Operand, a: Tensor, b: Tensor, scale: float, squares: Tensor | None) -> Cost:
    (n, k), r = w.shape, a.shape[0]
    # read W, a, b once, write [N]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in w.tensors)
    return Cost(2.0 * n * k * r + 2.0 * n * r * r, float(stored + (n + k) * r * a.element_size() + 4 * n))


def row_squares(w: Operand) -> Tensor:
    """Returns ‖W_i‖² [N] in fp32 (fp64 for an fp64 weight), for a frozen weight's cache."""
    source = weight_nk(w, w.dtype)
    dtype = accumulate_dtype(source)
    parts = [source[rows].to(dtype).square().sum(1) for rows in row_chunks(w.shape[0], w.shape[1], CHUNK)]
    return torch.cat(parts) if parts else source.new_zeros(0, dtype=dtype)


def gram(a: Tensor) -> Tensor:
    """a aᵀ [R, R] in fp32 (fp64 for fp64 factors)."""
    a = a.to(accumulate_dtype(a))
    return a @ a.t()


@op(
    reference=_reference,
    module="row_norm_kernels",
    cases=_cases,
    cost=_cost,
    fake=lambda w, a, b, scale, squares: a.new_empty(w.shape[0], dtype=accumulate_dtype(a, b)),
    accepts=lambda w, a, b, scale, squares: a.shape[0] <= MAX_RANK,
)
def row_norm(w: Operand, a: Tensor, b: Tensor, scale: float, squares: Tensor | None) -> Tensor:
    """Returns the Euclidean norm of each row of W + scale b a, [N] in fp32.

    a [R, K], b [N, R]; ``squares`` is `row_squares(w)` or None, in which case it is computed on the way.
    """
    dtype = accumulate_dtype(a, b)
    source, a, product = weight_nk(w, w.dtype), a.to(dtype), gram(a)
    out = torch.empty(w.shape[0], dtype=dtype, device=a.device)
    for rows in row_chunks(w.shape[0], w.shape[1], CHUNK):
        part, factor = source[rows].to(dtype), b[rows].to(dtype)
        cross = torch.addmm(part @ a.t(), factor, product, beta=2 * scale, alpha=scale * scale)
        squared = part.square().sum(1) if squares is None else squares[rows].to(dtype)
        # Cancellation may leave a tiny negative number where W + s B A is nearly zero.
        torch.sqrt((squared + (cross * factor).sum(1)).clamp_(min=0), out=out[rows])
    return out
