"""AdaLoRA's regulariser, mean over all factors of ‖P Pᵀ - I‖ (Zhang et al., arXiv 2303.10512, equation 4), for all
layers in a few batched products: the number of operations grows with the number of different shapes, not of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftfast.autocast import without_autocast
from peftfast.ops.function import composing, gradients_of, second_order
from peftfast.sharding import put_together


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors that can be stacked: same shape, dtype and device."""
    groups: dict[tuple, list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    return list(groups.values())


def _again(ctx: Any, dy: Tensor) -> tuple:
    needs = ctx.needs_input_grad[1:]
    factors = ctx.saved_tensors[: len(needs)]
    return None, *gradients_of(_composed(factors[: ctx.downs], factors[ctx.downs :]), factors, needs, dy)


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, downs: int, *factors: Tensor) -> Tensor:
        ctx.groups, ctx.downs, kept, norms = by_shape(factors), downs, [], []
        # a factor of the shape of one of the other side is square: P Pᵀ and Pᵀ P have the same distance, and gradient
        for group in ctx.groups:
            p = _stacked(factors, group, downs)
            gap = torch.bmm(p, p.mT)
            gap.diagonal(dim1=1, dim2=2).sub_(1.0)
            norm = torch.linalg.vector_norm(gap, dim=(1, 2))
            norms.append(norm)
            # d‖G‖ / dP = 2 G P / ‖G‖; zero at ‖G‖ = 0, as torch.norm has it
            kept.append(gap.mul_(torch.where(norm > 0, 2.0 / norm, 0.0)[:, None, None]))
        ctx.save_for_backward(*factors, *kept)
        return torch.cat([n.to(norms[0].device) for n in norms]).sum() / len(factors)

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        count = len(ctx.needs_input_grad) - 1
        factors, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grads: list[Tensor | None] = [None] * count
        for group, gap in zip(ctx.groups, kept, strict=True):
            grad = torch.bmm(gap * (dy.to(gap.device) / count), _stacked(factors, group, ctx.downs))
            grad = grad if group[0] < ctx.downs else grad.mT
            for i, g in zip(group, grad.to(factors[group[0]].dtype).unbind(0), strict=True):
                grads[i] = g
        return (None, *grads)


def _stacked(factors: Sequence[Tensor], group: list[int], downs: int) -> Tensor:
    """[L, r, features] in fp32 or wider."""
    p = torch.stack([factors[i] for i in group])
    p = p if group[0] < downs else p.mT
    return p.float() if p.dtype in (torch.float16, torch.bfloat16) else p


def _composed(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """The same in operations that torch differentiates itself."""
    norms = []
    for p in (*downs, *(b.mT for b in ups)):
        p = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
        gap = p @ p.mT - torch.eye(p.shape[0], dtype=p.dtype, device=p.device)
        norms.append(torch.linalg.vector_norm(gap))
    return torch.stack([n.to(norms[0].device) for n in norms]).mean()


def orthogonality(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """The mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (Frobenius) over all factors, a scalar with gradients for all of them.

    Args:
        downs: A [r, K] of every layer. ups: B [N, r].
    """
    # between blocks, FSDP2 keeps their factors sharded
    downs, ups = (list(map(put_together, factors)) for factors in (downs, ups))
    with without_autocast(downs[0]):
        if composing():
            return _composed(downs, ups)
        return _Orthogonality.apply(len(downs), *downs, *ups)
