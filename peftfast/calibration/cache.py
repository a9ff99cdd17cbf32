"""What a calibration has found out, as tensors by name in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def cached(path: str | os.PathLike | None) -> dict[str, Tensor] | None:
    """The tensors of a file, in host memory; None where there is no such file, or nothing in it."""
    if path is None or not os.path.isfile(path) or os.path.getsize(path) == 0:
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def cache(tensors: Mapping[str, Tensor], path: str | os.PathLike | None) -> None:
    """Write a file that `cached` reads; None: do nothing."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), path)
