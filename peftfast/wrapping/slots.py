"""What the slots of an adapter hold in a layer: Parameters, modules around them, or a view of another layer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.sites.site import Slot

if TYPE_CHECKING:
    from peftfast.layer import BaseTunerLayer


def make_slot(slot: Slot, device: torch.device, dtype: torch.dtype) -> nn.Module | nn.Parameter:
    """What a slot holds: a Parameter, or a module with a weight and perhaps a bias. Values are not set, save `fill`."""

    def parameter(shape: tuple[int, ...]) -> nn.Parameter:
        if slot.fill is not None:
            return nn.Parameter(torch.full(shape, slot.fill, device=device, dtype=torch.float32), requires_grad=False)
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    if slot.holder is None:
        return parameter(slot.shape)
    holder = slot.holder()
    holder.weight = parameter(slot.shape)
    if slot.bias is not None:
        holder.bias = parameter(slot.bias)
    return holder


class TransposedView(nn.Module):
    """Holds no tensor: its `weight` is another layer's factor, transposed."""

    bias = None
    is_view = True

    def __init__(self, source: BaseTunerLayer, slot: str, adapter: str) -> None:
        super().__init__()
        self.__dict__["_source"] = (source, slot, adapter)

    @property
    def weight(self) -> Tensor:
        source, slot, adapter = self.__dict__["_source"]
        return source.adapters[adapter][slot].t()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
