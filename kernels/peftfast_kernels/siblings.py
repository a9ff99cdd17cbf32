"""Low-rank linears that read one input (q, k and v; gate and up): their skinny products, each in one launch.

The steps are those of one linear (lora_down.py, lora_grad.py; the big ones are in siblings_gemm.py), with lists where
each sibling has its own: x [M, K] is shared; a_i [R_i, K], b_i [N_i, R_i], t_i and p_i [M, R_i], dy_i [M, N_i]; seeds,
dropout probabilities and scales one each. What the siblings gain: x is read once for all factors, whatever their
dropout masks, and small members (k and v have few columns) do not leave a GPU half empty.

The plain path is made of the ops for one linear, which a group of one, members that do not fit together and compilers
take as well. A group launches where its members alone would: no table of its own is needed, and one that was measured
takes precedence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from peftfast_kernels.keep_mask import threshold
from peftfast_kernels.lora_down import lora_down, lora_dt, make_inputs
from peftfast_kernels.lora_grad import lora_factor_grads
from peftfast_kernels.op import Case, Cost, op


def drops(probs: list[float]) -> bool:
    """Whether any member has dropout."""
    return any(threshold(prob) > 0 for prob in probs)


def summed(costs) -> Cost:
    flops, moved = zip(*costs, strict=True)
    return Cost(sum(flops), sum(moved))


def siblings_cases(build: Callable[..., dict]):
    """Two and three siblings, unequal ones, ranks from 1 on, strides, dropout in all or in one, the wide case."""
    for rows, cols, widths, ranks, probs, dtype, wide, strided in (
        (7, 33, (20, 33), (1, 1), (0.0, 0.0), torch.float32, False, False),
        (33, 130, (50, 17, 40), (3, 8, 5), (0.0, 0.0, 0.0), torch.float32, False, True),
        (65, 72, (70, 40, 1), (4, 4, 4), (0.3, 0.3, 0.3), torch.float32, False, False),
        (1, 64, (48, 48), (8, 8), (0.0, 0.2), torch.float32, False, False),
        (0, 48, (40, 32), (4, 4), (0.1, 0.1), torch.float32, False, False),
        (20, 96, (33, 64), (40, 70), (0.0, 0.5), torch.float32, False, False),
        (37, 80, (64, 16, 16), (16, 16, 16), (0.0, 0.0, 0.0), torch.float16, False, True),
        (37, 80, (70, 33), (16, 8), (0.2, 0.2), torch.bfloat16, False, False),
        (50, 66, (40, 20, 20), (5, 5, 5), (0.2, 0.0, 1.0), torch.bfloat16, True, False),
        (34, 70, (60, 60), (8, 8), (0.0, 0.0), torch.float16, True, True),
        (9, 300, (40, 33), (20, 3), (0.0, 0.0), torch.bfloat16, True, False),
        (140, 50, (33, 40), (20, 36), (0.0, 0.0), torch.float16, False, False),
    ):
        marks = f"{str(dtype)[6:]}{'-wide' * wide}{'-strided' * strided}"
        name = f"M{rows}-K{cols}-N{'.'.join(map(str, widths))}-R{'.'.join(map(str, ranks))}-p{max(probs)}-{marks}"
        c = (rows, cols, widths, ranks, list(probs), dtype, wide, strided)
        yield Case(name, lambda device, c=c: build(device, *c))


def make_seeds(device: str, probs: list[float]) -> list[Tensor | None]:
    some = [0x1234_5678_9ABC + 7 * i if prob else None for i, prob in enumerate(probs)]
    return [None if seed is None else torch.tensor(seed, dtype=torch.int64, device=device) for seed in some]


def make_factors(device, shapes, dtype, wide, seed=1, std=1.0):
    return make_inputs(device, shapes, torch.float32 if wide else dtype, seed=seed, std=std)


# -- t_i = drop_i(x) a_iᵀ ----------------------------------------------------------------------------------------------


def _down_reference(x: Tensor, a: list[Tensor], seeds: list[Tensor | None], probs: list[float]) -> list[Tensor]:
    return [lora_down.reference(x, *own) for own in zip(a, seeds, probs, strict=True)]


def _down_build(device, rows, cols, widths, ranks, probs, dtype, wide, strided):
    (x,) = make_inputs(device, [(rows, cols)], dtype, strided=strided)
    a = make_factors(device, [(r, cols) for r in ranks], dtype, wide, std=cols**-0.5)
    return {"x": x, "a": a, "seeds": make_seeds(device, probs), "probs": probs}


def _down_cost(x: Tensor, a: list[Tensor], seeds: list[Tensor | None], probs: list[float]) -> Cost:
    again = (len(a) - 1) * x.numel() * x.element_size()  # x is read once
    flops, moved = summed(lora_down.cost(x, *own) for own in zip(a, seeds, probs, strict=True))
    return Cost(flops, moved - again)


@op(
    reference=_down_reference,
    module="siblings_kernels",
    cases=lambda: siblings_cases(_down_build),
    cost=_down_cost,
    fake=None,
    accepts=lambda x, a, seeds, probs: (
        len(a) > 1 and not lora_down.loses(x.device, ((x, *own) for own in zip(a, seeds, probs, strict=True)))
    ),
)
def siblings_down(x: Tensor, a: list[Tensor], seeds: list[Tensor | None], probs: list[float]) -> list[Tensor]:
    """Returns all t_i [M, R_i] in a's dtype, as `lora_down` does for each."""
    if len(a) == 1 or drops(probs):
        return [lora_down(x, *own) for own in zip(a, seeds, probs, strict=True)]
    return list(lora_down(x, torch.cat(a), None, 0.0).split([one.shape[0] for one in a], dim=1))


# -- p_i = s_i dy_i b_i ------------------------------------------------------------------------------------------------


def _dt_reference(dys: list[Tensor], b: list[Tensor], scales: list[float]) -> list[Tensor]:
    return [lora_dt.reference(*own) for own in zip(dys, b, scales, strict=True)]


def _dt_build(device, rows, cols, widths, ranks, probs, dtype, wide, strided):
    dys = make_inputs(device, [(rows, n) for n in widths], dtype, strided=strided)
    b = make_factors(device, list(zip(widths, ranks, strict=True)), dtype, wide)
    return {"dys": dys, "b": b, "scales": [0.3 + i for i in range(len(b))]}


@op(
    reference=_dt_reference,
    module="siblings_kernels",
    cases=lambda: siblings_cases(_dt_build),
    cost=lambda dys, b, scales: summed(lora_dt.cost(*own) for own in zip(dys, b, scales, strict=True)),
    fake=None,
    accepts=lambda dys, b, scales: len(b) > 1 and not lora_dt.loses(b[0].device, zip(dys, b, scales, strict=True)),
)
def siblings_dt(dys: list[Tensor], b: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Returns all p_i [M, R_i] in b's dtype, as `lora_dt` does for each."""
    return [lora_dt(*own) for own in zip(dys, b, scales, strict=True)]


# -- db_i = s_i dy_iᵀ t_i and da_i = p_iᵀ drop_i(x) --------------------------------------------------------------------


def _grads_reference(
    dys: list[Tensor], t: list[Tensor], x: Tensor | None, p: list[Tensor], seeds: list[Tensor | None],
    probs: list[float], scales: list[float], db_dtype: torch.dtype, da_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    each = [
        lora_factor_grads.reference(dy, ti, x, pi, seed, prob, scale, db_dtype, da_dtype)
        for dy, ti, pi, seed, prob, scale in zip(dys, t, p, seeds, probs, scales, strict=True)
    ]
    return [grads[half] for half in range(1 if x is None else 2) for grads in each]


def _grads_build(device, rows, cols, widths, ranks, probs, dtype, wide, strided):
    x, *dys = make_inputs(device, [(rows, cols), *((rows, n) for n in widths)], dtype, strided=strided)
    t = make_factors(device, [(rows, r) for r in ranks], dtype, wide)
    p = make_factors(device, [(rows, r) for r in ranks], dtype, wide, seed=2)
    return {
        "dys": dys, "t": t, "x": None if rows == 1 else x, "p": p, "seeds": make_seeds(device, probs), "probs": probs,
        "scales": [0.25 + i for i in range(len(t))],
        "db_dtype": torch.float32 if wide or rows % 2 else dtype,
        "da_dtype": torch.float32 if wide or cols % 2 else dtype,
    }  # fmt: skip


def _grads_cost(
    dys: list[Tensor], t: list[Tensor], x: Tensor | None, p: list[Tensor], seeds: list[Tensor | None],
    probs: list[float], scales: list[float], db_dtype: torch.dtype, da_dtype: torch.dtype,
) -> Cost:  # fmt: skip
    again = 0.0 if x is None else (len(t) - 1) * x.numel() * x.element_size()  # x is read once
    flops, moved = summed(
        lora_factor_grads.cost(dy, ti, x, pi, None, 0.0, 1.0, db_dtype, da_dtype)
        for dy, ti, pi in zip(dys, t, p, strict=True)
    )
    return Cost(flops, moved - again)


@op(
    reference=_grads_reference,
    module="siblings_kernels",
    cases=lambda: siblings_cases(_grads_build),
    cost=_grads_cost,
    fake=None,
    accepts=lambda dys, t, x, p, seeds, probs, scales, db_dtype, da_dtype: (
        len(t) > 1
        and not lora_factor_grads.loses(
            dys[0].device,
            ((*own, db_dtype, da_dtype) for own in zip(dys, t, [x] * len(t), p, seeds, probs, scales, strict=True)),
        )
    ),
)
def siblings_factor_grads(
    dys: list[Tensor], t: list[Tensor], x: Tensor | None, p: list[Tensor], seeds: list[Tensor | None],
    probs: list[float], scales: list[float], db_dtype: torch.dtype, da_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Returns all db_i [N_i, R_i], then, where x is given, all da_i [R_i, K], as `lora_factor_grads` does for each."""
    shares = x is not None and len(t) > 1 and not drops(probs)
    stacked = torch.cat(p, dim=1) if shares else None
    dbs, das = [], []
    for i, (dy, ti, pi, seed, prob, scale) in enumerate(zip(dys, t, p, seeds, probs, scales, strict=True)):
        # where no masks differ, the first call brings all da from one read of x
        own = (x if i == 0 else None, stacked, None, 0.0) if shares else (x, pi, seed, prob)
        db, *da = lora_factor_grads(dy, ti, *own, scale, db_dtype, da_dtype)
        dbs.append(db)
        das += da
    return [*dbs, *(das[0].split([one.shape[1] for one in p]) if shares else das)]
