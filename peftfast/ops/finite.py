"""Whether a tensor has values that are no numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values of a floating-point tensor are finite, also rounded to `dtype`. Its extremes say so, which one
    pass over it finds; `isfinite` makes five, and writes four tensors of its size."""
    if not tensor.numel():
        return True
    extremes = torch.aminmax(tensor.float() if tensor.itemsize == 1 else tensor)
    return all(math.isfinite(value if dtype is None else value.to(dtype)) for value in extremes)
