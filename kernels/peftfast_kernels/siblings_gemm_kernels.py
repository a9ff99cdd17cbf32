"""Triton: the big products of several linears that read one input, one launch each; tuples as in siblings_kernels.py.

The work itself is that of one linear: `gemm_tile`, `contract`, `expand_tile`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels import dispatch
from peftfast_kernels.configs import Tile, chip_of, dot_precision, rank_tile, tile
from peftfast_kernels.decode import Operand
from peftfast_kernels.decode_kernels import decode_arguments, decode_variant
from peftfast_kernels.lora_gemm import base_product
from peftfast_kernels.lora_gemm_kernels import (
    adapter_tile,
    contract,
    expand_tile,
    gemm_tile,
    masked_adapter,
    product_config,
    swaps,
)
from peftfast_kernels.op import is_interpreting
from peftfast_kernels.siblings_gemm import input_products
from peftfast_kernels.siblings_kernels import contiguous, keep_scales, masks_of, row_major
from peftfast_kernels.tiles import grouped_order, narrow, owner, pick, tile_counts, total
from peftfast_kernels.variants import ANY_MATRIX, BIG_MATRIX, Variant


@triton.jit
def siblings_gemm_kernel(
    x_ptr, w0, w1, w2, w3, w4, table, bias_ptrs, t_ptrs, b_ptrs, y_ptrs,
    M, NS, K, RS, stride_xm, stride_xc, strides_n, strides_k, strides_tm, scales,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    SWAP: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program i computes BM rows and BO columns of one y; the columns of all siblings stand side by side.

    w0..w4: a tuple of pointers each; t_ptrs: [M, R_i], rows strides_tm apart; b_ptrs: [N_i, R_i] contiguous.
    """
    counts = tile_counts(NS, BO)
    pid_m, pid_o = grouped_order(tl.program_id(0), tl.cdiv(M, BM), total(counts), GROUP)
    which, first = owner(pid_o, counts)
    R = pick(RS, which)
    gemm_tile(
        pid_m, pid_o - first, x_ptr,
        pick(w0, which), pick(w1, which), pick(w2, which), pick(w3, which), pick(w4, which), table,
        pick(bias_ptrs, which), pick(t_ptrs, which), pick(b_ptrs, which), x_ptr, pick(y_ptrs, which),
        M, pick(NS, which), K, R, stride_xm, stride_xc, pick(strides_n, which), pick(strides_k, which),
        pick(strides_tm, which), 1, 1, R, pick(scales, which), 0,
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, False, SWAP, HAS_BIAS, False, BM, BO, BC, BR, PRECISION, INTERP,
    )  # fmt: skip


@triton.jit
def siblings_gemm_t_kernel(
    dy_ptrs, w0, w1, w2, w3, w4, table, p_ptrs, a_ptrs, dx_ptr,
    M, NS, K, RS, strides_m, strides_n, strides_k, strides_pm,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program i computes BM rows and BO columns of dx, all siblings in one accumulator, with p a only where ADD.

    dy_ptrs: [M, N_i], rows strides_m apart; p_ptrs: [M, R_i], rows strides_pm apart; a_ptrs: [R_i, K] contiguous.
    """
    pid_m, pid_o = grouped_order(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BO), GROUP)
    rows = pid_m.to(tl.int64) * BM + tl.arange(0, BM)
    cols = pid_o * BO + tl.arange(0, BO)
    acc = tl.zeros((BM, BO), tl.float32)
    if ADD:
        for i in tl.static_range(len(p_ptrs)):
            acc = adapter_tile(
                acc, p_ptrs[i], a_ptrs[i], rows, cols, M, K, RS[i], strides_pm[i], 1, K, 1, BR, PRECISION, INTERP
            )  # fmt: skip
    acc = contract(
        acc, dy_ptrs, w0, w1, w2, w3, w4, table, rows, cols, pid_o * BO, M, NS, K, strides_m, 1, strides_n, strides_k,
        DECODE, BLOCK, NESTED, LAYOUT, DTYPE, True, False, BO, BC, PRECISION, INTERP,
    )  # fmt: skip
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    tl.store(dx_ptr + rows[:, None] * K + cols[None, :], narrow(acc, dx_ptr.dtype.element_ty, INTERP), mask=inside)


@triton.jit
def siblings_expand_kernel(
    y_ptrs, t_ptrs, b_ptrs, M, NS, RS, strides_tm, scales,
    BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds scale * t bᵀ to BM rows and BO columns of one y, in place; see `siblings_gemm_kernel`."""
    which, first = owner(tl.program_id(1), tile_counts(NS, BO))
    O, R = pick(NS, which), pick(RS, which)
    y_ptr = pick(y_ptrs, which)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = (tl.program_id(1) - first) * BO + tl.arange(0, BO)
    acc = masked_adapter(
        pick(t_ptrs, which), pick(b_ptrs, which), y_ptr, rows, cols, M, O, R, pick(strides_tm, which), 1, 1, R,
        pick(scales, which), 0, False, BM, BO, BR, PRECISION, INTERP,
    )  # fmt: skip
    expand_tile(acc, y_ptr, y_ptr, rows, cols, M, O, O, 1, True, INTERP)


@triton.jit
def siblings_expand_t_kernel(
    dx_ptr, p_ptrs, a_ptrs, seed_ptrs, M, K, RS, strides_pm, scales, thresholds,
    DROP: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds the sum of all scale * mask(p a) to BM rows and BO columns of dx, in place."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BO + tl.arange(0, BO)
    acc = tl.zeros((BM, BO), tl.float32)
    for i in tl.static_range(len(p_ptrs)):
        acc += masked_adapter(
            p_ptrs[i], a_ptrs[i], seed_ptrs[i], rows, cols, M, K, RS[i], strides_pm[i], 1, K, 1, scales[i],
            thresholds[i], DROP, BM, BO, BR, PRECISION, INTERP,
        )  # fmt: skip
    expand_tile(acc, dx_ptr, dx_ptr, rows, cols, M, K, K, 1, True, INTERP)


# -- launchers ---------------------------------------------------------------------------------------------------------


_SHARED = ("table", "K", "DECODE", "BLOCK", "NESTED", "LAYOUT", "DTYPE")


def _decode_arguments(ws: Sequence[Operand], bk: int) -> dict | None:
    """`decode_arguments` of all siblings, None where one kernel cannot read them all."""
    each = [decode_arguments(w, bk) for w in ws]
    first = each[0]
    pointers = [f"w{i}" for i in range(5)]
    for other in each[1:]:
        if any(first[name] != other[name] for name in _SHARED if name != "table"):
            return None
        if any(first[name].dtype != other[name].dtype for name in pointers):
            return None
    own = {name: tuple([one[name] for one in each]) for name in pointers}
    strides = {f"strides_{axis}": tuple([one[f"stride_{axis}"] for one in each]) for axis in "nk"}
    return {**own, **strides, **{name: first[name] for name in _SHARED}, "NS": tuple([one["N"] for one in each])}


def _masked_rows(config: Tile) -> int:
    """Half the rows of `expand`: a masked tile and the sum of those before it are held at once."""
    return max(16, config.BM // 2)


def siblings_gemm(
    x: Tensor, w: list[Operand], bias: list[Tensor | None], t: list[Tensor], b: list[Tensor], scales: list[float]
) -> list[Tensor]:
    """One launch over the tiles of all outputs; where one of them prefers cuBLAS or reads otherwise: their products by
    cuBLAS, and one pass for all updates."""
    chip = chip_of(x.device)
    config = product_config(w[0].format, x.dtype == torch.float32, chip)
    biased = {one is not None for one in bias}
    members = [(x, *own) for own in zip(w, bias, t, b, scales, strict=True)]
    args = (x, w, bias, t, b, scales)
    together = len(biased) == 1 and dispatch.fuses_together("siblings_gemm", args, "lora_gemm", members)
    arguments = _decode_arguments(w, config.BK) if together else None
    m, ts = x.shape[0], row_major(t)
    shared = {
        "t_ptrs": ts[0],
        "b_ptrs": contiguous(b),
        "M": m,
        "RS": tuple([one.shape[1] for one in t]),
        "strides_tm": ts[1],
        "scales": tuple(map(float, scales)),
        "PRECISION": dot_precision(chip, x.dtype, t[0].dtype),
        "INTERP": is_interpreting(),
    }
    rank = max(shared["RS"])
    if arguments is None:
        ys = [base_product(x, *own) for own in zip(w, bias, strict=True)]
        if m:
            config = tile("expand", chip)
            widths = tuple([y.shape[1] for y in ys])
            siblings_expand_kernel[(triton.cdiv(m, config.BM), sum(triton.cdiv(n, config.BN) for n in widths))](
                y_ptrs=tuple(ys),
                NS=widths,
                **shared,
                BM=config.BM,
                BO=config.BN,
                BR=rank_tile(rank, config.BK),
                num_warps=config.warps,
                num_stages=config.stages,
            )
        return ys
    ys = [torch.empty(m, one.shape[0], dtype=x.dtype, device=x.device) for one in w]
    if m == 0:
        return ys
    bm = min(config.BM, max(16, triton.next_power_of_2(m)))
    siblings_gemm_kernel[(triton.cdiv(m, bm) * sum(triton.cdiv(y.shape[1], config.BN) for y in ys),)](
        x_ptr=x,
        bias_ptrs=tuple([x if one is None else one.contiguous() for one in bias]),
        y_ptrs=tuple(ys),
        stride_xm=x.stride(0),
        stride_xc=x.stride(1),
        **arguments,
        **shared,
        SWAP=swaps(w[0].format, False),
        HAS_BIAS=bias[0] is not None,
        BM=bm,
        BO=config.BN,
        BC=config.BK,
        BR=rank_tile(rank, 32),
        GROUP=8,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=False,  # see lora_gemm_kernels
    )
    return ys


def siblings_gemm_t(
    dys: list[Tensor], w: list[Operand], p: list[Tensor], a: list[Tensor], seeds: list[Tensor | None],
    probs: list[float],
) -> Tensor:  # fmt: skip
    """One launch, and with dropout a second one for the masked updates: a masked tile beside the accumulator would not
    fit into registers. Where one product prefers cuBLAS or is read otherwise: all by cuBLAS, and that second one."""
    dtype, chip = dys[0].dtype, chip_of(dys[0].device)
    config = product_config(w[0].format, dtype == torch.float32, chip)
    args = (dys, w, p, a, seeds, probs)
    members = list(zip(*args, strict=True))
    together = dispatch.fuses_together("siblings_gemm_t", args, "lora_gemm_t", members)
    arguments = _decode_arguments(w, config.BN) if together else None
    (m, k), (p_rows, p_strides) = (dys[0].shape[0], w[0].shape[1]), row_major(p)
    adapters = {
        "p_ptrs": p_rows,
        "a_ptrs": contiguous(a),
        "M": m,
        "RS": tuple([one.shape[1] for one in p]),
        "strides_pm": p_strides,
        "PRECISION": dot_precision(chip, dtype, p[0].dtype),
        "INTERP": is_interpreting(),
    }
    rank, masks = max(adapters["RS"]), masks_of(seeds, probs, dys[0])
    if arguments is None:
        dx = input_products(dys, w)
    else:
        dx = torch.empty(m, k, dtype=dtype, device=dys[0].device)
    if m == 0:
        return dx
    if arguments is not None:
        bm = min(config.BM, max(16, triton.next_power_of_2(m)))
        rows, strides = row_major(dys)
        siblings_gemm_t_kernel[(triton.cdiv(m, bm) * triton.cdiv(k, config.BN),)](
            dy_ptrs=rows,
            dx_ptr=dx,
            strides_m=strides,
            **arguments,
            **adapters,
            ADD=not masks["DROP"],
            BM=bm,
            BO=config.BN,
            BC=config.BK,
            BR=rank_tile(rank, 32),
            GROUP=8,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=False,  # see lora_gemm_kernels
        )
    if arguments is None or masks["DROP"]:
        config = tile("expand", chip)
        bm = _masked_rows(config)
        siblings_expand_t_kernel[(triton.cdiv(m, bm), triton.cdiv(k, config.BN))](
            dx_ptr=dx,
            K=k,
            **adapters,
            **masks,
            scales=keep_scales(probs),
            BM=bm,
            BO=config.BN,
            BR=rank_tile(rank, config.BK),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return dx


def variants(chip: str):
    """What the two products launch, for ahead-of-time checks: q, k and v, and gate and up."""
    common = {"PRECISION": dot_precision(chip, torch.float32), "INTERP": False}
    for format, transposed, rows, members in (
        ("dense", False, 128, 3),
        ("dense", True, 128, 3),
        ("nf4", False, 128, 3),
        ("nf4", False, 16, 2),
        ("nf4", True, 128, 3),
    ):
        config = product_config(format, False, chip)
        pointers, constexprs = decode_variant(format, 64, format == "nf4" and not transposed, "bf16")
        own = ("w0", "w1", "w2", "w3", "w4", "NS", "RS", "strides_n", "strides_k")
        name = f"{format} bf16 x{members}{' few rows' * (rows < 64)}"
        constexprs = {f"strides_{n[-1]}" if n.startswith("stride_") else n: v for n, v in constexprs.items()}
        constexprs |= {**common, "BM": min(config.BM, rows), "BO": config.BN, "BC": config.BK, "BR": 16, "GROUP": 8}
        options = {
            "members": members, "warps": config.warps, "stages": config.stages, "matrix": BIG_MATRIX,
            "fp_fusion": False, "weights": config.BN * config.BK if format == "nf4" else 0,
        }  # fmt: skip
        if transposed:
            yield Variant(
                name=f"siblings_gemm_t {name}",
                kernel=siblings_gemm_t_kernel,
                pointers={**pointers, **dict.fromkeys(("dy_ptrs", "p_ptrs", "a_ptrs", "dx_ptr"), "bf16")},
                tuples=(*own, "dy_ptrs", "p_ptrs", "a_ptrs", "strides_m", "strides_pm"),
                constexprs={**constexprs, "ADD": True},
                **options,
            )  # fmt: skip
            continue
        yield Variant(
            name=f"siblings_gemm {name}",
            kernel=siblings_gemm_kernel,
            pointers={
                **pointers, "x_ptr": "bf16", "bias_ptrs": "bf16", "t_ptrs": "bf16", "b_ptrs": "bf16", "y_ptrs": "bf16",
            },
            tuples=(*own, "scales", "bias_ptrs", "t_ptrs", "b_ptrs", "y_ptrs", "strides_tm"),
            constexprs={**constexprs, "stride_xc": 1, "SWAP": swaps(format, False), "HAS_BIAS": members == 2},
            quick=rows > 64,
            **options,
        )  # fmt: skip
    config = tile("expand", chip)
    sizes = {**common, "BM": config.BM, "BO": config.BN, "BR": 16}
    options = {"members": 3, "warps": config.warps, "stages": config.stages, "matrix": ANY_MATRIX}
    yield Variant(
        name="siblings_expand",
        kernel=siblings_expand_kernel,
        pointers=dict.fromkeys(("y_ptrs", "t_ptrs", "b_ptrs"), "bf16"),
        tuples=("y_ptrs", "t_ptrs", "b_ptrs", "NS", "RS", "strides_tm", "scales"),
        constexprs=sizes,
        **options,
    )
    yield Variant(
        name="siblings_expand_t drop",
        kernel=siblings_expand_t_kernel,
        pointers={**dict.fromkeys(("dx_ptr", "p_ptrs", "a_ptrs"), "bf16"), "seed_ptrs": "i64"},
        tuples=("p_ptrs", "a_ptrs", "seed_ptrs", "RS", "strides_pm", "scales", "thresholds"),
        constexprs={**sizes, "BM": _masked_rows(config), "DROP": True},
        **options,
    )
