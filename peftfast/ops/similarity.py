"""x Pᵀ for few rows P in fp32 or wider, whatever the precision of x, which is never copied as a whole: what decides by
comparing numbers must not decide by how they were rounded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.autocast import without_autocast
from peftfast.ops.composed import composes
from peftfast.ops.function import apply, as_rows, second_order, shaped_as
from peftfast_kernels.lora_down import lora_down
from peftfast_kernels.lora_gemm import lora_dx


def _again(ctx: Any, ds: Tensor) -> tuple:
    (p,) = ctx.saved_tensors
    return torch.reshape((ds @ p).to(ctx.dtype), ctx.shape), None


class _Similarities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.dtype, ctx.shape = x.dtype, x.shape
        ctx.save_for_backward(p)
        return lora_down(as_rows(x), p, None, 0.0)

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, ds: Tensor) -> tuple:
        (p,) = ctx.saved_tensors
        return torch.reshape(lora_dx(ds, p, None, 0.0, ctx.dtype), ctx.shape), None


def similarities(x: Tensor, p: Tensor) -> Tensor:
    """[..., E], for x [..., K] and p [E, K], which is a constant."""
    p = p.to(torch.promote_types(p.dtype, x.dtype))
    with without_autocast(x):
        if composes(x) or torch.compiler.is_compiling():
            return F.linear(x.to(p.dtype), p)
        s = apply(_Similarities, x, p)
    return shaped_as(s, x)
