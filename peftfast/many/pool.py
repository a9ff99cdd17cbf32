"""Thousands of adapters on one base: on disk, some in host memory, a few in slots on the device.

A slot is a place in fixed tensors, padded to the largest rank, in every layer. A batch names its slots by a tensor, so
that one compiled graph or one CUDA graph serves every mix, and loading an adapter is a copy into its slot.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import close_matches, enumerate_some
from peftfast.files.experts import migrate_experts
from peftfast.files.io import load_peft_weights
from peftfast.files.state import Entry
from peftfast.layers.layer import BaseTunerLayer
from peftfast.many.routing import BASE, Routing, batch_of
from peftfast.method import method_for
from peftfast.methods.lora_stack import FactorStack, apply_stack, is_segmented
from peftfast.sites import Site, make_site
from peftfast.sites.parameter import LowRank, ParameterSite
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.parameters import check_adaptable, full_names, matching_parameters

#: Where an adapter comes from: a folder or Hub repository, or its config and tensors by file key.
Source = str | Path | tuple[PeftConfig, Mapping[str, Tensor]]
#: Layer name -> (down factor, up factor, scaling).
Factors = dict[str, tuple[Tensor, Tensor, float]]


@dataclass
class _Slot:
    index: int
    name: str | None = None
    pins: int = 0
    ready: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    last_use: Any = None  # CUDA event after which the slot may be written to


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
        ValueError: nothing matches, a Parameter that cannot be adapted, or the slots would take more than
            `max_device_bytes`.
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
        dtype: torch.dtype | None = None,
    ) -> None:
        if slots < 1 or max_rank < 1 or host_capacity < 0:
            raise ValueError(
                f"slots and max_rank must be at least 1 and host_capacity at least 0, got {slots}, {max_rank} and "
                f"{host_capacity}"
            )
        self.model = model
        self.inventory = _inventory_of(model)
        self.max_rank, self.host_capacity = max_rank, host_capacity
        self.statistics = PoolStatistics()
        target_parameters = [target_parameters] if isinstance(target_parameters, str) else list(target_parameters)
        self._parameters = matching_parameters(self.inventory, target_parameters) if target_parameters else {}
        keys = _matching(self.inventory, target_modules, target_parameters, self._parameters)
        self._stacks: dict[str, FactorStack] = {}
        self._changes: dict[str, list[LowRank]] = {}
        self.device_bytes = self._allocate(keys, slots, max_device_bytes, dtype)
        self._slots = [_Slot(i) for i in range(slots)]
        self._order: OrderedDict[str, _Slot] = OrderedDict()  # adapters in slots, least recently used first
        self._sources: dict[str, Source] = {}
        self._host: OrderedDict[str, Factors] = OrderedDict()
        self._reading: dict[str, Future] = {}
        self._changed = threading.Condition()
        self._background: ThreadPoolExecutor | None = None

    def _allocate(self, keys: list[str], slots: int, limit: int | None, dtype: torch.dtype | None) -> int:
        """Check that everything fits, then make it."""
        plan = []
        total = 0
        check_adaptable(self.inventory, self._parameters, keys)
        for key, site in self._sites(keys):
            down, up = (slot.shape for slot in site.low_rank_slots(self.max_rank).values())
            kind = dtype or site.weight.compute_dtype
            plan.append((key, down, up, kind, site.weight.device))
            total += slots * (_count(down) + _count(up) + 1) * kind.itemsize
        if limit is not None and total > limit:
            raise ValueError(
                f"{slots} slots of rank {self.max_rank} on {len(plan)} modules take {total:,} bytes, more than "
                f"max_device_bytes={limit:,}; {limit * slots // total} slots would fit"
            )
        for key, names in self._parameters.items():
            for layer in self.inventory.wrap_parameters(key, names):
                layer.site.weight.name = f"{key}.{layer.site.parameter}"
        for key, down, up, kind, device in plan:
            a = torch.zeros(slots, *down, dtype=kind, device=device)
            b = torch.zeros(slots, up[1], up[0], *up[2:], dtype=kind, device=device).transpose(1, 2)
            stack = self._stacks[key] = FactorStack(a, b, torch.zeros(slots, dtype=kind, device=device))
            self.inventory.wrap(key).store.update({"slots": self, "slot key": key})
            if self.inventory.is_nested(key):
                self._changes[key] = [LowRank(*each) for each in zip(*stack[:3], strict=True)]
        return total

    def _sites(self, keys: Iterable[str]) -> Iterator[tuple[str, Site]]:
        """What has slots, by the names that layers have in the inventory."""
        for key in keys:
            module = self.inventory.module(key)
            site = module.site if isinstance(module, BaseTunerLayer) else make_site(module)
            if not hasattr(site, "adapt_each"):
                raise ValueError(
                    f"Slots are for modules, and {key} ({type(site.module).__name__}) is adapted by Parameters of it. "
                    "Slots of experts are named in target_parameters"
                )
            yield key, site
        for key, names in self._parameters.items():
            for depth, name in enumerate(reversed(names)):  # the first is the innermost
                yield key + ".base_layer" * depth, ParameterSite(self.inventory.base_module(key), name)

    # ---- what there is -----------------------------------------------------------------------------------------------
    def register(self, name: str, source: Source) -> None:
        """Make an adapter known; nothing is read yet. A source registered anew is read anew."""
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
    @contextmanager
    def use(self, names: Sequence[str], timeout: float | None = None) -> Iterator[Tensor]:
        """While this is open, the model called from this thread gives sample i the adapter `names[i]` ("__base__" for
        none), whose slot stays where it is. Experts see batches flattened; how many tokens a sample has they know from
        the pool's own calls (`pool(...)`, `generate`, `forward`), up to 64 without.

        Yields:
            [len(names)] int64: the slots, -1 for the base model; see `forward`.

        Raises:
            ValueError: an unknown adapter, more different ones than slots. TimeoutError: no slot became free.
        """
        with self._using(names, timeout) as index:
            yield index

    @contextmanager
    def _using(self, names: Sequence[str], timeout: float | None = None, tokens: int | None = None) -> Iterator[Tensor]:
        """`use` for inputs of so many tokens a sample."""
        held = self._acquire(names, timeout)
        try:
            places = tuple([-1 if n == BASE else held[n].index for n in names])
            index = torch.tensor(places, dtype=torch.int64, device=next(iter(self._stacks.values())).scale.device)
            # eager calls on a CPU may be arranged around what the host knows anyway
            shape = {"copies": _COPIES, "tokens": tokens, "slots": self}
            seen = Routing((), index, places, **shape) if index.is_cpu else None
            with self.inventory.control.use(Routing((), index, None, **shape, seen=seen)):
                yield index
        finally:
            self._release(held)

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's output with an adapter from the pool for every sample."""
        _check_length(adapter_names, args, kwargs)
        with self._using(adapter_names, tokens=_tokens(args, kwargs)):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's `generate` with an adapter from the pool for every prompt."""
        _check_length(adapter_names, args, kwargs)
        with self._using(adapter_names, tokens=_tokens(args, kwargs)):
            return self.model.generate(*args, **kwargs)

    def forward(self, slots: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the adapter in `slots[i]` for sample i: what to compile or capture, because every mix
        is only other values in one tensor.

        Args:
            slots: [B] int64 on the model's device, from `use`, which has to be open around the call.
        """
        with self.inventory.control.use(Routing((), slots, None, tokens=_tokens(args, kwargs), slots=self)):
            return self.model(*args, **kwargs)

    def layer_forward(self, layer: BaseTunerLayer, routing: Routing, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        stack = self._stacks.get(layer.store.get("slot key"))
        if stack is not None and routing.arranges(x) and not args and not kwargs and not is_segmented(layer.site, x):
            used = len(set(routing.host))
            each = [t[:used] for t in stack[:3]]
            return routing.arranged(x, lambda x: layer.site.adapt_each(x, layer.base_layer(x), *each))
        y = layer.base_layer(x, *args, **kwargs)
        if stack is None:
            return y
        return apply_stack(layer.site, x, y, stack, routing.rows(x, (), layer.store, "a layer with slots"))

    def changes(self, layer: BaseTunerLayer) -> Sequence[LowRank]:
        """What each slot adds to the Parameter of a layer; nothing where it has none."""
        return self._changes.get(layer.store.get("slot key"), ())

    def prefetch(self, names: Iterable[str]) -> None:
        """Bring adapters nearer in the background: into host memory, and into slots that nobody uses."""
        names = [n for n in dict.fromkeys(names) if n != BASE]
        with self._changed:
            self._check_known(names)
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="adapter-pool")
        for name in names:
            self._background.submit(self._fetch_ahead, name)

    def _fetch_ahead(self, name: str) -> None:
        try:
            self._read(name)
            self._release(self._acquire([name], timeout=0.0))
        except (TimeoutError, ValueError):
            pass  # all slots are in use, or the adapter is gone; whoever asks for it will be told
        except Exception:
            return  # counted, and raised to whoever asks for the adapter

    def close(self) -> None:
        """Take the slots out of the model again."""
        if self._background is not None:
            self._background.shutdown()
        for key in reversed(self._stacks):  # layers inside others first
            layer = self.inventory.layers.get(key)
            if layer is not None:
                layer.store.pop("slots", None)
                layer.store.pop("slot key", None)
                self.inventory.unwrap(key)
        self._stacks = {}

    # ---- slots -------------------------------------------------------------------------------------------------------
    def _acquire(self, names: Sequence[str], timeout: float | None) -> dict[str, _Slot]:
        """Pin a slot for each of the adapters, loading what is not there. All slots are reserved at once, so that two
        requests can never hold what the other waits for; loads run outside the lock, and a request waits only for
        those of its own adapters, whoever loads them."""
        wanted = [n for n in dict.fromkeys(names) if n != BASE]
        mine: list[tuple[str, _Slot]] = []
        with self._changed:
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
        with self._changed:
            for slot in held.values():
                slot.pins -= 1
                if slot.pins == 0:
                    slot.last_use = _event(next(iter(self._stacks.values())).scale) if self._stacks else None
                    if slot.error is not None:
                        slot.name = None
            self._changed.notify_all()

    def _load(self, name: str, slot: _Slot) -> None:
        try:
            factors = self._read(name)
            if slot.last_use is not None:
                torch.cuda.current_stream().wait_event(slot.last_use)
            self._write(factors, slot.index)
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

    @torch.no_grad()
    def _write(self, factors: Factors, index: int) -> None:
        for key, stack in self._stacks.items():
            a, b, scale = stack[:3]
            new = factors.get(key)
            if new is None:
                scale[index] = 0.0
                b[index].zero_()
                a[index].zero_()
                continue
            down, up, value = new
            # of a stack of experts each one's ranks are padded by themselves
            experts = getattr(self.inventory.layers[key].site, "experts", 1)
            rows, r = a[index].unflatten(0, (experts, -1)), down.shape[0] // experts
            rows[:, :r].copy_(down.unflatten(0, (experts, -1)), non_blocking=True)
            rows[:, r:].zero_()
            b[index][:, : up.shape[1]].copy_(up, non_blocking=True)
            b[index][:, up.shape[1] :].zero_()
            scale[index] = value

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
                reading = self._reading[name] = Future()
                source = self._sources[name]
        if not mine:
            return reading.result()
        try:
            factors = self._factors(name, source)
        except BaseException as e:
            with self._changed:
                del self._reading[name]
            reading.set_exception(e)
            raise
        with self._changed:
            del self._reading[name]
            self.statistics.reads += 1
            if self.host_capacity and self._sources.get(name) is source:
                self._host[name] = factors
                while len(self._host) > self.host_capacity:
                    self._host.popitem(last=False)
        reading.set_result(factors)
        return factors

    def _factors(self, name: str, source: Source) -> Factors:
        """Read and check an adapter.

        Raises:
            ValueError: it is not a pair of factors at modules that have slots, or its rank is too large.
        """
        if isinstance(source, tuple):
            cfg, tensors = source
        else:
            cfg, tensors = PeftConfig.from_pretrained(str(source)), load_peft_weights(source)
        method = method_for(cfg)
        reader: Callable[..., tuple[Tensor, Tensor, float]] | None = getattr(method, "for_slot", None)
        if reader is None:
            raise ValueError(f"Adapter {name} is {method.family}, which slots cannot hold")
        left = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
        if self._parameters:
            cfg, left = self._of_experts(name, cfg, left)
        found: Factors = {}
        for key, stack in self._stacks.items():
            layer = self.inventory.layers[key]
            own = {}
            for slot_name, slot in layer.site.low_rank_slots(self.max_rank).items():
                file = f"{key}.{slot_name}" + (".weight" if slot.holder is not None else "")
                if file in left:
                    own[slot_name] = left.pop(file)
            if not own:
                continue
            try:
                # patterns of a config are for the names of Parameters
                full = layer.site.weight.name if self.inventory.is_nested(key) else key
                a, b, scale = reader(layer.site, cfg, full, own)
            except ValueError as e:
                raise ValueError(f"Adapter {name}: {e}") from e
            experts = getattr(layer.site, "experts", 1)
            if a.shape[0] % experts:
                raise ValueError(f"Adapter {name} has {a.shape[0]} ranks for {experts} experts at {key}")
            if a.shape[0] > self.max_rank * experts:
                rank = a.shape[0] // experts
                raise ValueError(f"Adapter {name} has rank {rank} at {key}; the slots take up to {self.max_rank}")
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ValueError(f"Adapter {name} has NaN or infinite values at {key}")
            found[key] = (_for_host(a, stack.a), _for_host(b, stack.b), scale)
        if left or not found:
            raise ValueError(
                f"Adapter {name} has tensors that no slot takes: {enumerate_some(left) if left else 'all of them'}. "
                f"Modules with slots: {enumerate_some(self._stacks)}"
            )
        return found

    def _of_experts(
        self, name: str, cfg: PeftConfig, tensors: Mapping[str, Tensor]
    ) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Config and tensors in this model's names and in today's layout.

        Raises:
            ValueError: the adapter adapts other Parameters than have slots.
        """
        cfg, method = copy.deepcopy(cfg), method_for(cfg)
        if hasattr(type(method), "retarget"):
            method.retarget(cfg, self.inventory.model)
        wanted = getattr(cfg, "target_parameters", None)
        # which Parameter a tensor is for follows from how layers are nested
        if wanted and matching_parameters(self.inventory, wanted) != self._parameters:
            raise ValueError(
                f"Adapter {name} has target_parameters={sorted(wanted)}; slots are for "
                f"{enumerate_some(full_names(self._parameters))}"
            )
        entries = {}
        for key in self._changes:
            layer = self.inventory.layers[key]
            for slot in layer.site.low_rank_slots(1):
                file = f"{key}.{slot}.weight"
                entries[file] = Entry(file, file, layer, slot, layer=layer)
        return cfg, migrate_experts(tensors, entries, cfg, self.inventory.model)


#: Rows a prompt may be expanded to in `generate` (beams); the pool does not see the arguments of every call.
_COPIES = tuple(range(1, 65))


def _check_length(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    batch = batch_of(args, kwargs)
    if batch is not None and batch.shape[0] != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch.shape[0]} respectively."
        )


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens a sample has, for layers that see the batch flattened."""
    batch = batch_of(args, kwargs)
    return batch.shape[1] if batch is not None and batch.dim() > 1 else None


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _for_host(tensor: Tensor, like: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=like.dtype, pin_memory=like.is_cuda)
    return copy.copy_(tensor)


def _event(like: Tensor) -> Any:
    if not like.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _inventory_of(model: nn.Module) -> Inventory:
    tuner = getattr(model, "base_model", None)
    inventory = None if tuner is None else tuner.__dict__.get("inventory")
    if inventory is not None:
        return inventory
    inventory = model.__dict__.get("_peftfast_inventory")
    if inventory is None:
        inventory = model.__dict__["_peftfast_inventory"] = Inventory(model)
    return inventory


def _matching(
    inventory: Inventory, targets: str | Iterable[str] | None, parameters: Sequence[str], found: Mapping[str, Any]
) -> list[str]:
    from peftfast.wrapping.targets import ALL_LINEAR, all_linear

    if targets is None or targets == ALL_LINEAR:
        wanted = set(all_linear(inventory.model, PeftConfig()))
        keys = [n for n in inventory.names if n in wanted]
    else:
        suffixes = (targets,) if isinstance(targets, str) else tuple(targets)
        keys = [n for n in inventory.names if any(n == s or n.endswith("." + s) for s in suffixes)]
    if parameters and not found:
        raise ValueError(f"target_parameters {parameters} match no Parameter of {type(inventory.model).__name__}")
    if not keys and not found:
        raise ValueError(f"target_modules {targets!r} match no module of {type(inventory.model).__name__}")
    return keys
