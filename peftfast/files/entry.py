"""One tensor of an adapter: its names, where it hangs, and how it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from peftfast.layers.layer import BaseTunerLayer
from peftfast.sharding import copy_whole


class Entry(NamedTuple):
    """One tensor of an adapter."""

    file: str  # its key in the file
    live: str  # its name in the model
    owner: nn.Module  # the module that has it
    attribute: str  # under this name
    store: Callable[[Tensor], None] | None = None  # how it is loaded, where copying does not do
    layer: BaseTunerLayer | None = None  # that it belongs to

    @property
    def is_view(self) -> bool:
        """Whether the tensor is another layer's, which has an entry of its own."""
        return hasattr(type(self.owner), "is_view")

    @property
    def is_kept(self) -> bool:
        """Whether the tensor is a Parameter or buffer, and not made of others at every look (parametrized, pruned)."""
        return self.attribute in self.owner._parameters or self.attribute in self.owner._buffers

    def tensor(self) -> Tensor:
        """What it is now."""
        return getattr(self.owner, self.attribute)

    def refusal(self, value: Tensor) -> str | None:
        """Why the tensor cannot become `value`, of its shape; None if it can."""
        if self.store is not None or self.is_kept:
            return None
        if not is_parametrized(self.owner, self.attribute):
            return "is made of other tensors by whatever has changed its module (pruning, weight_norm, ...)"
        chain = copy.deepcopy(self.owner.parametrizations[self.attribute])
        kinds = ", ".join(type(step).__name__ for step in chain)
        current = self.tensor()
        value = value.to(device=current.device, dtype=current.dtype)
        try:
            with torch.no_grad():
                chain.right_inverse(value.clone())
                became = chain()
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as e:
            return f"is parametrized by {kinds}, which takes no values: {e}"
        near = 64 * torch.finfo(value.dtype).eps
        if torch.allclose(became, value, rtol=near, atol=near * float(value.abs().max()) if value.numel() else 0.0):
            return None
        return f"is parametrized by {kinds}, which makes something else of these values"

    def write(self, value: Tensor) -> None:
        """Make the tensor `value`, which has its shape, in place; to be called under `torch.no_grad()`."""
        if self.store is not None:
            self.store(value)
        elif self.is_kept:
            copy_whole(self.tensor(), value)
        else:
            current = self.tensor()
            # a parametrization may keep what it is given
            setattr(self.owner, self.attribute, value.to(device=current.device, dtype=current.dtype, copy=True))

    def replace(self, value: Tensor) -> None:
        """Put `value` in its place as a tensor of its own, without a copy."""
        current = self.tensor()
        if type(current) is nn.Parameter and not current.is_meta:
            current.data = value  # it may hang elsewhere too, and optimizers have it
            return
        if self.attribute not in self.owner._buffers:
            value = nn.Parameter(value, requires_grad=current.requires_grad)
        setattr(self.owner, self.attribute, value)
