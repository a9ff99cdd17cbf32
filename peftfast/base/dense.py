"""Floating-point weights kept as plain Parameters, in either orientation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from peftfast.base.offload import at_hand, stored_weight
from peftfast.base.parameter import ParameterWeight
from peftfast.base.weight import comes_from, register_format
from peftfast.sharding import whole_shape
from peftfast.watch import Place
from peftfast_kernels.decode import Operand


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer that stores its weight as [in, out]."""
    return comes_from(type(module), "transformers", "Conv1D")


def was_conv1d(packed: nn.Module) -> bool:
    """Whether this packed linear layer was one before, as transformers writes down where it packs it."""
    return comes_from(getattr(packed, "source_cls", nn.Linear), "transformers", "Conv1D")


@register_format
class DenseWeight(ParameterWeight):
    """fp64, fp32, bf16 or fp16, `[N, K, ...]` as in `nn.Linear`, `nn.Embedding` and `nn.ConvNd`, or `[K, N]` as in
    transformers' `Conv1D`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "weight")
        self.transposed = is_conv1d(module)
        self._last: Operand | None = None  # of the weight that was there last time

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}  # what functorch's transforms put there cannot be copied

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or len(whole_shape(weight)) < 2:
            return False
        # one byte a weight means its value only in torch's own modules, where somebody widens it for every call
        return weight.element_size() > 1 or type(module).__module__.startswith("torch.nn.")

    @property
    def shape(self) -> tuple[int, int]:
        shape = whole_shape(self.module.weight)
        n, k = shape[0], shape[1:].numel()
        return (k, n) if self.transposed else (n, k)

    def operand(self, x: Tensor, autocast: torch.dtype | None) -> Operand | None:
        # an attribute of a module is a slow lookup; sharded and parametrised modules need it
        weight = self.module._parameters.get("weight")
        if weight is None:
            weight = self.module.weight
        if weight.requires_grad or weight.dim() != 2:
            return None  # a trained base needs a gradient for W, which the fused product never computes
        dtype = weight.dtype if autocast is None else autocast
        if autocast is None and x.dtype is not dtype:
            return None
        # graphs must not depend on whether anybody has called before
        last = None if torch.compiler.is_compiling() else self._last
        if last is not None and last.tensors[0] is weight and last.dtype is dtype:
            return last
        shape = (weight.shape[1], weight.shape[0]) if self.transposed else (weight.shape[0], weight.shape[1])
        made = Operand("dense_t" if self.transposed else "dense", [weight], shape, dtype)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # in a trace, sizes are tensors of the trace
            self._last = made
        return made

    def lasting(self, w: Operand) -> list[Place] | None:
        own = self.module._parameters
        return [(own, "weight", w.tensors[0])] if own.get("weight") is w.tensors[0] else None

    def readable(self) -> Operand:
        weight = at_hand(self.module).detach()
        matrix = weight if weight.dim() == 2 else weight.flatten(1)
        return Operand("dense_t" if self.transposed else "dense", [matrix], self.shape, weight.dtype)

    def seen(self) -> Tensor:
        weight = stored_weight(self.module).detach()
        return weight.t() if self.transposed else weight.flatten(1)


@register_format
class TransposedConvWeight(DenseWeight):
    """Of torch's `ConvTransposeNd`, which keeps [input channels, output channels, ...]. Not for grouped ones."""

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return isinstance(module, _ConvTransposeNd) and super().claims(module)

    @property
    def shape(self) -> tuple[int, int]:
        k, n, *kernel = whole_shape(self.module.weight)
        return n, k * math.prod(kernel)

    def operand(self, x: Tensor, autocast: torch.dtype | None) -> None:
        return None

    def readable(self) -> Operand:
        return Operand("dense", [self.as_matrix(at_hand(self.module).detach())], self.shape, self.compute_dtype)

    def seen(self) -> Tensor:
        return self.as_matrix(stored_weight(self.module).detach())

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.transpose(0, 1).flatten(1)

    def as_stored(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return weight.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1)
