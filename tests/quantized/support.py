"""Small quantised modules and models, and the measure of the tests here: an fp64 oracle on the dequantised weight."""

from __future__ import annotations

import copy
from typing import NamedTuple

import bitsandbytes as bnb
import torch
from portable_bitsandbytes import dequantize_4bit
from torch import Tensor, nn

from peftfast.base.weight import base_weight, quantizer

#: id -> (format, options): what a base may be stored as
BASES = {
    "nf4": ("nf4", {}),
    "nf4-nested": ("nf4", {"double_quant": True}),
    "fp4": ("fp4", {}),
    # Not 128: blocks would straddle rows, which bitsandbytes' CPU kernel gets wrong (portable_bitsandbytes.py).
    "fp4-nested-32": ("fp4", {"double_quant": True, "blocksize": 32}),
    "nf4-stored-as-bf16": ("nf4", {"quant_storage": torch.bfloat16}),
    "int8": ("int8", {}),
    "int8-no-outliers": ("int8", {"threshold": 0.0}),
}
FOUR_BIT = [name for name in BASES if "4" in name]
IDS = torch.arange(1, 33).reshape(2, 16)


def quantised_linear(base: str, n: int = 48, k: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A bitsandbytes linear layer over a random weight."""
    g = torch.Generator().manual_seed(seed)
    kind, options = BASES[base]
    weight = (torch.randn(n, k, generator=g) / k**0.5).to(dtype)
    return quantizer(kind).module(weight, torch.randn(n, generator=g).to(dtype), **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stored_bytes(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every tensor that a quantised module consists of, as raw bytes."""
    weight = module.weight
    tensors = {"weight": weight.data, "bias": module.bias}
    for holder in (weight, getattr(module, "state", None)):
        for name in ("CB", "SCB"):
            tensors[f"{type(holder).__name__}.{name}"] = getattr(holder, name, None)
    state = getattr(weight, "quant_state", None)
    for prefix, part in (("", state), ("state2.", getattr(state, "state2", None))):
        for name in ("absmax", "code", "offset"):
            tensors[f"{prefix}{name}"] = getattr(part, name, None)
    return [
        (name, t.detach().contiguous().reshape(-1).view(torch.uint8).clone())
        for name, t in tensors.items()
        if t is not None
    ]


def assert_same_bytes(before: list[tuple[str, Tensor]], after: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in before] == [name for name, _ in after]
    for (name, a), (_, b) in zip(before, after, strict=True):
        assert torch.equal(a, b), f"{name} changed"


def bnb_weight(module: nn.Module) -> Tensor:
    """The weight as bitsandbytes dequantises it."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


class Result(NamedTuple):
    """What a forward and a backward give."""

    y: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor


def exact_result(
    module: nn.Module, x: Tensor, a: Tensor, b: Tensor, scale: float, dy: Tensor, mask: Tensor | None
) -> Result:
    """y = x Wᵀ + bias + s (mask · x) Aᵀ Bᵀ and its gradients in fp64, on the dequantised weight."""
    x, a, b = (t.detach().double().requires_grad_(True) for t in (x, a, b))
    dropped = x if mask is None else x * mask.double()
    y = x @ bnb_weight(module).double().t() + scale * (dropped @ a.t()) @ b.t()
    if module.bias is not None:
        y = y + module.bias.double()
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.double())
    return Result(y.detach(), dx, da, db)


def assert_no_further(ours: Result, theirs: Result, exact: Result) -> None:
    """Our error is no larger than theirs: RMS within the noise of rounding, largest element within twice theirs."""
    for name, o, t, e in zip(Result._fields, ours, theirs, exact, strict=True):
        mine, other = (o.double() - e), (t.double() - e)
        floor = torch.finfo(torch.float32).eps * e.abs().max()  # where theirs happens to be exact
        assert torch.isfinite(mine).all(), name
        assert mine.pow(2).mean().sqrt() <= 1.1 * other.pow(2).mean().sqrt() + floor, name
        assert mine.abs().max() <= 2 * other.abs().max() + floor, name


def clone(module: nn.Module) -> nn.Module:
    """A copy with tensors of its own, the quant_state included."""
    new = copy.deepcopy(module)
    for m in new.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            m.quant_state = m.weight.quant_state
    return new


def dense(module: nn.Module) -> Tensor:
    """The stored weight in fp32, through the storage format."""
    return base_weight(module).dense(torch.float32)
