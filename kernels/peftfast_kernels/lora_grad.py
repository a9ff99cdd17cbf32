"""Gradients of both low-rank factors in one launch: db = s dyᵀ t and da = pᵀ drop(x).

Shapes: dy [M, N], t = drop(x) aᵀ [M, R], x [M, K], p = s dy b [M, R] (`lora_dt`), db [N, R], da [R, K]. x and dy may
have any strides. Gradients leave the fp32 accumulator in the dtype that is asked for, so fp32 masters receive theirs
unrounded.

Every tile of columns, of dy or of x, has one owner that walks down all rows: no partial sums, no atomics, and results
that do not change from run to run. The price is that dy is read twice, here and for p, where a fused pass over dy could
give p and db together; such a pass has to leave fp32 planes of both (its tiles own neither), to be added in three more
launches. PREDICTED, not measured, for M = 8192, N = K = 4096, r = 16 on an H100: 15.6 us more for the second read of
dy, about 10 us and three launches less for the planes, so about even in time there and ahead wherever launches or the
host limit. `bench/gpu.py` measures both launches against cuBLAS and against the roofline.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from peftfast_kernels.keep_mask import keep_mask, keep_scale, masked_rows, small_keep, threshold
from peftfast_kernels.lora_down import WIDE_CHUNK, lora_cases, make_inputs, make_seed, scaled_product
from peftfast_kernels.op import Case, Cost, accumulate_dtype, op, row_chunks, zero_like

# Absent halves are None in and missing from the list that comes back: an operator's schema has no optional result.


def _reference(
    dy: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    prob: float,
    scale: float,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> list[Tensor]:
    dtype, grads = accumulate_dtype(dy, x), []
    if dy is not None:
        grads.append(dy.to(dtype).t() @ t.to(dtype) * scale)
    if x is not None:
        kept = torch.where(keep_mask.reference(seed, prob, *x.shape, x.device), x.to(dtype), 0)
        grads.append(p.to(dtype).t() @ kept * keep_scale(prob))
    return grads


def _build(device, rows, cols, rank, prob, dtype, wide, strided):
    factor = torch.float32 if wide else dtype
    dy, x = make_inputs(device, [(rows, cols // 2 + 1), (rows, cols)], dtype, strided=strided)
    t, p = make_inputs(device, [(rows, rank), (rows, rank)], factor, seed=1)
    return {
        "dy": dy, "t": t, "x": x, "p": p, "seed": make_seed(device, prob), "prob": prob, "scale": 0.25,
        "db_dtype": torch.float32 if wide or rows % 2 else dtype,
        "da_dtype": torch.float32 if wide or cols % 2 else dtype,
    }  # fmt: skip


def _cases() -> Iterator[Case]:
    both = list(lora_cases(_build))
    yield from both
    for absent, case in ((("x", "p", "seed"), both[1]), (("dy", "t"), both[1]), (("dy", "t"), both[9])):

        def make(device: str, absent=absent, case=case) -> dict:
            return {**case.make(device), **dict.fromkeys(absent), **({"prob": 0.0} if "seed" in absent else {})}

        yield Case(f"{case.id}-no-{absent[0]}", make)


def _cost(
    dy: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    prob: float,
    scale: float,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> Cost:
    flops = moved = 0.0
    for wide, factor, dtype in ((dy, t, db_dtype), (x, p, da_dtype)):
        if wide is not None:
            (m, columns), r = wide.shape, factor.shape[1]
            # read the activations and their factor once, write the gradient once
            flops += 2.0 * m * columns * r
            moved += m * columns * wide.element_size() + m * r * factor.element_size() + r * columns * dtype.itemsize
    return Cost(flops, moved)


def _fake(dy, t, x, p, seed, prob, scale, db_dtype, da_dtype) -> list[Tensor]:
    db = [] if dy is None else [dy.new_empty(dy.shape[1], t.shape[1], dtype=db_dtype)]
    return db if x is None else [*db, x.new_empty(p.shape[1], x.shape[1], dtype=da_dtype)]


@op(
    reference=_reference,
    module="lora_grad_kernels",
    cases=_cases,
    cost=_cost,
    fake=_fake,
    device_of=lambda dy, t, x, p, seed, prob, scale, db_dtype, da_dtype: (x if dy is None else dy).device,
)
def lora_factor_grads(
    dy: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    p: Tensor | None,
    seed: Tensor | None,
    prob: float,
    scale: float,
    db_dtype: torch.dtype,
    da_dtype: torch.dtype,
) -> list[Tensor]:
    """Returns db [N, R] = scale dyᵀ t, then da [R, K] = pᵀ drop(x); only db where x is None, only da where dy is.

    dy [M, N] and t [M, R] are given or None together, x [M, K] and p [M, R] as well; factors in their activations'
    dtype or in fp32. ``seed`` may be None where ``prob`` is 0; raises ``ValueError`` where it is missing. db and da may
    differ in rank.
    """
    grads = []
    if dy is not None:
        same = dy.dtype == t.dtype
        grads.append(scaled_product(dy.t(), t, scale, db_dtype) if same else _wide_db(dy, t, scale, db_dtype))
    if x is not None:
        same = x.dtype == p.dtype and threshold(prob) == 0
        grads.append(scaled_product(p.t(), x, 1.0, da_dtype) if same else _da(x, p, seed, prob, da_dtype))
    return grads


def _wide_db(dy: Tensor, t: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(t.dtype, torch.float32)  # a running sum in half precision drifts
    db = torch.zeros(dy.shape[1], t.shape[1], dtype=wide, device=t.device)
    for rows in row_chunks(dy.shape[0], dy.shape[1], WIDE_CHUNK, dy.device):
        db.addmm_(dy[rows].to(wide).t(), t[rows].to(wide), alpha=scale)
    return db.to(dtype)


def _da(x: Tensor, p: Tensor, seed: Tensor | None, prob: float, grad_dtype: torch.dtype) -> Tensor:
    """With dropout, wide, or both."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    keep = small_keep(*x.shape, seed, prob, dtype) if x.dtype == p.dtype == dtype and threshold(prob) else None
    if keep is not None:
        return torch.addmm(zero_like(p), p.t(), x * keep, beta=0, alpha=keep_scale(prob)).to(grad_dtype)
    da = torch.zeros(p.shape[1], x.shape[1], dtype=dtype, device=x.device)
    if threshold(prob) == 0:
        for rows in row_chunks(x.shape[0], x.shape[1], WIDE_CHUNK, x.device):
            da.addmm_(p[rows].t(), x[rows].to(dtype))
        return da.to(grad_dtype)
    # Masked chunks are small, so they are summed in fp32 whatever the dtype of x: a running half-precision sum drifts.
    scale = keep_scale(prob)
    for rows, dropped in masked_rows(x.shape[0], x.shape[1], seed, prob):
        da.addmm_(p[rows].t().to(dtype), x[rows].to(dtype).masked_fill(dropped, 0), alpha=scale)
    return da.to(grad_dtype)
