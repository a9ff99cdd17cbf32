"""t = drop(x) aᵀ, the down-projection of LoRA (Hu et al., arXiv 2106.09685), and its gradient p = s dy b.

Shapes: x [M, K] and dy [M, N] with any strides, a [R, K], b [N, R], t and p [M, R] in the factor's dtype. Dropout is
regenerated from its seed. Several adapters that share x are one call with their factors stacked on R. The *wide* case,
a factor in fp32 with half-precision activations, accumulates fp32 products of the upcast x; x is never copied to fp32
as a whole.
"""

import torch
from torch import Tensor

from peftfast_kernels.keep_mask import keep_mask, keep_scale, masked_rows, small_keep, threshold
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks, transposed, zero_like

WIDE_CHUNK = 1 << 19  # elements of half-precision activations held in fp32 at a time: 2 MiB


def _reference(x: Tensor, a: Tensor, seed: Tensor | None, prob: float) -> Tensor:
    dtype = accumulate_dtype(x, a)
    kept = keep_mask.reference(seed, prob, x.shape[0], x.shape[1], x.device)
    return torch.where(kept, x.to(dtype), 0) @ a.to(dtype).t() * keep_scale(prob)


def gives_accumulator(left: Tensor) -> bool:
    """Whether torch gives a product with this in fp32, as it is accumulated: of half-precision numbers on a GPU."""
    if not left.is_cuda or left.dtype.itemsize != 2:
        return False
    return left.dtype is not torch.float16 or not torch.backends.cuda.matmul.allow_fp16_accumulation


def scaled_product(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """scale * left right in ``dtype``; on CUDA half-precision operands leave the accumulator in fp32.

    ``like`` has the result's shape and dtype, and is not read; with it, that takes fewer launches.
    """
    if left.dtype is dtype:
        if scale == 1.0:
            return torch.mm(left, right)
        return torch.addmm(zero_like(left) if like is None else like, left, right, beta=0, alpha=scale)
    if dtype is torch.float32 and gives_accumulator(left):
        if like is not None and scale != 1.0:
            return torch.addmm(like, left, right, beta=0, alpha=scale, out_dtype=torch.float32)
        # addmm has no such form with a broadcast 0-d input, so the scale is applied to the small result.
        out = torch.mm(left, right, out_dtype=torch.float32)
        return out if scale == 1.0 else out.mul_(scale)
    return scaled_product(left, right, scale, left.dtype).to(dtype)


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
        (9, 300, 20, 0.0, torch.bfloat16, True, False),
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
    if not prob or threshold(prob) == 0:
        if x.dtype == a.dtype:
            return torch.mm(x, transposed(a))
        return _wide(x, transposed(a), 1.0)
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


def _wide(x: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * x right for half-precision x [M, K] and fp32 right [K, R], chunk by chunk."""
    out = torch.empty(x.shape[0], right.shape[1], dtype=right.dtype, device=right.device)
    for rows in row_chunks(x.shape[0], x.shape[1], WIDE_CHUNK, x.device):
        part = x[rows].to(right.dtype)
        if scale == 1.0:
            torch.mm(part, right, out=out[rows])
        else:
            torch.addmm(zero_like(right), part, right, beta=0, alpha=scale, out=out[rows])
    return out


# -- p: the same product with the other factor, contracted over its rows; so the host makes no view of b --------------


def _dt_reference(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = accumulate_dtype(dy, b)
    return dy.to(dtype) @ b.to(dtype) * scale


def _dt_build(device, rows, cols, rank, prob, dtype, wide, strided):
    (dy,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    (b,) = make_inputs(device, [(cols, rank)], torch.float32 if wide else dtype, seed=1, std=cols**-0.5)
    return {"dy": dy, "b": b, "scale": 0.3 if rows % 2 else 1.0}


def _dt_cost(dy: Tensor, b: Tensor, scale: float) -> Cost:
    (m, n), r = dy.shape, b.shape[1]
    return Cost(2.0 * m * n * r, m * n * dy.element_size() + (n * r + m * r) * b.element_size())


@op(
    reference=_dt_reference,
    module="lora_down_kernels",
    cases=lambda: lora_cases(_dt_build),
    cost=_dt_cost,
    fake=lambda dy, b, scale: b.new_empty(dy.shape[0], b.shape[1]),
)
def lora_dt(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns p [M, R] = scale dy b in b's dtype, the gradient of t, for dy [M, N] and b [N, R]."""
    if dy.dtype == b.dtype:
        return scaled_product(dy, b, scale, b.dtype)
    return _wide(dy, b, scale)
