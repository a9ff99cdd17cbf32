"""What not every device has: fp64, every decomposition, and random numbers that PyTorch keeps apart by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Afterwards the random numbers of the host and of this device go on as if none had been drawn.

    Args:
        seed: where those of the device begin inside; `torch.manual_seed` would begin those of all devices anew.
    """
    apart = [] if device.type in ("cpu", "meta") else [device]
    # torch 2.11 wants a type also where it is of no device
    with torch.random.fork_rng(apart, device_type=device.type if apart else "cuda"):
        if seed is not None:
            state = torch.Generator(*apart).manual_seed(seed).get_state()
            (torch.get_device_module(device) if apart else torch).set_rng_state(state, *apart)
        yield
