"""What the slots of an adapter hold in a layer: Parameters, modules around them, or a view of another layer's."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.owner import Owner
from peftfast.sites.site import Slot

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer


def make_slot(slot: Slot, device: torch.device, dtype: torch.dtype) -> nn.Module | Tensor:
    """What a slot holds: a Parameter or buffer, or a module with Parameters and buffers. Values are not set, save
    `fill`."""
    own = slot.dtype or dtype
    if slot.buffer:
        return torch.full(slot.shape, slot.fill or 0.0, device=device, dtype=own)

    def parameter(shape: tuple[int, ...]) -> nn.Parameter:
        if slot.fill is not None:  # exact in fp32, and of no less precision than what it is computed with
            exact = torch.promote_types(dtype, torch.float32)
            return nn.Parameter(torch.full(shape, slot.fill, device=device, dtype=exact), requires_grad=False)
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    if slot.holder is None:
        return parameter(slot.shape)
    holder = slot.holder()
    for leaf, shape in slot.parameters().items():
        setattr(holder, leaf, parameter(shape))
    for name, shape in (slot.buffers or {}).items():
        holder.register_buffer(name, torch.empty(shape, device=device, dtype=own))
    return holder


class BufferDict(nn.Module):
    """Buffers by the adapters' names."""

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key in self._buffers:
            self._buffers[key] = value
        else:
            self.register_buffer(key, value)

    def __delitem__(self, key: str) -> None:
        delattr(self, key)

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def values(self) -> ValuesView[Tensor]:
        return self._buffers.values()

    def items(self) -> ItemsView[str, Tensor]:
        return self._buffers.items()


def container_of(slot: Slot) -> type[nn.Module]:
    """In what a layer keeps such slots of all adapters."""
    if slot.buffer:
        return BufferDict
    return nn.ParameterDict if slot.holder is None else nn.ModuleDict


class SlotDict(nn.ModuleDict):
    """A slot that methods fill differently: modules of some adapters, bare Parameters of others, in one dict."""

    def __init__(self, present: nn.ModuleDict | nn.ParameterDict) -> None:
        super().__init__()
        self.training = present.training
        for name, value in present.items():
            self[name] = value

    def __getitem__(self, key: str) -> nn.Module | nn.Parameter:
        return self._parameters[key] if key in self._parameters else self._modules[key]

    def __setitem__(self, key: str, value: nn.Module | nn.Parameter) -> None:
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        delattr(self, key)

    def __contains__(self, key: str) -> bool:
        return key in self._parameters or key in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter((*self._modules, *self._parameters))

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)

    def keys(self) -> KeysView[str]:
        return {**self._modules, **self._parameters}.keys()

    def values(self) -> ValuesView[nn.Module | nn.Parameter]:
        return {**self._modules, **self._parameters}.values()

    def items(self) -> ItemsView[str, nn.Module | nn.Parameter]:
        return {**self._modules, **self._parameters}.items()


class TransposedView(nn.Module):
    """Holds no tensor: its `weight` is another layer's factor, transposed."""

    bias = None
    is_view = True

    def __init__(self, source: BaseTunerLayer, slot: str, adapter: str) -> None:
        super().__init__()
        self.__dict__["_source"] = (Owner(source), slot, adapter)  # whose batches' factors may be this one's

    @property
    def weight(self) -> Tensor:
        source, slot, adapter = self.__dict__["_source"]
        return source().adapters[adapter][slot].t()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
