"""What all layers of one model share about its adapters: the routing in force, and what is kept from mix to mix."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from peftfast.rows.mix import Kept, Mixes, Verdicts, groups_of
from peftfast.rows.routing import Routing

#: For how many sets of adapters a model keeps what layers make of them; for one more the oldest is made again.
MIXES = 2
#: Where adapters are promised not to change: after how many mixed forwards it is looked whether they did.
LOOKS_EVERY = 128


class _Batch:
    """What layers have to know of the batch that they compute.

    Args:
        notes: by adapter.
    """

    __slots__ = ("routing", "notes", "__weakref__")

    def __init__(self, routing: Routing | None, notes: Mapping[str, Any]) -> None:
        self.routing, self.notes = routing, notes

    def is_that_of(self, other: _Batch) -> bool:
        return self.routing is other.routing and self.notes is other.notes


_NO_NOTES: Mapping[str, Any] = MappingProxyType({})
_PLAIN = _Batch(None, _NO_NOTES)
_NO_BATCH = weakref.ref(_PLAIN), ""

_SEVERAL = (
    "One backward pass goes through two batches with different `adapter_names` or `alora_offsets` (or one with and one "
    "without). With gradient checkpointing there is no telling which batch a layer is run again for; call backward for "
    "each batch."
)
_SWITCHED = (
    "Adapters were switched (`set_adapter`, `disable_adapter`) between a forward and its backward pass. Gradient "
    "checkpointing runs layers again in the backward pass, which would be with other adapters. Call backward before "
    "switching, name adapters by `adapter_names` in one batch, or compute what needs no gradient under torch.no_grad()."
)


class _ThisThread(threading.local):
    def __init__(self) -> None:  # runs in every thread: an attribute that comes and goes would cost compilers a graph
        self.routing: Routing | None = None
        self.notes: Mapping[str, Any] = _NO_NOTES


class _AnyModel(threading.local):
    def __init__(self) -> None:
        self.routes = 0  # in this thread, how many calls: those of two models may end in another order than they began


#: What a layer asks before it asks its own model's control: of that a graph would ask for every layer, in Python and in
#: every call, whether it is the model's.
ANY_MODEL = _AnyModel()
#: By backward pass and control, one that fails until its graph is gone: the batch, and why nothing can be run again.
RECOMPUTING: dict[tuple[int, Control], tuple[weakref.ref[_Batch], str]] = {}


class Control:
    """The routing that is in force and what was noted of the inputs, shared by all layers of one model and separate for
    every thread."""

    def __init__(self) -> None:
        self._local = _ThisThread()
        self._has_followed = False
        self._mixes: dict[tuple[str, ...], Mixes] = {}
        self._promises = self._unseen = 0
        self.outdated = 0  # how often what was made of factors was said to be
        self._entering = threading.Lock()

    @property
    def routing(self) -> Routing | None:
        routing = self._local.routing
        if routing is None and RECOMPUTING:
            routing = self._recomputed().routing
        # compiled layers of a model that is not compiled itself must not see what the host knows
        if routing is None or torch.compiler.is_compiling() or routing.seen is None:
            return routing
        return routing.seen

    def noted(self, name: str) -> Any:
        """What the method of adapter `name` noted of the inputs of the call under way; None: nothing."""
        notes = self._local.notes
        if not notes and RECOMPUTING:
            notes = self._recomputed().notes
        return notes.get(name)

    @contextmanager
    def noting(self, notes: Mapping[str, Any]) -> Iterator[None]:
        """While this is open, layers called from this thread find these notes."""
        before = self._local.notes
        self._local.notes = notes
        try:
            yield
        finally:
            self._local.notes = before

    def is_noting(self, notes: Mapping[str, Any]) -> bool:
        """Whether it is these that layers called from this thread find."""
        return self._local.notes is notes

    def _recomputed(self) -> _Batch:
        """The batch that a layer is run again for: gradient checkpointing does that, in the engine's own thread.

        Raises:
            RuntimeError: the backward pass under way goes through several batches, or one of other active adapters.
        """
        own = torch._C._current_graph_task_id(), self
        batch, refused = RECOMPUTING.get(own, _NO_BATCH)
        if refused:
            del RECOMPUTING[own]  # this backward pass ends here, without what it does at its end
            raise RuntimeError(refused)
        return batch() or _PLAIN

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        """While this is open, layers called from this thread follow `routing`."""
        before = self._local.routing
        self._local.routing = routing
        ANY_MODEL.routes += 1
        try:
            yield
        finally:
            self._local.routing = before
            ANY_MODEL.routes -= 1

    def verdicts(self, routing: Routing) -> Verdicts:
        """What is known in this forward about the mixes of the adapters it names."""
        names = routing.names
        mixes = self._mixes.get(names)
        if mixes is None:
            mixes = {}
            self._mixes = {**dict(list(self._mixes.items())[1 - MIXES :]), names: mixes}
        known = routing.verdicts
        if known is None or known.mixes is not mixes:
            known = routing.verdicts = Verdicts(mixes, trusting=self._promises > 0)
            if self._promises:
                self._unseen += 1
                if self._unseen >= LOOKS_EVERY:
                    self._look()
        return known

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """While this is open, in whatever thread, adapters are taken to be what they were at its start."""
        with self._entering:
            if not self._promises:
                self._drop_changed()
                self._unseen = 0
            self._promises += 1
        try:
            yield
        finally:
            with self._entering:
                self._promises -= 1
        self._look()  # not where another error is on its way

    def _look(self) -> None:
        self._unseen = 0
        changed = self._drop_changed()
        if changed:
            raise RuntimeError(
                f"Adapters were changed while they were promised not to be (`unchanging_adapters`): {changed[0]}"
                f"{f' and {len(changed) - 1} more modules' if len(changed) > 1 else ''}. Up to {LOOKS_EVERY} mixed "
                "batches before this may have been computed with what they were before; from here on they are right."
            )

    def _drop_changed(self) -> list[str]:
        """Keep nothing that was made of something that has changed since; says of what."""
        groups = [group for mixes in list(self._mixes.values()) for group in groups_of(mixes)]
        changed = [group for group in groups if group.kept is not None and not group.kept.watch.holds()]
        for group in changed:
            group.kept = None
        return [f"{group[0].key} (one of {', '.join(a.name for a in group)})" for group in changed]

    def kept(self, layer: Any) -> list[Kept | None]:
        """What methods keep for a layer."""
        own = [mixes[here] for mixes in self._mixes.values() if (here := weakref.ref(layer)) in mixes]
        return [step.adapters.kept for mix in own for step in mix.steps]

    def forget(self, layer: Any, name: str | None = None) -> None:
        """Keep nothing for a layer that adapter `name` is part of; None: nothing at all."""
        for names, mixes in self._mixes.items():
            if name is None or name in names:
                mixes.pop(weakref.ref(layer), None)

    def outdate(self) -> None:
        """Keep nothing that was made of factors, which may have been written to without a trace."""
        self.outdated += 1
        for mixes in list(self._mixes.values()):
            for group in groups_of(mixes):
                group.kept = None

    def follow(self, output: Any, in_force: Callable[[], list[str]] | None = None) -> None:
        """Let layers that are run again during the backward pass from `output` follow what is in force now.

        Args:
            in_force: says which adapters act without a routing, if layers will be run again: with those of then.
        """
        if torch.compiler.is_compiling():  # whatever a compiled graph computes again is in the graph
            return
        batch = _Batch(self._local.routing, self._local.notes)
        plain = batch.routing is None and not batch.notes
        if not torch.is_grad_enabled() or (plain and not self._has_followed and in_force is None):
            return
        self._has_followed |= not plain
        acting = in_force() if in_force is not None and batch.routing is None else None

        def arrived(grad: Tensor) -> None:
            switched = acting is not None and acting != in_force()
            if plain and not switched and not self._has_followed:
                return
            own = torch._C._current_graph_task_id(), self

            def end(*_: Any) -> None:
                RECOMPUTING.pop(own, None)

            known, refused = RECOMPUTING.setdefault(own, (weakref.ref(batch, end), ""))
            if switched:
                RECOMPUTING[own] = known, _SWITCHED
            elif not refused and not batch.is_that_of(known() or batch):
                RECOMPUTING[own] = known, _SEVERAL
            torch.autograd.Variable._execution_engine.queue_callback(end)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(arrived)

    def __reduce__(self) -> tuple:
        return Control, ()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
