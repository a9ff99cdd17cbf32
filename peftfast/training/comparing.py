"""What is put in the place of something of a model is compared with it first."""

from __future__ import annotations

import torch
from torch import Tensor


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
