"""What autocast asks of a product, and how to be left alone by it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _kind(x: Tensor) -> str | None:
    """The type of x's device, None where there is no autocast."""
    if x.is_cuda:
        return "cuda"
    if x.is_cpu:
        return "cpu"
    kind = x.device.type  # which takes the host longer
    return kind if torch.amp.is_autocast_available(kind) else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies x; None where it is off or there is none, and for fp64: it leaves that."""
    kind = _kind(x)
    if kind is None or x.dtype is torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def is_autocasting(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    kind = _kind(x)
    return kind is not None and torch.is_autocast_enabled(kind)


class _Off:
    """`torch.autocast(kind, enabled=False)` takes the host as long as three small products."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context for operations that choose their dtypes themselves."""
    if not is_autocasting(x):
        return _NOTHING
    kind = _kind(x)
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _Off(kind)
