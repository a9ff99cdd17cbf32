"""What the design of the kernels rests on and only a GPU can answer; asked first in every GPU run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.operands import Maker, Size, arguments
from peftfast_kernels import OPS, Operand, use_backend

Calls = dict[str, Callable[[], Any]]


class Question(NamedTuple):
    """A text, one size, and the calls whose times answer it; flops and bytes of the first of them."""

    text: str
    size: Size
    make: Callable[[str], Calls]
    flops: float = 0.0
    bytes: float = 0.0


def _padded(size: Size) -> Question:
    """Whether cuBLAS stays at its speed when K grows by one tile for the adapter."""

    def make(device: str) -> Calls:
        t = Maker(size, device)
        x, w = t.normal(size.m, size.k + 64), t.normal(size.n, size.k + 64)
        x0, w0 = x[:, : size.k].contiguous(), w[:, : size.k].contiguous()
        return {
            "K": lambda: torch.mm(x0, w0.t()),
            "K + 64": lambda: torch.mm(x, w.t()),
            "K, rows of K + 64": lambda: torch.mm(x[:, : size.k], w[:, : size.k].t()),
        }

    return Question("cuBLAS at K, K + 64 and strided K", size, make, 2.0 * size.m * size.n * size.k)


def _update(size: Size) -> Question:
    """At which bandwidth cuBLAS adds a rank-sized product to y."""

    def make(device: str) -> Calls:
        t = Maker(size, device)
        y, h, b = t.normal(size.m, size.n), t.normal(size.m, size.r), t.normal(size.r, size.n)
        return {"addmm_": lambda: y.addmm_(h, b, alpha=1e-3)}

    moved = 2.0 * (2 * size.m * size.n + size.r * (size.m + size.n))
    return Question(f"addmm_ of rank {size.r}: bandwidth", size, make, 2.0 * size.m * size.n * size.r, moved)


def _order(size: Size) -> Question:
    """Whether cuBLAS hides reading y where it adds the big product to the adapter's, which is how peftfast goes."""

    def make(device: str) -> Calls:
        t = Maker(size, device)
        x, w = t.normal(size.m, size.k), t.normal(size.n, size.k)
        h, b = t.normal(size.m, size.r), t.normal(size.r, size.n)
        return {
            "adapter first": lambda: torch.mm(h, b).addmm_(x, w.t()),
            "adapter last": lambda: torch.mm(x, w.t()).addmm_(h, b),
            "cuBLAS alone": lambda: torch.mm(x, w.t()),
        }

    flops = 2.0 * size.m * size.n * (size.k + size.r)
    return Question("adapter before or after the big product", size, make, flops)


def _skinny(size: Size) -> Question:
    def make(device: str) -> Calls:
        kwargs = arguments("lora_down", size, device)
        return _paths("lora_down", kwargs, device)

    moved = 2.0 * (size.m * size.k + size.r * (size.m + size.k))
    text = f"down-projection of {size.m} rows to {size.r}{' with dropout' * bool(size.dropout)}: bandwidth"
    return Question(text, size, make, 2.0 * size.m * size.k * size.r, moved)


def _paths(op: str, kwargs: dict[str, Any], device: str) -> Calls:
    calls: Calls = {"torch": lambda: OPS[op].eager(**kwargs)}
    if device.startswith("cuda"):

        def triton() -> Any:
            with use_backend("triton"):
                return OPS[op].launch(**kwargs)

        calls["triton"] = triton
    return calls


def _fused(size: Size) -> Question:
    """Whether a Triton product with the adapter inside reaches cuBLAS plus one pass over y."""

    def make(device: str) -> Calls:
        kwargs = arguments("lora_gemm", size, device)
        calls = _paths("lora_gemm", kwargs, device)
        if size.format == "dense":
            x, w = kwargs["x"], kwargs["w"].tensors[0]
            calls["cuBLAS alone"] = lambda: torch.mm(x, w.t())
        elif size.format == "nf4":
            calls |= _bitsandbytes(size, device, **kwargs)
        return calls

    flops = 2.0 * size.m * size.n * (size.k + size.r)
    return Question(f"fused {size.format} product, M={size.m}", size, make, flops)


def _bitsandbytes(size: Size, device: str, x: Tensor, w: Operand, **_: Any) -> Calls:
    """bitsandbytes' own product with a weight it has quantised itself; where it cannot be imported, what that does with
    more than one row: decode the whole weight, then cuBLAS."""
    found = _stored_by_bitsandbytes(size, device)
    if found is None:
        paths = _paths("dequantize", {"w": w, "dtype": size.dtype}, device)
        decode = paths.get("triton", paths["torch"])
        return {"bitsandbytes' formula": lambda: torch.mm(x, decode().t())}
    bnb, packed, state = found
    return {"bitsandbytes": lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)}


def _stored_by_bitsandbytes(size: Size, device: str) -> tuple[Any, Tensor, Any] | None:
    """The package, a weight that it has packed, and how; None where it cannot be imported."""
    try:
        import bitsandbytes as bnb

        weight = Maker(size, device).normal(size.n, size.k, std=size.k**-0.5)
        return bnb, *bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    except Exception as error:
        print(f"  bitsandbytes is left out: {type(error).__name__}: {error}", flush=True)
        return None


def _decode(size: Size) -> Question:
    def make(device: str) -> Calls:
        kwargs = arguments("dequantize", size, device)
        calls = _paths("dequantize", kwargs, device)
        found = _stored_by_bitsandbytes(size, device)
        if found is not None:
            bnb, packed, state = found
            calls["bitsandbytes"] = lambda: bnb.functional.dequantize_4bit(packed, state)
        return calls

    return Question("NF4 to bf16: bandwidth", size, make, 0.0, size.n * size.k * 2.516)


def _back(size: Size) -> Question:
    """What the second read of dy costs that one launch for both gradients needs: p reads dy, the gradients dy and x."""

    def make(device: str) -> Calls:
        return _paths("lora_dt", arguments("lora_dt", size, device), device)

    moved = 2.0 * (size.m * size.n + size.r * (size.m + size.n))
    return Question("p from dy: bandwidth", size, make, 2.0 * size.m * size.n * size.r, moved)


def _gradients(size: Size) -> Question:
    def make(device: str) -> Calls:
        return _paths("lora_factor_grads", arguments("lora_factor_grads", size, device), device)

    columns = size.n + size.k
    factors = 2 * size.m * size.r * (4 if size.wide else 2)
    moved = 2.0 * size.m * columns + factors + 4.0 * size.r * columns
    text = f"db and da of rank {size.r}{' in fp32' * size.wide} in one launch: bandwidth"
    return Question(text, size, make, 2.0 * size.m * columns * size.r, moved)


def all_questions(dry: bool) -> list[Question]:
    """In the order in which they decide the design."""
    if dry:
        small = Size(24, 48, 64, 4)
        quantised = small._replace(format="nf4")
        dense = [_padded, _update, _order, _skinny, _fused, _back, _gradients]
        return [*(ask(small) for ask in dense), _decode(quantised), _fused(quantised)]
    q, gate = Size(8192, 4096, 4096), Size(8192, 14336, 4096)
    nf4 = q._replace(format="nf4")
    return [
        _padded(q), _padded(gate), _update(q), _order(q), _order(gate),
        _skinny(q), _skinny(q._replace(r=48)), _skinny(q._replace(r=256)), _skinny(q._replace(dropout=0.1)),
        *(_skinny(q._replace(m=m, r=r)) for m, r in ((1, 16), (16, 64), (128, 16), (2048, 64))),
        _fused(q), _fused(gate), _decode(nf4), *(_fused(nf4._replace(m=m)) for m in (16, 64, 128, 256, 512, 2048)),
        _back(q), _back(gate), _gradients(q), _gradients(gate), _gradients(q._replace(dropout=0.1)),
        _gradients(q._replace(r=256)), _gradients(q._replace(r=64, wide=True)),
    ]  # fmt: skip
