"""One adapter at one site, as methods see it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.sites import Site, Slot
from peftfast.sites.called import CalledSite, Holders
from peftfast.sites.site import is_written_over
from peftfast.watch import Place

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer
    from peftfast.method import AdapterMethod


class Adapter:
    """One named adapter at one site: a view of what the layer keeps for it, read live, because users and other
    libraries write to `layer.scaling[name]` and replace parameters.

    Attributes:
        name: the adapter's name.
        cfg: its config, shared by all layers.
        key: name of the adapted module inside the model.
        slots: slot name -> Slot, in the method's order.
    """

    __slots__ = (
        "name", "cfg", "key", "slots", "method", "_layer", "_held", "_bare", "pair", "kept", "_dropouts", "holders",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        cfg: PeftConfig,
        key: str,
        method: AdapterMethod,
        slots: Mapping[str, Slot],
        layer: BaseTunerLayer,
    ) -> None:
        self.name, self.cfg, self.key, self.method, self.slots = name, cfg, key, method, slots
        self._layer = weakref.ref(layer)  # an `Owner` in fewer steps
        # of every slot what has it by this adapter's name: a dict of modules, or the module of bare tensors. What is on
        # the way from there is not kept, because graphs would ask in every call, in Python, whether it is that still
        self._held: dict[str, dict[str, nn.Module]] = {}
        self._bare: dict[str, nn.Module] = {}
        #: what the layer keeps besides tensors and others may put something new in the place of, by name
        self.kept: Mapping[str, Any] = {}
        self._dropouts: Mapping[str, nn.Module] = {}
        #: the modules of the factors and of dropout, None where the factors are bare Parameters
        self.holders: Holders | None = None
        #: names of the down and the up factor, whatever the site calls them
        self.pair = tuple(slot for slot in slots if slot.endswith(("_A", "_B")))

    def locate(self) -> None:
        """Find the Parameters' places anew, after modules were added or replaced."""
        self._held.clear()
        self._bare.clear()
        layer = self._layer()
        self.kept, kept = getattr(layer, "replaceable", self.kept), layer._modules
        self._dropouts = kept["lora_dropout"]._modules if "lora_dropout" in kept else {}
        held, biased = [], []
        for slot_name, slot in self.slots.items():
            container = kept[slot_name]
            if slot.holder is None:
                self._bare[slot_name] = container
                continue
            self._held[slot_name] = container._modules
            if slot_name in self.pair:
                held.append(container._modules)
                if slot.bias is not None:
                    biased.append(container._modules)
        self.holders = Holders((*held, self._dropouts), self.name, biased) if len(held) == 2 else None

    def through(self, site: Site) -> Site:
        """`site`, or, where calling this adapter's modules is more than a product with their weights, one that calls
        them."""
        if self._are_products() and not (torch.compiler.is_compiling() and self._written_over()):
            return site
        return CalledSite(site, self.holders, self._layer().cast_input_dtype_enabled)

    def _are_products(self) -> bool:
        """Whether this adapter's modules are there to be read only, whichever the layer keeps by now."""
        holders = self.holders
        if holders is None or holders.are_products():
            return True
        if holders.replaced:
            self.locate()
            self._layer()._plan = None
        return self.holders.are_products()

    # What torch.compiler.assume_constant_result does, without importing the compiler: a graph would ask for each of the
    # modules' entries and hooks in every call, which takes longer than a small product. Other modules are seen where
    # `_found` asks, what `_written_over` looks for there, and hooks that come later in no graph of torch's.
    _are_products._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _written_over(self) -> bool:
        """Whether a factor's module has got a `forward` or a bias of its own: for graphs, which then are made anew."""
        for slot in self.pair if self.holders is not None else ():
            owner = self._held[slot][self.name]
            if is_written_over(owner) or owner._parameters.get("bias") is not None and not self.holders.biased:
                return True
        return False

    def _found(self, slot: str) -> tuple[dict[str, Any], str, nn.Module]:
        """Where a slot's Parameter is kept now, and by which module: others may have put another module there."""
        above = self._held.get(slot)
        if above is not None:
            owner = above[self.name]
            return owner._parameters, "weight", owner
        owner = self._bare.get(slot)
        if owner is not None:
            return owner._parameters or owner._buffers, self.name, owner
        slot, _, leaf = slot.partition(".")
        owner = self._held[slot][self.name]
        return owner._parameters, leaf, owner

    def __getitem__(self, slot: str) -> Tensor:
        """The tensor of a slot ("lora_A"), or the bias of a slot's holder ("lora_B.bias")."""
        parameters, key, owner = self._found(slot)
        value = parameters.get(key)
        # parametrised or sharded modules keep the tensor elsewhere and answer by attribute
        return getattr(owner, key) if value is None else value

    def __iter__(self) -> Iterator[str]:
        """The slots, and what is in a slot's holder besides its weight."""
        for name, slot in self.slots.items():
            for leaf in ["weight"] if slot.holder is None else slot.parameters():
                yield name if leaf == "weight" else f"{name}.{leaf}"

    def places(self) -> Iterator[Place]:
        """Where its Parameters hang, and what hangs there; None where that is not where they are kept."""
        for where in self:
            parameters, key, owner = self._found(where)
            yield parameters, key, parameters.get(key)
            if where in self._held:
                yield self._held[where], self.name, owner

    def parameters(self) -> Mapping[str, Tensor]:
        """All tensors, by slot name."""
        return {slot: self[slot] for slot in self}

    def cell(self, slot: str) -> tuple[dict[str, Any], str] | None:
        """The dict and the key where a slot's Parameter is kept, None if it is kept elsewhere."""
        parameters, key, _ = self._found(slot)
        return (parameters, key) if parameters.get(key) is not None else None

    def settings_of(self, name: str) -> Mapping[str, Any]:
        """What the layer keeps under `name` for every adapter."""
        return getattr(self._layer(), name)

    def setting(self, name: str) -> Any:
        """What the layer keeps for this adapter under `name`: a rank, a scaling, a dropout module."""
        return getattr(self._layer(), name)[self.name]

    def change(self, name: str, value: Any) -> None:
        """Write what the layer keeps under `name`."""
        getattr(self._layer(), name)[self.name] = value

    @property
    def others(self) -> Mapping[str, Adapter]:
        """All adapters here by name, this one among them, live."""
        return self._layer().adapters

    @property
    def merged(self) -> list[Adapter]:
        """Those of `others` that are inside the weight."""
        return [self._layer().adapters[name] for name in self._layer().__dict__["_merged"]]

    @property
    def site(self) -> Site:
        """Where it is."""
        return self._layer().site

    @property
    def training(self) -> bool:
        """Whether its layer is training."""
        return self._layer().training

    @property
    def derived(self) -> dict[Any, Any]:
        """What methods make of the adapters here and keep from call to call; emptied when something other than training
        wrote to one, and never copied or saved."""
        return self._layer().derived

    @property
    def noted(self) -> Any:
        """What its method noted of the call of the model under way; None: nothing, see `Noting`."""
        return self._layer().control.noted(self.name)

    @property
    def scale(self) -> float:
        return self.kept["scaling"][self.name]

    @property
    def dropout(self) -> float:
        """Probability; 0 outside training."""
        module = self._dropouts[self.name]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def __reduce__(self) -> tuple:
        # the layer, which is still being unpickled, runs `locate` when it has everything
        return Adapter, (self.name, self.cfg, self.key, self.method, self.slots, self._layer())

    def __deepcopy__(self, memo: dict) -> Adapter:
        import copy

        return Adapter(
            self.name,
            copy.deepcopy(self.cfg, memo),
            self.key,
            self.method,
            self.slots,
            copy.deepcopy(self._layer(), memo),
        )
