"""y · s per feature with the gradient of s summed in fp32: IA3's vectors (Liu et al., arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftfast.ops.composed import composes
from peftfast.ops.function import apply, as_dtype, as_rows, fresh, gradients_of, second_order
from peftfast.ops.host_bound import is_small
from peftfast_kernels.feature_scale import feature_scale, feature_scale_grad


def _again(ctx: Any, dy: Tensor) -> tuple:
    y, s = ctx.saved_tensors
    return tuple(gradients_of(as_dtype(y * s, y.dtype), (y, s), ctx.needs_input_grad, dy))


class _ScaleFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(y, s)
        return fresh(torch.reshape(feature_scale(as_rows(y), s), y.shape))

    @staticmethod
    @second_order(_again)
    def backward(ctx: Any, dy: Tensor) -> tuple:
        y, s = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return torch.reshape(feature_scale(as_rows(dy), s), dy.shape), None
        dx, ds = feature_scale_grad(as_rows(dy), as_rows(y), s, s.dtype)
        return (torch.reshape(dx, dy.shape) if ctx.needs_input_grad[0] else None), ds


def scale_features(y: Tensor, s: Tensor) -> Tensor:
    """y · s in y's dtype, multiplied in the wider of the two dtypes and rounded once.

    Args:
        y: [..., N]. s: [N], fp32 beside half-precision activations.
    """
    if type(y) not in (Tensor, torch.nn.Parameter) or y.numel() == 0:  # sharded tensors, which kernels cannot read
        return as_dtype(y * s, y.dtype)
    if composes(y) or not torch.compiler.is_compiling() and is_small(y):
        return as_dtype(y * s, y.dtype)
    if y.dtype == s.dtype and not feature_scale.runs_triton(y, s):  # torch's product keeps and moves no more than ours
        return y * s
    return apply(_ScaleFeatures, y, s)
