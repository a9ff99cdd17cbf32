"""bitsandbytes' LLM.int8 weights: one scale per output row (Dettmers et al., arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.bnb4 import OFFLOADED, BnbWeight, decoded, import_bnb, is_bnb
from peftfast.base.rounding import drawn
from peftfast.base.weight import QUANTIZERS, Quantizer, frozen, kept_copy, register_format
from peftfast.rules import number
from peftfast_kernels.decode import Operand


@register_format
class Int8Weight(BnbWeight):
    """`bitsandbytes.nn.Linear8bitLt` and `Embedding8bit` with quantised weights: int8 [N, K] and a scale [N], which
    the first forward moves from the Parameter to the module's `state`.

    The module itself multiplies: its int8 product quantises the input and takes outlier columns apart, which is part
    of what the model computes.
    """

    quantization = "int8"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if not module.weight.is_meta:
            self._scales()

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        if not is_bnb(module, "Linear8bitLt", "Embedding8bit"):
            return False
        # with has_fp16_weights the weight is dense, and quantised anew in every forward
        return not getattr(module.weight, "has_fp16_weights", False) or module.weight.dtype == torch.int8

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype = getattr(self.module, "dtype", None)
        # the product follows the input's dtype; adapters get the dtype that any new Parameter has
        return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.get_default_dtype()

    def _holder(self) -> Any:
        """What has the scales now: the Parameter, or the module's state."""
        state = getattr(self.module, "state", None)
        for holder in (self.module.weight, state):
            if getattr(holder, "SCB", None) is not None:
                return holder
        return None

    def _scales(self) -> Tensor:
        """fp32 [N], checked.

        Raises:
            ValueError: they are missing or do not fit the weight.
        """
        m, holder = self.module, self._holder()
        problem = None
        if m.weight.is_meta:
            problem = OFFLOADED
        elif m.weight.dtype != torch.int8:
            problem = (
                "the 8-bit module has not been quantised yet, its weight is still dense; move the model to its device "
                "(model.to(device)) before adding adapters"
            )
        elif tuple(m.weight.shape) != self.shape:
            problem = f"the 8-bit weight has shape {tuple(m.weight.shape)}, the module is {list(self.shape)}"
        elif holder is None:
            problem = (
                "the scales (SCB) of the 8-bit weight are missing, on the Parameter and in the module's state. Without "
                "them the codes mean nothing; load the model again, or restore `weight.SCB`"
            )
        elif holder.SCB.numel() != self.shape[0]:
            problem = f"the 8-bit weight has {self.shape[0]} rows, but {holder.SCB.numel()} scales (SCB)"
        if problem:
            raise ValueError(f"{self.name or type(m).__name__}: {problem}")
        return holder.SCB

    def readable(self) -> Operand:
        codes = self.module.weight.data
        return Operand("int8", [codes, self._scales().to(codes.device, torch.float32)], self.shape, torch.float32)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return decoded(self.readable(), dtype or torch.float32)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        self._write(*quantise_rows(weight.to(self.device, torch.float32)))

    @torch.no_grad()
    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        scales = self._scales().to(self.device, torch.float32)
        step = torch.where(scales > 0, 127.0 / scales, 0.0)
        levels = torch.arange(-127, 128, dtype=torch.float32, device=self.device)
        codes = drawn(weight.to(self.device, torch.float32) * step[:, None], levels, generator)
        self._write(codes.to(torch.int16).sub_(127).to(torch.int8), scales)

    def snapshot(self, host: bool = False) -> tuple[Tensor, Tensor]:
        return kept_copy(self.module.weight.data, host), kept_copy(self._scales(), host)

    def _write(self, codes: Tensor, scales: Tensor) -> None:
        m = self.module
        m.weight.data.copy_(codes)
        self._scales().copy_(scales)
        for holder in (m.weight, getattr(m, "state", None)):
            own = getattr(holder, "CB", None)
            # usually the weight's own memory; a copy of it elsewhere would be multiplied with
            if own is not None and own.data_ptr() != m.weight.data_ptr():
                own.copy_(codes)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [N, K] and scales fp32 [N] of `weight` fp32 [N, K]: the row's largest magnitude becomes 127."""
    room = weight.abs()
    scales = room.amax(dim=1)
    step = torch.where(scales > 0, 127.0 / scales, 0.0)
    return torch.mul(weight, step[:, None], out=room).round_().to(torch.int8), scales


@torch.no_grad()
def _quantised(weight: Tensor, bias: Tensor | None, *, threshold: float = 6.0) -> nn.Module:
    """A Linear8bitLt with `weight` [N, K] quantised where it is."""
    bnb = import_bnb("quantize='int8'")
    codes, scales = quantise_rows(weight.detach().float())
    module = bnb.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    module.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    module.bias = frozen(bias)
    return module


def _config(*, threshold: float = 6.0) -> Mapping[str, Any]:
    return {"load_in_8bit": True, "llm_int8_threshold": threshold}


QUANTIZERS["int8"] = Quantizer(_quantised, _config, {"threshold": number(0)})
