"""t = drop(x) aᵀ: the down-projection of LoRA (Hu et al., arXiv 2106.09685), dropout regenerated from its seed.

Shapes: x [M, K] with any strides, a [R, K], t [M, R] in a's dtype. Several adapters that share x are one call with
their factors stacked on R. The *wide* case, a in fp32 with x in half precision, accumulates fp32 products of the
upcast x; x is never copied to fp32 as a whole.
"""

import torch
from torch import Tensor

from peftfast_kernels.keep_mask import keep_mask, keep_scale, masked_rows, small_keep, threshold
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks, transposed, zero_like

WIDE_CHUNK = 1 << 19  # elements of half-precision activations held in fp32 at a time: 2 MiB


def _reference(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    dtype = accumulate_dtype(x, a)
    kept = keep_mask.reference(seed, prob, x.shape[0], x.shape[1], x.device)
    return torch.where(kept, x.to(dtype), 0) @ a.to(dtype).t() * (keep_scale(prob) if threshold(prob) else 1.0)


def make_inputs(device, shapes, dtype, wide=False, strided=False, seed=0, std=1.0):
    """Random tensors of the given shapes; strided ones are every second row and column of a larger tensor."""
    g = torch.Generator().manual_seed(seed)

    def one(shape):
        shape = [size * 2 for size in shape] if strided else shape
        tensor = (torch.randn(shape, generator=g) * std).to(dtype).to(device)
        return tensor[::2, ::2] if strided else tensor

    return [one(shape) for shape in shapes]


def lora_cases(build):
    """The grid shared by the LoRA ops: ranks, odd shapes, strides, dropout, the wide case, no rows and one row."""
    for rows, cols, rank, prob, dtype, wide, strided in (
        (7, 33, 1, 0.0, torch.float32, False, False),
        (33, 130, 3, 0.3, torch.float32, False, True),
        (1, 72, 8, 0.1, torch.float32, False, False),
        (0, 48, 4, 0.1, torch.float32, False, False),
        (65, 47, 24, 0.5, torch.float32, False, False),
        (20, 96, 200, 0.0, torch.float32, False, False),
        (40, 64, 48, 1.0, torch.float32, False, False),
        (37, 80, 16, 0.0, torch.float16, False, True),
        (37, 80, 16, 0.2, torch.bfloat16, False, False),
        (50, 66, 5, 0.2, torch.bfloat16, True, False),
        (34, 70, 8, 0.0, torch.float16, True, True),
        (600, 20, 7, 0.2, torch.float32, False, False),  # several parts of the rows
        (5, 600, 6, 0.2, torch.float16, False, False),  # several parts of the columns
    ):
        name = f"M{rows}-D{cols}-R{rank}-p{prob}-{str(dtype)[6:]}{'-wide' * wide}{'-strided' * strided}"
        yield Case(name, lambda device, c=(rows, cols, rank, prob, dtype, wide, strided): build(device, *c))


def make_seed(device: str, prob: float) -> Tensor | None:
    """A fixed test seed above 2**32, or None where there is no dropout."""
    return torch.tensor(0x1234_5678_9ABC, dtype=torch.int64, device=device) if prob else None


def _build(device, rows, cols, rank, prob, dtype, wide, strided):
    (x,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    (a,) = make_inputs(device, [(rank, cols)], torch.float32 if wide else dtype, seed=1, std=cols**-0.5)
    return {"x": x, "a": a, "seed": make_seed(device, prob), "prob": prob}


def _cost(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Cost:
    (m, k), r = x.shape, a.shape[0]
    # read x once, a once, write t once
    return Cost(2.0 * m * k * r, m * k * x.element_size() + (r * k + m * r) * a.element_size())


@op(
    reference=_reference,
    module="lora_down_kernels",
    cases=lambda: lora_cases(_build),
    cost=_cost,
    fake=lambda x, a, seed, prob: a.new_empty(x.shape[0], a.shape[0]),
)
def lora_down(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    """Returns t [M, R] = drop(x) aᵀ in a's dtype, for x [M, K] and a [R, K], accumulated in fp32.

    ``seed`` is a 0-d int64 tensor; it may be None where ``prob`` is 0. Raises ``ValueError`` where it is missing.
    """
    if threshold(prob) == 0:
        if x.dtype == a.dtype:
            return torch.mm(x, transposed(a))
        return _wide(x, a)
    (m, k), r = x.shape, a.shape[0]
    keep = small_keep(m, k, seed, prob, a.dtype) if x.dtype == a.dtype else None
    if keep is not None:
        return torch.addmm(zero_like(a), x * keep, transposed(a), beta=0, alpha=keep_scale(prob))
    t = torch.empty(m, r, dtype=a.dtype, device=a.device)
    at, scale, zero = transposed(a), keep_scale(prob), zero_like(a)
    for rows, dropped in masked_rows(m, k, seed, prob):
        # The kept elements are scaled inside the product, so that they are not rounded a second time.
        kept = x[rows].to(a.dtype).masked_fill(dropped, 0)
        torch.addmm(zero, kept, at, beta=0, alpha=scale, out=t[rows])
    return t


def _wide(x: Tensor, a: Tensor) -> Tensor:
    t = torch.empty(x.shape[0], a.shape[0], dtype=a.dtype, device=a.device)
    at = transposed(a)
    for rows in row_chunks(x.shape[0], x.shape[1], WIDE_CHUNK):
        torch.mm(x[rows].to(a.dtype), at, out=t[rows])
    return t
