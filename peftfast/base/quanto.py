"""optimum-quanto's weights (int8, int4, int2, float8), through the library's own functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfast.base.opaque import ByModule
from peftfast.base.weight import comes_from, register_format


@register_format
class QuantoWeight(ByModule):
    """The weight of a frozen module of `optimum.quanto`; one that is not frozen has a dense weight, quantised in every
    call. Quantising makes a new tensor, so one that is kept is never written to."""

    quantization = "quanto"
    cuts_gradients = False

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return comes_from(type(module._parameters.get("weight")), "optimum", "QTensor")

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.module.weight.shape
        return shape[0], shape[1:].numel()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.module.weight.dequantize().detach().flatten(1).to(dtype or self.compute_dtype)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        before = self.module.weight
        dense = weight.to(before.device, before.dtype).reshape(before.shape)
        self.module.weight = nn.Parameter(dense, requires_grad=False)
        self.module.freeze()
        self.module.weight.requires_grad_(False)

    def snapshot(self, host: bool = False) -> Tensor:
        return self.module.weight

    def restore(self, snapshot: Tensor) -> None:
        self.module.weight = snapshot
