"""What not every device has: fp64, and every decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

#: Types of devices that have fp64; of Intel's GPUs ("xpu") each says so itself.
_WITH_FP64 = ("cpu", "cuda", "meta")


def widest(device: torch.device) -> torch.dtype:
    """fp64, or fp32 where nothing says that there is any: Apple's GPUs have none, and of Intel's not all have."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float64 if device.type in _WITH_FP64 else torch.float32


def singular_values(matrix: Tensor) -> Tensor:
    """Those of a matrix or a stack, the largest first; found by the host for Apple's GPUs before torch 2.14."""
    try:
        return torch.linalg.svdvals(matrix)
    except NotImplementedError:
        return torch.linalg.svdvals(matrix.cpu()).to(matrix.device)
