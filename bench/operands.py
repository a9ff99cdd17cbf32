"""Random arguments of every op at any size, made on the device, and the shapes of current models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast_kernels import Operand, dense, dense_t, make_route


class Model(NamedTuple):
    """Sizes of a model of Llama's kind."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linear layers of one block; equal ones once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k/v": (kv, self.hidden),
            "gate/up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = (
    Model("llama-3-8b", 4096, 14336, 32, 8, 128),
    Model("qwen3-0.6b", 1024, 3072, 16, 8, 128),
    Model("qwen3-8b", 4096, 12288, 32, 8, 128),
    Model("qwen3-32b", 5120, 25600, 64, 8, 128),
    Model("gemma-2-9b", 3584, 14336, 16, 8, 256),
    Model("vit-l-16", 1024, 4096, 16, 16, 64),
)
TINY = Model("tiny", 64, 96, 4, 2, 16)


class Size(NamedTuple):
    """One point of the sweep. K input features, N output features, M rows, rank r."""

    m: int
    n: int
    k: int
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    format: str = "dense"
    dropout: float = 0.0
    adapters: int = 1
    wide: bool = False  # factors in fp32 beside half-precision activations


class Maker:
    """Tensors of one size on one device."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        self.generator = torch.Generator(device).manual_seed(size.m + size.n)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return made.mul_(std).to(dtype or self.size.dtype)

    def factor(self, *shape: int, std: float = 1.0) -> Tensor:
        """A factor, or a product with one."""
        return self.normal(*shape, std=std, dtype=torch.float32 if self.size.wide else None)

    def bytes(self, *shape: int, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    @property
    def seed(self) -> Tensor | None:
        return torch.tensor(12345, dtype=torch.int64, device=self.device) if self.size.dropout else None

    def operand(self) -> Operand:
        """A weight of the size's format in which every code is legal; 4-bit scales are nested, as QLoRA's are."""
        (n, k), dtype, std = (self.size.n, self.size.k), self.size.dtype, self.size.k**-0.5
        if self.size.format == "dense":
            return dense(self.normal(n, k, std=std))
        if self.size.format == "dense_t":
            return dense_t(self.normal(k, n, std=std))
        if self.size.format == "int8":
            rows = self.bytes(n, k, high=255, dtype=torch.int16).sub_(127).to(torch.int8)
            return Operand("int8", [rows, torch.full((n,), 2.4 * std, device=self.device)], (n, k), dtype)
        blocks = -(-n * k // 64)
        code = torch.linspace(-1, 1, 256, device=self.device)
        outer = torch.full((-(-blocks // 256),), std, device=self.device)
        offset = torch.tensor(2 * std, device=self.device)
        packed = self.bytes((n * k + 1) // 2, 1)
        return Operand(self.size.format, [packed, self.bytes(blocks), code, outer, offset], (n, k), dtype)

    def route(self) -> dict[str, Tensor]:
        rows = self.bytes(self.size.m, high=self.size.adapters, dtype=torch.int64)
        return make_route(rows, self.size.adapters)._asdict()


#: op name -> its arguments at a size
BUILDERS: dict[str, Callable[[Maker], dict[str, Any]]] = {}


def _builds(function: Callable[[Maker], dict[str, Any]]) -> Callable[[Maker], dict[str, Any]]:
    """Decorator: it makes the arguments of the op whose name follows the underscore."""
    BUILDERS[function.__name__[1:]] = function
    return function


@_builds
def _lora_down(t: Maker) -> dict[str, Any]:
    s = t.size
    return {"x": t.normal(s.m, s.k), "a": t.factor(s.r, s.k, std=s.k**-0.5), "seed": t.seed, "prob": s.dropout}


@_builds
def _lora_gemm(t: Maker) -> dict[str, Any]:
    s = t.size
    return {
        "x": t.normal(s.m, s.k), "w": t.operand(), "bias": None, "t": t.factor(s.m, s.r),
        "b": t.factor(s.n, s.r, std=s.r**-0.5), "scale": 2.0,
    }  # fmt: skip


@_builds
def _lora_gemm_t(t: Maker) -> dict[str, Any]:
    s = t.size
    return {
        "dy": t.normal(s.m, s.n), "w": t.operand(), "p": t.factor(s.m, s.r), "a": t.factor(s.r, s.k, std=s.r**-0.5),
        "seed": t.seed, "prob": s.dropout,
    }  # fmt: skip


@_builds
def _lora_add(t: Maker) -> dict[str, Any]:
    s = t.size
    return {"y": t.normal(s.m, s.n), "t": t.factor(s.m, s.r), "b": t.factor(s.n, s.r, std=s.r**-0.5), "scale": 2.0}


@_builds
def _lora_dx(t: Maker) -> dict[str, Any]:
    s = t.size
    a = t.factor(s.r, s.k, std=s.r**-0.5)
    return {"p": t.factor(s.m, s.r), "a": a, "seed": t.seed, "prob": s.dropout, "dtype": s.dtype}


@_builds
def _lora_dt(t: Maker) -> dict[str, Any]:
    s = t.size
    return {"dy": t.normal(s.m, s.n), "b": t.factor(s.n, s.r, std=s.n**-0.5), "scale": 2.0}


@_builds
def _lora_factor_grads(t: Maker) -> dict[str, Any]:
    s = t.size
    return {
        "dy": t.normal(s.m, s.n), "t": t.factor(s.m, s.r), "x": t.normal(s.m, s.k), "p": t.factor(s.m, s.r),
        "seed": t.seed, "prob": s.dropout, "scale": 2.0, "db_dtype": torch.float32, "da_dtype": torch.float32,
    }  # fmt: skip


def _qkv(t: Maker, build: Callable[[Maker], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What one linear takes, and the same in lists of three: N columns, and twice a quarter of them."""
    widths = (t.size.n, max(t.size.n // 4, 1), max(t.size.n // 4, 1))
    parts = [build(Maker(t.size._replace(n=n), t.device)) for n in widths]
    return parts[0], {name: [part[name] for part in parts] for name in parts[0]}


@_builds
def _siblings_down(t: Maker) -> dict[str, Any]:
    one, three = _qkv(t, _lora_down)
    return {"x": one["x"], "a": three["a"], "seeds": three["seed"], "probs": three["prob"]}


@_builds
def _siblings_dt(t: Maker) -> dict[str, Any]:
    _, three = _qkv(t, _lora_dt)
    return {"dys": three["dy"], "b": three["b"], "scales": three["scale"]}


@_builds
def _siblings_gemm(t: Maker) -> dict[str, Any]:
    one, three = _qkv(t, _lora_gemm)
    return {"x": one["x"], **{n: three[n] for n in ("w", "bias", "t", "b")}, "scales": three["scale"]}


@_builds
def _siblings_gemm_t(t: Maker) -> dict[str, Any]:
    _, three = _qkv(t, _lora_gemm_t)
    same = {n: three[n] for n in ("w", "p", "a")}
    return {"dys": three["dy"], **same, "seeds": three["seed"], "probs": three["prob"]}


@_builds
def _siblings_factor_grads(t: Maker) -> dict[str, Any]:
    one, three = _qkv(t, _lora_factor_grads)
    return {
        "dys": three["dy"], "t": three["t"], "x": one["x"], "p": three["p"], "seeds": three["seed"],
        "probs": three["prob"], "scales": three["scale"], "db_dtype": torch.float32, "da_dtype": torch.float32,
    }  # fmt: skip


@_builds
def _dequantize(t: Maker) -> dict[str, Any]:
    return {"w": t.operand(), "dtype": t.size.dtype}


@_builds
def _row_norm(t: Maker) -> dict[str, Any]:
    s, wide = t.size, torch.float32
    a, b = t.normal(s.r, s.k, std=s.k**-0.5, dtype=wide), t.normal(s.n, s.r, std=0.01, dtype=wide)
    return {"w": t.operand(), "a": a, "b": b, "scale": 2.0}


@_builds
def _dora_add(t: Maker) -> dict[str, Any]:
    s = t.size
    g = t.normal(s.n, std=0.1, dtype=torch.float32) + 1
    b = t.factor(s.n, s.r, std=s.r**-0.5)
    return {"y": t.normal(s.m, s.n), "g": g, "shift": None, "t": t.factor(s.m, s.r), "b": b, "scale": 2.0}


@_builds
def _feature_scale(t: Maker) -> dict[str, Any]:
    return {"y": t.normal(t.size.m, t.size.n), "s": t.normal(t.size.n, dtype=torch.float32)}


@_builds
def _feature_scale_grad(t: Maker) -> dict[str, Any]:
    s = t.size
    vector = t.normal(s.n, dtype=torch.float32)
    return {"dy": t.normal(s.m, s.n), "y": t.normal(s.m, s.n), "s": vector, "grad_dtype": torch.float32}


@_builds
def _gated(t: Maker) -> dict[str, Any]:
    s = t.size
    return {"gate": t.normal(s.m, s.n), "up": t.normal(s.m, s.n), "act": "silu"}


@_builds
def _gated_grad(t: Maker) -> dict[str, Any]:
    return {"dh": t.normal(t.size.m, t.size.n), **_gated(t)}


@_builds
def _keep_mask(t: Maker) -> dict[str, Any]:
    s = t.size
    prob = s.dropout or 0.1
    seed = torch.tensor(12345, dtype=torch.int64, device=t.device)
    return {"seed": seed, "prob": prob, "rows": s.m, "cols": s.k, "device": torch.device(t.device)}


def _routed(t: Maker) -> dict[str, Any]:
    s = t.size
    return {
        "a": t.normal(s.adapters, s.r, s.k, std=s.k**-0.5), "b": t.normal(s.adapters, s.n, s.r, std=s.r**-0.5),
        "scales": torch.full((s.adapters,), 2.0, device=t.device), **t.route(),
    }  # fmt: skip


_ROUTE = ("rows", "order", "starts")


@_builds
def _routed_down(t: Maker) -> dict[str, Any]:
    made = _routed(t)
    return {"x": t.normal(t.size.m, t.size.k), **{n: made[n] for n in (*_ROUTE, "a")}}


@_builds
def _routed_add(t: Maker) -> dict[str, Any]:
    made, s = _routed(t), t.size
    return {"y": t.normal(s.m, s.n), "t": t.normal(s.m, s.r), **{n: made[n] for n in (*_ROUTE, "b", "scales")}}


@_builds
def _routed_up_grad(t: Maker) -> dict[str, Any]:
    made = _routed_add(t)
    return {"dy": made.pop("y"), **made, "grad_dtype": torch.float32}


@_builds
def _routed_down_grad(t: Maker) -> dict[str, Any]:
    s = t.size
    x, p = t.normal(s.m, s.k), t.normal(s.m, s.r)
    return {"x": x, "p": p, **t.route(), "grad_dtype": torch.float32}


def arguments(op: str, size: Size, device: str) -> dict[str, Any]:
    """The keyword arguments of one call."""
    return BUILDERS[op](Maker(size, device))
