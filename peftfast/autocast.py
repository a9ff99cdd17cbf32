"""What autocast asks of a product, and how to be left alone by it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies on x's device; None where it is off or there is none."""
    if x.is_cuda:
        kind = "cuda"
    elif x.is_cpu:
        kind = "cpu"
    else:  # a device's type takes the host longer
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):
            return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context for operations that choose their dtypes themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # making a context that changes nothing takes the host as long as a small product
