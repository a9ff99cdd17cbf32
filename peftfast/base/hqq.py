"""HQQ's weights (Badri & Shaji 2023, half-quadratic quantisation), through the library's own functions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.opaque import ByModule
from peftfast.base.weight import comes_from, register_format


@register_format
class HqqWeight(ByModule):
    """`hqq.core.quantize.HQQLinear`. Quantising makes new tensors, so those that are kept are never written to."""

    quantization = "hqq"
    foreign_linear = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return not isinstance(module, nn.Linear) and comes_from(type(module), "hqq", "HQQLinear")

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.meta["shape"])

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.module.compute_dtype

    @property
    def device(self) -> torch.device:
        return self.module.W_q.device

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.module.dequantize().detach().to(dtype or self.compute_dtype)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        m = self.module
        exact = weight.to(self.device, torch.float32)
        settings = copy.deepcopy(m.quant_config)
        fresh = type(m)(
            None, {**settings, "offload_meta": m.offload_meta}, compute_dtype=m.compute_dtype, device=m.device
        )
        fresh.quantize(exact.clone(), **settings)
        self.restore((fresh.W_q, fresh.meta))

    def snapshot(self, host: bool = False) -> tuple[Any, Any]:
        return self.module.W_q, self.module.meta

    def restore(self, snapshot: tuple[Any, Any]) -> None:
        self.module.W_q, self.module.meta = snapshot
