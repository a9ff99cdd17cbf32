"""Whether a tensor has values that are no numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values of a floating-point tensor are finite, also rounded to `dtype`. A finite sum says so, and the
    extremes where it is too large or the dtype another; `isfinite` makes five passes, and writes four tensors."""
    tensor = tensor.float() if tensor.itemsize == 1 else tensor
    if dtype in (None, tensor.dtype) and math.isfinite(tensor.sum()) or not tensor.numel():
        return True
    return all(math.isfinite(value if dtype is None else value.to(dtype)) for value in torch.aminmax(tensor))
