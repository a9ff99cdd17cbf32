"""What a calibration has found out, as tensors by name in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftfast.files.atomic import write_atomically


def cached(path: str | os.PathLike | None) -> dict[str, Tensor] | None:
    """The tensors of a file, in host memory; None where there is no such file, or nothing in it.

    Raises:
        ValueError: a file that is damaged, or holds something else; a folder, to which nothing could be written later.
    """
    if path is not None and os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)!r} is a folder; name a file for what the calibration finds")
    if path is None or not os.path.isfile(path) or os.path.getsize(path) == 0:
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # what a damaged pickle raises is as arbitrary as its bytes
        raise ValueError(f"{os.fspath(path)} is damaged or no file of a calibration: {e}") from e
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{os.fspath(path)} is no file of a calibration: it does not hold tensors by name")
    return found


def cache(tensors: Mapping[str, Tensor], path: str | os.PathLike | None) -> None:
    """Write a file that `cached` reads, as a whole or not at all; None: do nothing."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda target: torch.save(dict(tensors), target))
