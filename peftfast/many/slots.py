"""Places for adapters in fixed tensors: what they are, and how an adapter comes into one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from peftfast.config import PeftConfig
from peftfast.errors import AdapterMismatchWarning, enumerate_some, warn
from peftfast.files.entry import Entry
from peftfast.files.experts import migrate_experts
from peftfast.files.io import read_adapter
from peftfast.files.state import without_own_embeddings
from peftfast.keys import ends_of, in_base
from peftfast.layers.layer import BaseTunerLayer, site_of
from peftfast.method import method_for, retarget
from peftfast.methods.lora.stack import FactorStack, apply_stack
from peftfast.ops.experts import LowRank
from peftfast.ops.finite import is_finite
from peftfast.rows.routing import Routing
from peftfast.sites import Site
from peftfast.sites.parameter import ParameterSite
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.parameters import check_adaptable, full_names, matching_parameters
from peftfast.wrapping.targets import ALL_LINEAR, all_linear

#: Where an adapter comes from: a folder or Hub repository, or its config and tensors by file key.
Source = str | Path | tuple[PeftConfig, Mapping[str, Tensor]]
#: Layer name -> (down factor, up factor, scaling).
Factors = dict[str, tuple[Tensor, Tensor, float]]


class Slots:
    """A number of places for low-rank adapters in every layer that has slots, padded to the largest rank. Which of them
    is whose, and when it may be written to, is for the owner to know (`pool.py`).

    Args:
        inventory: of the model; adapted modules are replaced, weights are not touched.
        count, target_modules, target_parameters, max_rank, max_device_bytes, dtype: see `AdapterPool`.

    Attributes:
        device_bytes: what the tensors take.

    Raises:
        ValueError: see `AdapterPool`; nothing was made or replaced then.
    """

    def __init__(
        self,
        inventory: Inventory,
        count: int,
        target_modules: str | Iterable[str] | None,
        target_parameters: Sequence[str],
        max_rank: int,
        max_device_bytes: int | None,
        dtype: torch.dtype | None,
    ) -> None:
        self._inventory, self._max_rank = inventory, max_rank
        self._parameters = matching_parameters(inventory, target_parameters) if target_parameters else {}
        keys = _matching(inventory, target_modules, target_parameters, self._parameters)
        self._stacks: dict[str, FactorStack] = {}
        self._changes: dict[str, list[LowRank]] = {}
        self.device_bytes = self._allocate(keys, count, max_device_bytes, dtype)
        self.devices = {stack.scale.device for stack in self._stacks.values()}

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have slots, as the inventory has them."""
        return list(self._stacks)

    @property
    def device(self) -> torch.device:
        """Of the first layer's."""
        return next(iter(self._stacks.values())).scale.device

    def check_in_place(self) -> None:
        """RuntimeError if the layers were taken out of the model."""
        if not self._stacks.keys() <= self._inventory.layers.keys():
            raise RuntimeError(
                "The model was unloaded, and with the adapters its slots are out of it. Make a new AdapterPool"
            )

    def _allocate(self, keys: list[str], count: int, limit: int | None, dtype: torch.dtype | None) -> int:
        """Check that everything fits, then make it; how many bytes that are."""
        plan = []
        total = 0
        check_adaptable(self._inventory, self._parameters, keys)
        for key, site in self._sites(keys):
            down, up = (slot.shape for slot in site.low_rank_slots(self._max_rank).values())
            kind = dtype or site.weight.compute_dtype
            plan.append((key, down, up, kind, site.weight.device))
            total += count * (_count(down) + _count(up) + 1) * kind.itemsize
        if limit is not None and total > limit:
            raise ValueError(
                f"{count} slots of rank {self._max_rank} on {len(plan)} modules take {total:,} bytes, more than "
                f"max_device_bytes={limit:,}; {limit * count // total} slots would fit"
            )
        for key, down, up, kind, device in plan:  # all of it before any is put in place: there may be no memory for it
            a = torch.zeros(count, *down, dtype=kind, device=device)
            b = torch.zeros(count, up[1], up[0], *up[2:], dtype=kind, device=device).transpose(1, 2)
            self._stacks[key] = FactorStack(a, b, torch.zeros(count, dtype=kind, device=device))
        for key, names in self._parameters.items():
            for layer in self._inventory.wrap_parameters(key, names):
                layer.site.weight.name = f"{key}.{layer.site.parameter}"
        for key, stack in self._stacks.items():
            store = self._inventory.wrap(key).store
            store["slot key"] = key
            store.setdefault("slots", WeakSet()).add(self)  # other pools may have theirs here
            if self._inventory.is_nested(key):
                self._changes[key] = [LowRank(*each) for each in zip(*stack[:3], strict=True)]
        return total

    def _sites(self, keys: Iterable[str]) -> Iterator[tuple[str, Site]]:
        """What has slots, by the names that layers have in the inventory."""
        for key in keys:
            site = site_of(self._inventory.module(key))
            if not site.adapts_output:
                raise ValueError(
                    f"Slots are for modules, and {key} ({type(site.module).__name__}) is adapted by Parameters of it. "
                    "Slots of experts are named in target_parameters"
                )
            yield key, site
        for key, names in self._parameters.items():
            for depth, name in enumerate(reversed(names)):  # the first is the innermost
                yield key + ".base_layer" * depth, ParameterSite(self._inventory.base_module(key), name)

    def layer_forward(self, layer: BaseTunerLayer, routing: Routing, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What a layer gives for a batch whose `routing` names slots."""
        stack = self._stacks.get(layer.store.get("slot key"))
        if stack is not None and routing.arranges(x) and not args and not kwargs and not layer.site.segmented(x):
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

    @torch.no_grad()
    def write(self, factors: Factors, index: int) -> None:
        """Put an adapter into slot `index`."""
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
            experts = self._inventory.layers[key].site.experts
            rows, r = a[index].unflatten(0, (experts, -1)), down.shape[0] // experts
            rows[:, :r].copy_(down.unflatten(0, (experts, -1)), non_blocking=a.is_cuda)
            rows[:, r:].zero_()
            b[index][:, : up.shape[1]].copy_(up, non_blocking=b.is_cuda)
            b[index][:, up.shape[1] :].zero_()
            scale[index] = value

    def read(self, name: str, source: Source) -> Factors:
        """An adapter from its source, checked, in host memory and in the slots' dtype.

        Raises:
            ValueError: it is not a pair of factors at modules that have slots, or its rank is too large.
        """
        if isinstance(source, tuple):
            cfg, tensors = source
        else:
            stored = read_adapter(source)
            cfg, tensors = stored.config, stored.tensors
            if stored.changes:
                warn(f"Adapter {name}: {' '.join(stored.changes)}", AdapterMismatchWarning)
        method = method_for(cfg)
        reader: Callable[..., tuple[Tensor, Tensor, float]] | None = getattr(method, "for_slot", None)
        if reader is None:
            raise ValueError(f"Adapter {name} is {method.family}, which slots cannot hold")
        idle = getattr(method, "only_for_training", ())
        left = {in_base(k): v for k, v in tensors.items() if not any(f".{slot}." in f"{k}." for slot in idle)}
        if self._parameters:
            cfg, left = self._of_experts(name, cfg, left)
        found: Factors = {}
        for key, stack in self._stacks.items():
            layer = self._inventory.layers[key]
            own = {}
            for slot_name, slot in layer.site.low_rank_slots(self._max_rank).items():
                file = f"{key}.{slot_name}" + (".weight" if slot.holder is not None else "")
                if file in left:
                    own[slot_name] = left.pop(file)
            if not own:
                continue
            try:
                # patterns of a config are for the names of Parameters
                full = layer.site.weight.name if self._inventory.is_nested(key) else key
                a, b, scale = reader(layer.site, cfg, full, own)
            except ValueError as e:
                raise ValueError(f"Adapter {name}: {e}") from e
            _check_factors(f"Adapter {name} has", key, a, b, layer.site.experts, self._max_rank)
            found[key] = (_for_host(a, stack.a), _for_host(b, stack.b), scale)
        left = without_own_embeddings(self._inventory.model, left)
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
        cfg = copy.deepcopy(cfg)
        retarget(cfg, self._inventory.model)
        wanted = getattr(cfg, "target_parameters", None)
        # which Parameter a tensor is for follows from how layers are nested
        if wanted and matching_parameters(self._inventory, wanted) != self._parameters:
            raise ValueError(
                f"Adapter {name} has target_parameters={sorted(wanted)}; slots are for "
                f"{enumerate_some(full_names(self._parameters))}"
            )
        entries = {}
        for key in self._changes:
            layer = self._inventory.layers[key]
            for slot in layer.site.low_rank_slots(1):
                file = f"{key}.{slot}.weight"
                entries[file] = Entry(file, file, layer, slot, layer=layer)
        return cfg, migrate_experts(tensors, entries, cfg, self._inventory.model)

    def close(self) -> None:
        """Take the slots out of the model again."""
        for key in reversed(self._stacks):  # layers inside others first
            layer = self._inventory.layers.get(key)
            if layer is not None:
                others = layer.store.get("slots", set())
                others.discard(self)
                if not others:
                    layer.store.pop("slots", None)
                    layer.store.pop("slot key", None)
                    self._inventory.unwrap(key)
        self._stacks = {}


def _check_factors(what: str, key: str, a: Tensor, b: Tensor, experts: int, max_rank: int) -> None:
    """ValueError unless these are factors that slots can hold."""
    if a.shape[0] % experts:
        raise ValueError(f"{what} {a.shape[0]} ranks for {experts} experts at {key}")
    if a.shape[0] > max_rank * experts:
        raise ValueError(f"{what} rank {a.shape[0] // experts} at {key}; the slots take up to {max_rank}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"{what} {a.dtype} and {b.dtype} at {key}, which are no factors' dtypes")
    if not (is_finite(a) and is_finite(b)):
        raise ValueError(f"{what} NaN or infinite values at {key}")


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _for_host(tensor: Tensor, like: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
    return copy.copy_(tensor)


def _matching(
    inventory: Inventory, targets: str | Iterable[str] | None, parameters: Sequence[str], found: Mapping[str, Any]
) -> list[str]:
    if targets is None or targets == ALL_LINEAR:
        wanted = set(all_linear(inventory.model, PeftConfig()))
        keys = [n for n in inventory.names if n in wanted]
    else:
        wanted = {targets} if isinstance(targets, str) else set(targets)
        keys = [n for n in inventory.names if not wanted.isdisjoint(ends_of(n))]
    if parameters and not found:
        raise ValueError(f"target_parameters {parameters} match no Parameter of {type(inventory.model).__name__}")
    if not keys and not found:
        raise ValueError(f"target_modules {targets!r} match no module of {type(inventory.model).__name__}")
    return keys
