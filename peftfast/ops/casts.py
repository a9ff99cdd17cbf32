"""Compute-dtype copies of the fp32 factors: made for a whole model in one call per forward, instead of one per layer.

The factors are the trained parameters and stay fp32; products under autocast want them in bf16 or fp16. The copies are
refreshed from the parameters when the first layer of a forward of the model asks, so nobody's way of writing to a
parameter can leave them stale; outside such a forward a layer casts for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_current = threading.local()
_PLAIN = (Tensor, nn.Parameter)
_NONE = (None, None)


class CastStore:
    """The copies of one model, reused from forward to forward."""

    def __init__(self) -> None:
        # by id, because hashing a tensor runs Python code; the parameter beside its copy keeps the id its own
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def copies(self) -> list[Tensor]:
        """What is kept between forwards."""
        return [copy for _, copy in self._copies.values()]

    @contextmanager
    def window(self, parameters: Callable[[], Iterable[Tensor]], dtype: torch.dtype) -> Iterator[None]:
        """While this is open, `compute_copy` answers from copies in `dtype` that are made when it is first asked."""
        before = getattr(_current, "window", None)
        _current.window = _Window(self, parameters, dtype)
        try:
            yield
        finally:
            _current.window = before

    def refreshed(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies that are fresh as of now."""
        # sharded parameters (DTensor) are of another type; their products are composed by torch itself
        parameters = [p for p in parameters if p.dtype != dtype and type(p) in _PLAIN and not p.is_meta]
        copies = []
        for p in parameters:
            _, copy = self._copies.get(id(p), _NONE)
            if copy is None or copy.dtype is not dtype or copy.shape != p.shape or copy.device != p.device:
                copy = torch.empty_like(p, dtype=dtype, requires_grad=False)
                copy.transposed = copy.t()  # the copy lives long: one view serves every forward
            copies.append(copy)
        if parameters:
            with torch.no_grad():
                torch._foreach_copy_(copies, parameters)
        self._copies = {id(p): (p, copy) for p, copy in zip(parameters, copies, strict=True)}
        return self._copies

    def __deepcopy__(self, memo: dict) -> CastStore:
        return CastStore()

    def __getstate__(self) -> dict:
        return {"_copies": {}}


class _Window:
    """One forward of a model."""

    def __init__(self, store: CastStore, parameters: Callable[[], Iterable[Tensor]], dtype: torch.dtype) -> None:
        self._store, self._parameters, self._dtype = store, parameters, dtype
        self._copies: dict[int, tuple[Tensor, Tensor]] | None = None

    def copy_of(self, parameter: Tensor) -> Tensor | None:
        if self._copies is None:
            self._copies = self._store.refreshed(self._parameters(), self._dtype)
        return self._copies.get(id(parameter), _NONE)[1]


def compute_copy(parameter: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """`parameter` in `dtype`, and whether the result outlives this call anyway (so that keeping it costs nothing)."""
    if parameter.dtype is dtype:
        return parameter, True
    if not torch.compiler.is_compiling():
        window = getattr(_current, "window", None)
        if window is not None:
            copy = window.copy_of(parameter)
            if copy is not None and copy.dtype is dtype:
                return copy, True
    return parameter.detach().to(dtype), False
