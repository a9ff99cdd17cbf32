"""Compute-dtype copies of the fp32 factors: made for a whole model in one call per forward, instead of one per layer.

The factors are the trained parameters and stay fp32; products under autocast want them in bf16 or fp16. The copies are
refreshed from the parameters when the first layer of a forward of the model asks, so nobody's way of writing to a
parameter can leave them stale; outside such a forward a layer casts for itself. So does a backward pass before which
another forward has refreshed them, in which the parameters may have been others (weights averaged over the steps, say).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftfast.ops.function import as_dtype
from peftfast.watch import Place, Watch

_current = threading.local()
_PLAIN = (Tensor, nn.Parameter)
_NONE = (None, None)
Find = Callable[[], tuple[Sequence[Tensor], Sequence[Place]]]
_LOOKS = attrgetter("dtype", "shape", "device")


class _Copies(NamedTuple):
    """What a forward had."""

    asked: tuple | None  # what was copied, as `_LOOKS` sees it
    # by id, because hashing a tensor runs Python code; the parameter beside its copy keeps the id its own
    by_id: dict[int, tuple[Tensor, Tensor]]
    both: list[tuple[Tensor, ...]]  # all parameters, all copies


_NO_COPIES = _Copies(None, {}, [])


class CastStore:
    """The copies of one model, reused from forward to forward."""

    def __init__(self) -> None:
        self._copies = _NO_COPIES  # one attribute, so that threads never see halves of two
        self._found: tuple[Sequence[str], Watch, Sequence[Tensor]] | None = None  # what to copy

    @property
    def copies(self) -> list[Tensor]:
        """What is kept between forwards."""
        return [copy for _, copy in self._copies.by_id.values()]

    @contextmanager
    def window(self, names: Sequence[str], find: Find, dtype: torch.dtype) -> Iterator[None]:
        """While this is open, `compute_copy` answers from copies in `dtype` that are made when it is first asked.

        Args:
            names: of the adapters.
            find: gives their Parameters, and what has to stay for them to be these.
        """
        before = getattr(_current, "window", None)
        _current.window = _Window(self, names, find, dtype)
        try:
            yield
        finally:
            _current.window = before

    def refreshed(self, names: Sequence[str], find: Find, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies that are fresh as of now."""
        parameters = self._parameters(names, find)
        asked = (dtype, [*map(id, parameters)], [*map(_LOOKS, parameters)])
        kept = self._copies
        if asked != kept.asked:  # every forward comes by here, and in most nothing but values has changed
            made = self._made_for(parameters, dtype)
            kept = self._copies = _Copies(asked, made, [*zip(*made.values(), strict=True)])
        if kept.both:
            sources, copies = kept.both
            with torch.no_grad():
                torch._foreach_copy_(copies, sources)
        return kept.by_id

    def _parameters(self, names: Sequence[str], find: Find) -> Sequence[Tensor]:
        if self._found is not None:
            known, watch, parameters = self._found
            if known == names and watch.holds():
                return parameters
        parameters, entries = find()
        found = entries and all(value is not None for _, _, value in entries)  # what is kept elsewhere is not seen
        self._found = ([*names], Watch(entries), parameters) if found else None
        return parameters

    def _made_for(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies whose values are not there yet."""
        made, known = {}, self._copies.by_id
        for p in parameters:
            # sharded parameters (DTensor) are of another type; their products are composed by torch itself
            if p.dtype == dtype or type(p) not in _PLAIN or p.is_meta:
                continue
            _, copy = known.get(id(p), _NONE)
            if copy is None or copy.dtype is not dtype or copy.shape != p.shape or copy.device != p.device:
                with torch.inference_mode(False):  # a tensor of that mode could not be written to in another
                    copy = torch.empty_like(p, dtype=dtype, requires_grad=False)
                    copy.transposed = copy.t()  # the copy lives long: one view serves every forward
            made[id(p)] = (p, copy)
        return made

    def __getstate__(self) -> dict:  # of copies too
        return {"_copies": _NO_COPIES, "_found": None}


class _Window:
    """One forward of a model."""

    def __init__(self, store: CastStore, names: Sequence[str], find: Find, dtype: torch.dtype) -> None:
        self._store, self._names, self._find, self.dtype = store, names, find, dtype
        self._copies: dict[int, tuple[Tensor, Tensor]] | None = None

    def copies(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Parameters and their copies, by the parameter's id."""
        copies = self._copies
        if copies is None:
            copies = self._copies = self._store.refreshed(self._names, self._find, self.dtype)
        return copies


#: A copy that outlives the call anyway, so that a backward pass may have it at no cost, and torch's count of how often
#: it had been written to.
Lasting = tuple[Tensor, int] | None


def compute_copy(parameter: Tensor, dtype: torch.dtype) -> tuple[Tensor, Lasting]:
    """`parameter` in `dtype`, and what `copy_again` wants of it."""
    if parameter.dtype is dtype:
        return parameter, None
    if not torch.compiler.is_compiling():
        window = getattr(_current, "window", None)
        if window is not None and window.dtype is dtype:
            found = window.copies().get(id(parameter))
            if found is not None:
                copy = found[1]
                return copy, (copy, copy._version)
    return parameter.detach().to(dtype), None


def copy_again(lasting: Lasting, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """In the backward pass, what the forward pass had of `compute_copy`: cast again, which is rank-sized, unless it is
    still there."""
    if lasting is not None:
        copy, version = lasting
        if copy._version == version:
            return copy
    return as_dtype(parameter, dtype)


def compute_copies(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Lasting, Lasting]]:
    """`compute_copy` of both."""
    down, a_lasting = compute_copy(a, dtype)
    up, b_lasting = compute_copy(b, dtype)
    return down, up, (a_lasting, b_lasting)


def copies_again(lasting: tuple[Lasting, Lasting], a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`copy_again` of both."""
    return copy_again(lasting[0], a, dtype), copy_again(lasting[1], b, dtype)


def compute_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Lasting, Lasting]]:
    """`compute_copies`, the first two transposed, in fewer steps; outside compilers."""
    window = None if a.dtype is dtype else getattr(_current, "window", None)
    if window is not None and window.dtype is dtype:
        copies = window.copies()
        found_a, found_b = copies.get(id(a)), copies.get(id(b))
        if found_a is not None and found_b is not None:
            down, up = found_a[1], found_b[1]
            return down.transposed, up.transposed, ((down, down._version), (up, up._version))
    down, up, lasting = compute_copies(a, b, dtype)
    return down.mT, up.mT, lasting
