"""Thousands of adapters on one base: on disk, some in host memory, a few in slots on the device.

A slot is a place in fixed tensors, padded to the largest rank, in every layer. A batch names its slots by a tensor, so
that one compiled graph or one CUDA graph serves every mix, and loading an adapter is a copy into its slot.
"""

from __future__ import annotations

import os
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.errors import close_matches, enumerate_some
from peftfast.many.router import check_length, check_unmerged
from peftfast.many.slots import Factors, Slots, Source
from peftfast.rows.routing import BASE, Routing, batch_of, tokens_of
from peftfast.rules import integer, number, optional, sequence, text, torch_dtype
from peftfast.wrapping.inventory import inventory_of


@dataclass
class _Slot:
    index: int
    name: str | None = None
    pins: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    # CUDA events by stream: of what was written to the slot last, and of all that has used that since
    written: dict[Any, Any] = field(default_factory=dict)
    uses: dict[Any, Any] = field(default_factory=dict)


@dataclass
class PoolStatistics:
    """Counts since the pool was made: requests that found their adapter in a slot, copies into slots, adapters that
    made room for others, adapters read from their source, and loads that failed."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    reads: int = 0
    failures: int = 0


class AdapterPool:
    """Adapters of one base model behind a fixed number of device slots; safe under threads.

    Args:
        model: a base model, or one with adapters; adapted modules are replaced, weights are not touched.
        slots: how many adapters can be in use at once.
        target_modules: suffixes of the modules to have slots; "all-linear" or None: every linear layer but the head.
        target_parameters: suffixes of experts' Parameters to have slots; what adapters adapt of Parameters has to be
            exactly these, or none.
        max_rank: the largest rank a slot takes.
        host_capacity: how many adapters stay in host memory, least recently used out.
        max_device_bytes: refuse to take more device memory than this.
        dtype: of the slots; None: the base's, fp32 for a quantised base.

    Raises:
        ValueError: nothing matches, a Parameter that cannot be adapted, a count out of range, or the slots would take
            more than `max_device_bytes`. TypeError: a count that is no integer.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        *,
        target_modules: str | Iterable[str] | None = None,
        target_parameters: Iterable[str] = (),
        max_rank: int = 16,
        host_capacity: int = 64,
        max_device_bytes: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        slots, max_rank = integer(1).enforce(slots, "slots"), integer(1).enforce(max_rank, "max_rank")
        host_capacity = integer(0).enforce(host_capacity, "host_capacity")
        max_device_bytes = optional(number(0)).enforce(max_device_bytes, "max_device_bytes")
        dtype = optional(torch_dtype(floating=True)).enforce(dtype, "dtype")
        if target_modules is not None and not isinstance(target_modules, str):
            target_modules = _names(target_modules, "target_modules")
        target_parameters = _names(target_parameters, "target_parameters")
        self.model = model
        self.inventory = inventory_of(model)
        self.max_rank, self.host_capacity = max_rank, host_capacity
        self.statistics = PoolStatistics()
        self._places = Slots(
            self.inventory, slots, target_modules, target_parameters, max_rank, max_device_bytes, dtype
        )
        self.device_bytes = self._places.device_bytes
        self._slots = [_Slot(i) for i in range(slots)]
        self._order: OrderedDict[str, _Slot] = OrderedDict()  # adapters in slots, least recently used first
        self._sources: dict[str, Source] = {}
        self._host: OrderedDict[str, Factors] = OrderedDict()
        self._reading: dict[str, Future] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._background: ThreadPoolExecutor | None = None

    # ---- what there is -----------------------------------------------------------------------------------------------
    def register(self, name: str, source: Source) -> None:
        """Make an adapter known; nothing is read yet. A source registered anew is read anew."""
        if not isinstance(name, str) or not isinstance(source, (str, os.PathLike, tuple)):
            raise TypeError(
                "register(name, source) takes an adapter's name, and a folder, a Hub repository or (config, tensors), "
                f"in this order; got {reprlib.repr(name)} and {reprlib.repr(source)}"
            )
        if name == BASE:
            raise ValueError(f"{BASE!r} means the base model and cannot be an adapter's name")
        with self._changed:
            if name in self._order and self._order[name].pins:
                raise ValueError(f"Adapter {name} is in use; its source cannot change now")
            self._sources[name] = source
            self._forget(name)

    def unregister(self, name: str) -> None:
        """Forget an adapter that is not in use."""
        with self._changed:
            self._check_known([name])
            if name in self._order and self._order[name].pins:
                raise ValueError(f"Adapter {name} is in use and cannot be taken out")
            del self._sources[name]
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._host.pop(name, None)
        self._reading.pop(name, None)  # whoever asks from now on does not wait for what is being read of it
        slot = self._order.pop(name, None)
        if slot is not None:
            slot.name = None
            self._changed.notify_all()

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._sources:
                raise ValueError(
                    f"Adapter {name} is not registered in the pool.{close_matches(name, self._sources)} "
                    f"{len(self._sources)} are."
                )

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have slots; those of several Parameters of one module are inside one another."""
        return self._places.layers

    @property
    def in_slots(self) -> list[str]:
        """Adapters on the device, least recently used first."""
        with self._changed:
            return list(self._order)

    @property
    def pinned(self) -> int:
        """How many slots are in use now."""
        with self._changed:
            return sum(slot.pins > 0 for slot in self._slots)

    # ---- using it ----------------------------------------------------------------------------------------------------
    def use(self, names: Sequence[str], timeout: float | None = None) -> AbstractContextManager[Tensor]:
        """While this is open, the model called from this thread gives sample i the adapter `names[i]` ("__base__" for
        none), whose slot stays where it is. Experts see batches flattened; how many tokens a sample has they know from
        the pool's own calls (`pool(...)`, `generate`, `forward`), up to 64 without.

        Yields:
            [len(names)] int64: the slots, -1 for the base model; see `forward`.

        Raises:
            ValueError: an unknown adapter, more different ones than slots, or merged adapters in the model.
            TypeError: one name instead of a list. TimeoutError: no slot became free. RuntimeError: the pool is closed,
                or an adapter could not be loaded.
        """
        return self._using(names, timeout)

    @contextmanager
    def _using(
        self, names: Sequence[str], timeout: float | None = None, batch: Tensor | None = None
    ) -> Iterator[Tensor]:
        """`use` for the samples of `batch`, if that is known."""
        if isinstance(names, str):
            raise TypeError(f"Adapters are named one for each sample, in a list, got {names!r}")
        check_length(len(names), batch)
        check_unmerged(self.inventory)
        self._check_open()
        self._places.check_in_place()
        held = self._acquire(names, timeout)
        try:
            places = tuple([-1 if n == BASE else held[n].index for n in names])
            index = torch.tensor(places, dtype=torch.int64, device=self._places.device)
            # eager calls on a CPU may be arranged around what the host knows anyway
            shape = {"copies": _COPIES, "tokens": tokens_of(batch), "slots": self._places}
            seen = Routing((), index, places, **shape) if index.is_cpu else None
            with self.inventory.control.use(Routing((), index, None, **shape, seen=seen)):
                yield index
        finally:
            self._release(held)

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's output with an adapter from the pool for every sample."""
        with self._using(adapter_names, batch=batch_of(args, kwargs)):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's `generate` with an adapter from the pool for every prompt."""
        with self._using(adapter_names, batch=batch_of(args, kwargs)):
            return self.model.generate(*args, **kwargs)

    def forward(self, slots: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the adapter in `slots[i]` for sample i: what to compile or capture, because every mix
        is only other values in one tensor.

        Args:
            slots: [B] int64 on the model's device, from `use`, which has to be open around the call.
        """
        self._check_open()
        tokens = tokens_of(batch_of(args, kwargs))
        with self.inventory.control.use(Routing((), slots, None, tokens=tokens, slots=self._places)):
            return self.model(*args, **kwargs)

    def prefetch(self, names: Iterable[str]) -> None:
        """Bring adapters nearer in the background: into host memory, and into slots that nobody uses."""
        if isinstance(names, str):
            raise TypeError(f"Adapters to prefetch are given as a list of names, got {names!r}")
        names = [n for n in dict.fromkeys(names) if n != BASE]
        with self._changed:
            self._check_open()
            self._check_known(names)
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="adapter-pool")
            for name in names:
                self._background.submit(self._fetch_ahead, name)

    def _fetch_ahead(self, name: str) -> None:
        try:
            self._read(name)
            self._release(self._acquire([name], timeout=0.0))
        except Exception:
            pass  # all slots are in use, or the adapter is gone, or damaged: whoever asks for it will be told

    def close(self) -> None:
        """Take the slots out of the model again; from then on the pool serves nothing.

        Raises:
            RuntimeError: slots are in use.
        """
        with self._changed:
            background, self._background = self._background, None
        if background is not None:
            background.shutdown(cancel_futures=True)  # what is being fetched ahead holds a slot
        with self._changed:
            in_use = [slot.name for slot in self._slots if slot.pins]
            if in_use:
                raise RuntimeError(f"Adapters {enumerate_some(in_use)} are in use; the pool cannot be closed now")
            self._closed = True
        self._places.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("This pool is closed: its slots are out of the model. Make a new AdapterPool")

    # ---- slots -------------------------------------------------------------------------------------------------------
    def _acquire(self, names: Sequence[str], timeout: float | None) -> dict[str, _Slot]:
        """Pin a slot for each of the adapters, loading what is not there. All slots are reserved at once, so that two
        requests can never hold what the other waits for; loads run outside the lock, and a request waits only for
        those of its own adapters, whoever loads them."""
        wanted = [n for n in dict.fromkeys(names) if n != BASE]
        mine: list[tuple[str, _Slot]] = []
        with self._changed:
            self._check_open()  # it may have been closed in the meantime
            self._check_known(wanted)
            if len(wanted) > len(self._slots):
                raise ValueError(f"A batch of {len(wanted)} different adapters needs as many slots, the pool has "
                                 f"{len(self._slots)}")  # fmt: skip
            if not self._changed.wait_for(lambda: self._room_for(wanted), timeout):
                raise TimeoutError(f"No slot became free for {enumerate_some(wanted)} in {timeout} s")
            held: dict[str, _Slot] = {}
            for name in wanted:  # those that are here first, so that they do not make room for the others
                slot = self._order.get(name)
                if slot is not None:
                    slot.pins += 1
                    self._order.move_to_end(name)
                    held[name] = slot
                    self.statistics.hits += 1
            for name in wanted:
                if name not in held:
                    slot = self._take_free()
                    slot.name, slot.pins, slot.error, slot.ready = name, 1, None, threading.Event()
                    self._order[name] = held[name] = slot
                    mine.append((name, slot))
        try:
            for name, slot in mine:
                self._load(name, slot)
            for name in wanted:
                slot = held[name]
                slot.ready.wait()
                if slot.error is not None:
                    raise RuntimeError(f"Adapter {name} could not be loaded: {slot.error}") from slot.error
                _await(slot.written)  # whoever loaded it, on whatever stream
        except BaseException as e:
            for _, slot in mine:
                if not slot.ready.is_set():  # loads that were not begun
                    self._fail(slot, e)
            self._release(held)
            raise
        return held

    def _room_for(self, wanted: Sequence[str]) -> bool:
        missing = sum(n not in self._order for n in wanted)
        here = {n for n in wanted if n in self._order}
        free = sum(s.name is None or (s.pins == 0 and s.name not in here) for s in self._slots)
        return free >= missing

    def _take_free(self) -> _Slot:
        for slot in self._slots:
            if slot.name is None and slot.pins == 0:
                return slot
        name, slot = next((n, s) for n, s in self._order.items() if s.pins == 0)
        del self._order[name]
        self.statistics.evictions += 1
        return slot

    def _release(self, held: Mapping[str, _Slot]) -> None:
        events = _events(self._places.devices)
        with self._changed:
            for slot in held.values():
                slot.uses.update(events)
                slot.pins -= 1
                if slot.pins == 0 and slot.error is not None:
                    slot.name = None
            self._changed.notify_all()

    def _load(self, name: str, slot: _Slot) -> None:
        try:
            factors = self._read(name)
            _await(slot.uses)
            self._places.write(factors, slot.index)
            slot.written, slot.uses = _events(self._places.devices), {}
        except BaseException as e:
            self._fail(slot, e)
            raise
        with self._changed:
            self.statistics.loads += 1
        slot.ready.set()

    def _fail(self, slot: _Slot, error: BaseException) -> None:
        """The slot holds nothing; whoever waits for it is told, and it is free when they have let go of it."""
        with self._changed:
            if slot.name in self._order and self._order[slot.name] is slot:
                del self._order[slot.name]
            slot.error = error
            self.statistics.failures += 1
        slot.ready.set()

    # ---- host memory -------------------------------------------------------------------------------------------------
    def _read(self, name: str) -> Factors:
        """An adapter from host memory, or from its source; threads that want the same one read it once."""
        with self._changed:
            factors = self._host.get(name)
            if factors is not None:
                self._host.move_to_end(name)
                return factors
            reading = self._reading.get(name)
            mine = reading is None
            if mine:
                source = self._sources[name]  # none if it was prefetched and is unregistered now: nobody may wait then
                reading = self._reading[name] = Future()
        if not mine:
            return reading.result()
        try:
            factors = self._places.read(name, source)
        except BaseException as e:
            with self._changed:
                self._end_reading(name, reading)
            reading.set_exception(e)
            raise
        with self._changed:
            self.statistics.reads += 1
            if self._end_reading(name, reading) and self.host_capacity:
                self._host[name] = factors
                while len(self._host) > self.host_capacity:
                    self._host.popitem(last=False)
        reading.set_result(factors)
        return factors

    def _end_reading(self, name: str, reading: Future[Factors]) -> bool:
        """Whether the source that was read is still the one registered."""
        current = self._reading.get(name) is reading
        if current:
            del self._reading[name]
        return current


#: Rows a prompt may be expanded to in `generate` (beams); the pool does not see the arguments of every call.
_COPIES = tuple(range(1, 65))


def _names(given: str | Iterable[str], argument: str) -> list[str]:
    """Several names, or one, as a list; TypeError for what are none."""
    listed = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else given
    return sequence(text()).enforce(listed, argument)


def _events(devices: Iterable[torch.device]) -> dict[Any, Any]:
    """By stream of this thread's, one on every GPU, an event of all that it has been given so far."""
    events = {}
    for device in devices:
        if device.type == "cuda":
            stream, event = torch.cuda.current_stream(device), torch.cuda.Event()
            event.record(stream)
            events[stream] = event
    return events


def _await(events: Mapping[Any, Any]) -> None:
    """Let this thread's streams go on after these events; the host does not wait."""
    for stream, event in events.items():
        torch.cuda.current_stream(stream.device).wait_event(event)
