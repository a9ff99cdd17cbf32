"""Low-rank linears with a block-diagonal factor, kept as its blocks one under the other: A [r, K / blocks], of which
block i reads the i-th slice of the input, or B [N, r / blocks], whose block i writes the i-th slice of the output.

With few tokens the blocks are multiplied one by one, as a batch. With more of them the factor is made whole, which is
rank-sized: then it is part of the step that multiplies by the weight, and nothing of the output's size is made, as
slices that have to be put together would be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfast.autocast import is_autocasting
from peftfast.ops.composed import frozen_product
from peftfast.ops.function import as_rows, composing, shaped_as
from peftfast.ops.plan import Part


def spread(packed: Tensor, blocks: int) -> Tensor:
    """[n, m] with n / blocks rows a block -> [n, blocks · m], block i in the i-th run of rows and of columns, zeros
    elsewhere."""
    if blocks == 1:
        return packed
    n, m = packed.shape
    whole = packed.new_zeros(blocks, n // blocks, blocks, m)
    whole.diagonal(dim1=0, dim2=2).copy_(packed.view(blocks, n // blocks, m).permute(1, 2, 0))
    return whole.view(n, blocks * m)


def by_blocks(x: Tensor, packed: Tensor) -> Tensor:
    """x [M, k] times the transpose of what `spread` makes of packed [n, m], as [M, blocks, n / blocks]."""
    n, m = packed.shape
    blocks = x.shape[1] // m
    if blocks == 1:
        return F.linear(x, packed).unsqueeze(1)
    return torch.bmm(
        x.view(-1, blocks, m).transpose(0, 1), packed.view(blocks, n // blocks, m).transpose(1, 2)
    ).transpose(0, 1)


def grouped_lora(x: Tensor, part: Part) -> Tensor:
    """x Wᵀ + bias + s drop(x) Aᵀ Bᵀ [..., N] for factors of `part` as they are kept: `composed_lora` by blocks."""
    _, _, a, b, plan = part
    rows = as_rows(x)
    y = frozen_product(rows, part)
    dropped = F.dropout(rows, plan.dropout) if plan.dropout else rows
    if is_autocasting(x):
        update = by_blocks(by_blocks(dropped, a).flatten(1), b) * plan.scale
    else:
        t = by_blocks(dropped.to(plan.branch), a.to(plan.branch)).flatten(1) * plan.scale
        update = by_blocks(t, b.to(plan.branch))
    slices = y.view(update.shape)
    if composing() or torch.is_grad_enabled():  # the derivative of writing to a view takes longer than a small copy
        slices = torch.add(slices, update).to(y.dtype)
    else:
        slices.add_(update)
    return shaped_as(slices.view(-1, plan.shape[0]), x)
