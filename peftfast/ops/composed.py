"""Low-rank linears on a CPU with small inputs, in torch's own operations.

There the host takes the time, not the products. torch's derivative runs without Python, its dropout is one operation,
and the masks and casts that it keeps for the backward pass are small. Larger inputs are for `lora.py`'s Function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast_kernels import get_backend

if TYPE_CHECKING:
    from peftfast.ops.lora import Part

#: Elements of an input up to which this is the faster way, by the bytes of one: see bench/results/small_products.md.
SMALL = {8: 1 << 15, 4: 1 << 15, 2: 1 << 18}


def composes(x: Tensor, part: Part) -> bool:
    """Whether `composed_lora` is how this product is best computed."""
    return (
        x.is_cpu
        and x.numel() <= SMALL.get(x.dtype.itemsize, 0)
        and part.w.format == "dense"
        and get_backend() == "auto"
        and not torch.compiler.is_compiling()
    )


def composed_lora(x: Tensor, part: Part) -> Tensor:
    """x Wᵀ + bias + s drop(x) Aᵀ Bᵀ [..., N]: the update in the factors' precision, or in autocast's."""
    w, bias, a, b, plan = part
    n, k = plan.shape
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    dropped = F.dropout(rows, plan.dropout) if plan.dropout else rows
    y = F.linear(rows, w.tensors[0], bias)
    if torch.is_autocast_enabled("cpu"):
        y.add_(F.linear(F.linear(dropped, a), b), alpha=plan.scale)
    elif x.dtype.itemsize >= 4 and x.dtype is a.dtype is b.dtype:
        y.addmm_(F.linear(dropped, a), b.t(), alpha=plan.scale)
    else:  # t is scaled, not the gradients, which would be rounded once more
        y.add_(F.linear(F.linear(dropped.to(plan.branch), a.to(plan.branch)) * plan.scale, b.to(plan.branch)))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
