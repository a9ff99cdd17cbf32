"""What an adapter method is. LoRA, DoRA, AdaLoRA and IA3 are files that implement this and register themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.bound import BoundLora
from peftfast.sites.called import CalledSite, Holders
from peftfast.sites.parameter import LowRank, ParameterSite
from peftfast.watch import Entry

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer
    from peftfast.rows.routing import Rows


class Adapter:
    """One named adapter at one site: a view of what the layer keeps for it, read live, because users and other
    libraries write to `layer.scaling[name]` and replace parameters.

    Attributes:
        name: the adapter's name.
        cfg: its config, shared by all layers.
        key: name of the adapted module inside the model.
        slots: slot name -> Slot, in the method's order.
    """

    __slots__ = ("name", "cfg", "key", "slots", "method", "_layer", "_where", "pair", "_dropouts", "holders")

    def __init__(
        self,
        name: str,
        cfg: PeftConfig,
        key: str,
        method: AdapterMethod,
        slots: Mapping[str, Slot],
        layer: BaseTunerLayer,
    ) -> None:
        self.name, self.cfg, self.key, self.method, self.slots, self._layer = name, cfg, key, method, slots, layer
        # of every slot: the dict and key of its Parameter, the module of that dict, and the dict and key of this module
        self._where: dict[str, tuple[dict[str, Any], str, nn.Module, dict[str, Any], str]] = {}
        self._dropouts: Mapping[str, nn.Module] = {}
        #: the modules of the factors and of dropout, None where the factors are bare Parameters
        self.holders: Holders | None = None
        #: names of the down and the up factor, whatever the site calls them
        self.pair = tuple(slot for slot in slots if slot.endswith(("_A", "_B")))

    def locate(self) -> None:
        """Find the Parameters' places anew, after modules were added or replaced."""
        self._where.clear()
        container = self._layer._modules.get("lora_dropout")
        self._dropouts = {} if container is None else container._modules
        for slot_name, slot in self.slots.items():
            container = getattr(self._layer, slot_name)
            if slot.holder is None:
                kept = container._buffers if slot.buffer else container._parameters
                self._where[slot_name] = (kept, self.name, container, self._layer._modules, slot_name)
            else:
                holder, place = container[self.name], (container._modules, self.name)
                for leaf in slot.parameters():
                    where = slot_name if leaf == "weight" else f"{slot_name}.{leaf}"
                    self._where[where] = (holder._parameters, leaf, holder, *place)
        held = {slot: getattr(self._layer, slot)._modules for slot in self.pair if self.slots[slot].holder is not None}
        biased = [modules for slot, modules in held.items() if self.slots[slot].bias is not None]
        self.holders = Holders((*held.values(), self._dropouts), self.name, biased) if len(held) == 2 else None

    def through(self, site: Site) -> Site:
        """`site`, or, where calling this adapter's modules is more than a product with their weights, one that calls
        them."""
        holders = self.holders
        if holders is None or holders.are_plain():
            return site
        if holders.replaced:
            self.locate()
            self._layer._plan = None
            holders = self.holders
        return site if holders.are_plain() else CalledSite(site, holders, self._layer.cast_input_dtype_enabled)

    def _found(self, slot: str) -> tuple[dict[str, Any], str, nn.Module]:
        """Where a slot's Parameter is kept now: others may have put another module there."""
        parameters, key, owner, above, name = self._where[slot]
        if above.get(name) is not owner:
            self.locate()
            self._layer._plan = None
            parameters, key, owner, _, _ = self._where[slot]
        return parameters, key, owner

    def __getitem__(self, slot: str) -> Tensor:
        """The tensor of a slot ("lora_A"), or the bias of a slot's holder ("lora_B.bias")."""
        parameters, key, owner = self._found(slot)
        value = parameters.get(key)
        # parametrised or sharded modules keep the tensor elsewhere and answer by attribute
        return getattr(owner, key) if value is None else value

    def places(self) -> Iterator[Entry]:
        """Where its Parameters hang, and what hangs there; None where that is not where they are kept."""
        for where in tuple(self._where):
            parameters, key, owner = self._found(where)
            yield parameters, key, parameters.get(key)
            slot_name, _, leaf = where.partition(".")
            if not leaf and self.slots[slot_name].holder is not None:
                yield getattr(self._layer, slot_name)._modules, self.name, owner

    def __contains__(self, slot: str) -> bool:
        return slot in self._where

    def parameters(self) -> Mapping[str, Tensor]:
        """All tensors, by slot name."""
        return {slot: self[slot] for slot in tuple(self._where)}

    def cell(self, slot: str) -> tuple[dict[str, Any], str] | None:
        """The dict and the key where a slot's Parameter is kept, None if it is kept elsewhere."""
        parameters, key, _ = self._found(slot)
        return (parameters, key) if parameters.get(key) is not None else None

    def settings_of(self, name: str) -> Mapping[str, Any]:
        """What the layer keeps under `name` for every adapter."""
        return getattr(self._layer, name)

    @property
    def kept(self) -> Mapping[str, Any]:
        """All that the layer keeps besides tensors, by name. Others may put a new dict in the place of one in it."""
        return self._layer.__dict__

    def setting(self, name: str) -> Any:
        """What the layer keeps for this adapter under `name`: a rank, a scaling, a dropout module."""
        return getattr(self._layer, name)[self.name]

    def change(self, name: str, value: Any) -> None:
        """Write what the layer keeps under `name`."""
        getattr(self._layer, name)[self.name] = value

    @property
    def others(self) -> Mapping[str, Adapter]:
        """All adapters here by name, this one among them, live."""
        return self._layer.adapters

    @property
    def derived(self) -> dict[Any, Any]:
        """What methods make of the adapters here and keep from call to call; emptied when something other than training
        wrote to one, and never copied or saved."""
        return self._layer.derived

    @property
    def noted(self) -> Any:
        """What its method noted of the call of the model under way; None: nothing, see `Noting`."""
        return self._layer.control.noted(self.name)

    @property
    def scale(self) -> float:
        return self._layer.scaling[self.name]

    @property
    def dropout(self) -> float:
        """Probability; 0 outside training."""
        module = self._dropouts[self.name]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def __reduce__(self) -> tuple:
        return _rebuild_adapter, (self.name, self.cfg, self.key, self.method, self.slots, self._layer)

    def __deepcopy__(self, memo: dict) -> Adapter:
        import copy

        return Adapter(
            self.name,
            copy.deepcopy(self.cfg, memo),
            self.key,
            self.method,
            self.slots,
            copy.deepcopy(self._layer, memo),
        )


def _rebuild_adapter(name: str, cfg: PeftConfig, key: str, method: AdapterMethod, *rest: Any) -> Adapter:
    # `locate` runs when the layer, which is still being unpickled, first makes its plan
    return Adapter(name, cfg, key, _registered(method), *rest)


def _registered(method: AdapterMethod) -> AdapterMethod:
    """The one object that there is of this method: the one in a pickle would pass for another method than that of the
    adapters which are added later."""
    return next((known for known in METHODS if type(known) is type(method)), method)


class AdapterMethod(Protocol):
    """Stateless: every tensor lives in the layer, every choice in the config.

    Attributes:
        only_for_training: optional, slots of which a pool that serves the adapter has no use.
        uncapturable: optional, why a model with such adapters cannot be recorded once and replayed.
        uncapturable_training: optional, the same of training steps in which they are active.
    """

    peft_type: ClassVar[str]
    prefix: ClassVar[str]  # "lora_": the parameters that are this method's start with it
    family: ClassVar[str]  # "lora": what reprs and status reports call its layers, before the kind of module; instead
    # of both, where PEFT has another name for them, a method may have a `layer_name`
    default_targets: ClassVar[Mapping[str, Any]]  # model type -> target modules

    def claims(self, cfg: PeftConfig) -> bool:
        """Whether this method is what `cfg` asks for."""
        ...

    def settings(self, site: Site, cfg: PeftConfig, key: str) -> Mapping[str, Any]:
        """What the layer keeps per adapter besides tensors, by PEFT's names (r, lora_alpha, scaling, ...). Patterns
        of the config are resolved here for the module `key`."""
        ...

    def slots(self, site: Site, cfg: PeftConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        """The tensors this method keeps at `site`. Everything about keys, in the model and in files, follows."""
        ...

    def init(self, site: Site, adapter: Adapter) -> None:
        """Fill the slots in place. May `site.weight.assign` (PiSSA, OLoRA)."""
        ...

    def changes_base(self, cfg: PeftConfig) -> bool:
        """Whether `init` writes to the base weight, so that loading has to repeat it."""
        ...

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        """Output with all `active` adapters of this method. `y` is the output so far; None means the base product has
        not been computed, and the method may fuse it."""
        ...

    def describe(self, cfg: PeftConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        """In a few words, what an adapter from a file does to the module `key`. `tensors`: of this module, by slot."""
        ...

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        """`dense` with the adapter inside; `base` is the weight without any adapter. Pure: the layer stores the
        result, and keeps the original bytes for unmerging."""
        ...


class Tieable(Protocol):
    """Optional, known by its attributes: adapters on weights that a model ties to its input embedding.

    `always_ties`: they follow the embedding's whenever that has one; otherwise where `ensure_weight_tying` asks.
    """

    always_ties: ClassVar[bool]

    def tied_slots(self, site: Site) -> Mapping[str, str]:
        """Slots of a tied module -> those of the embedding that they share; see `BaseTunerLayer.tie_to`."""
        ...


class Bindable(Protocol):
    """Optional, known by its one function: a call of few steps for the adapters that a layer usually has."""

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """`forward` for y None, with everything looked up that no input changes. None: there is no such form of these
        adapters."""
        ...


class Parametric(Protocol):
    """Optional, known by its one function: adapters of Parameters that are no module's weight."""

    def changes(self, site: ParameterSite, active: Sequence[Adapter]) -> list[LowRank]:
        """What the adapters add to the Parameter."""
        ...


class Additive(Protocol):
    """Optional, known by its one function: adapters that add a matrix to the weight, as a plain LoRA could."""

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """The down and the up factor of what merging adds, scaling included; None where it has none."""
        ...


@runtime_checkable
class Routable(Protocol):
    """Optional: different rows of a batch, different adapters, in one go."""

    def routed(self, site: Site, x: Tensor, y: Tensor | None, adapters: Sequence[Adapter], rows: Rows) -> Tensor:
        """Output in which sample i has the adapter `adapters[rows.index[i]]`, or for -1 what `y` has, bit for bit.
        `y` None: the base product has not been computed."""
        ...


def sample_by_sample(
    method: AdapterMethod, site: Site, x: Tensor, y: Tensor | None, adapters: Sequence[Adapter], rows: Rows
) -> Tensor:
    """What `Routable.routed` answers, by `method.forward` on the samples of one adapter after another: right for every
    method. Where the host does not know the rows, each adapter computes the whole batch and keeps its samples."""
    y = site.base(x) if y is None else y
    # a method that changes the input starts from the input, whatever has been computed from it
    fresh = getattr(method, "order", 0) != 0
    out = y
    for position, adapter in enumerate(adapters):
        if rows.host is None:
            own = method.forward(site, x, None if fresh else y, [adapter])
            mask = (rows.index == position).view(-1, *(1,) * (y.dim() - 1))
            out = torch.where(mask, own, out)
            continue
        where = rows.of(position)
        if where.numel() == 0:
            continue
        mine = y if fresh else y.index_select(0, where)
        own = method.forward(site, x.index_select(0, where), None if fresh else mine, [adapter])
        out = out.index_copy(0, where, own.to(out.dtype))
    if rows.host is None:
        unknown = (rows.index >= len(adapters)).view(-1, *(1,) * (y.dim() - 1))
        out = out.masked_fill(unknown, float("nan"))
    return out


class Exclusive(Protocol):
    """Optional, known by its one function: adapters of which not every set means something."""

    def check_together(self, adapters: Sequence[Adapter]) -> None:
        """ValueError if these, on one module, cannot act together."""
        ...


class Call(NamedTuple):
    """A call of a model."""

    model: nn.Module  # the base model
    inputs: Mapping[str, Any]  # its arguments by name, and those that are for adapters
    generates: bool  # a `generate`, which calls the model many times
    copies: tuple[int, ...]  # how many neighbouring rows may belong to one of the samples given


@runtime_checkable
class Noting(Protocol):
    """Optional, known by its one function: adapters that act by what the model was given, which layers do not see.
    Layers that compute only from an `Adapter` and the routing (kept stacks of mixed batches, captured decoding) do not
    do for these."""

    def note(self, name: str, cfg: PeftConfig, call: Call) -> Any:
        """What the adapters `name` are to find as `Adapter.noted` while `call` is under way; None: nothing. If it
        generates, the answer's `step` is called with the arguments of every call of the model by name.

        Raises:
            ValueError: the call is one that these adapters cannot serve.
        """
        ...


class Unpadded(Protocol):
    """Optional, known by its attribute: adapters whose factors mean something else with zeros at their ends, so that
    one of another rank cannot take their place."""

    pads: ClassVar[bool]  # False; methods without it can be padded


class Repeated(Protocol):
    """Optional, known by its one function: adapters of which loading repeats `init` though it leaves the base as it is.
    Without it, those of which `changes_base`."""

    def repeats_init(self, cfg: PeftConfig) -> bool: ...


class Reading(Protocol):
    """Optional, known by its one function: adapters that start from the weight, or go by it, though they leave it as it
    is. Without it, those of which `changes_base`."""

    def reads_base(self, cfg: PeftConfig) -> bool: ...


class Refining(Protocol):
    """Optional, known by its one function: adapters that change the base once, however many of them there are."""

    def before_merging(self, site: Site, base: Dense, adapters: Sequence[Adapter]) -> Dense:
        """The weight that all of `adapters` are merged into, of the `base` without any adapter. Pure."""
        ...


class TrainingHooks(Protocol):
    """Optional, known by its one function: a term of the loss (AdaLoRA's regulariser)."""

    def loss_term(self, adapters: Sequence[Adapter]) -> Tensor | None: ...


def repeats_init(cfg: PeftConfig) -> bool:
    """Whether an adapter of this config has to be initialised where it is loaded, before its tensors are."""
    method = method_for(cfg)
    return getattr(method, "repeats_init", method.changes_base)(cfg)


def reads_base(cfg: PeftConfig) -> bool:
    """Whether adding an adapter of this config takes the base weight as it is then, whole."""
    method = method_for(cfg)
    return getattr(method, "reads_base", method.changes_base)(cfg)


M = TypeVar("M", bound=type)

METHODS: list[AdapterMethod] = []


def register_method(cls: M) -> M:
    """Class decorator: the one registration that configs, injection, files and merging look methods up in. Later
    registrations are asked first, so variants register after what they vary."""
    METHODS.insert(0, cls())
    return cls


def method_for(cfg: PeftConfig) -> AdapterMethod:
    """The method a config asks for; ValueError naming the known ones."""
    import peftfast.methods  # noqa: F401  (registers every method)

    for method in METHODS:
        if method.claims(cfg):
            return method
    raise ValueError(
        f"No adapter method handles {type(cfg).__name__} with peft_type {cfg.peft_type!r}. "
        f"Known methods: {', '.join(sorted({str(m.peft_type) for m in METHODS}))}"
    )
