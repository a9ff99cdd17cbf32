"""What is put in the place of something of a model is compared with it first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Equal but for rounding: root mean square within four units in the last place of a half-precision result, 64 of a
    wider one, whose products are summed in another order. Where one of the two overflows they tell nothing."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    limit = (4 if theirs.dtype.itemsize == 2 else 64) * torch.finfo(theirs.dtype).eps
    wide = torch.promote_types(theirs.dtype, torch.float32)
    finite = ours.isfinite() & theirs.isfinite()
    ours, theirs = ours[finite].to(wide), theirs[finite].to(wide)
    return ours.numel() > 0 and bool(((ours - theirs).norm() <= limit * theirs.norm()).item())


@contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for m, training in modes:
            m.training = training
