"""What an adapter method is. LoRA, DoRA, AdaLoRA and IA3 are files that implement this and register themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, plain_name
from peftfast.ops.experts import LowRank
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.bound import BoundLora
from peftfast.sites.parameter import ParameterSite

if TYPE_CHECKING:
    from peftfast.rows.routing import Rows


class AdapterMethod(Protocol):
    """Stateless: every tensor lives in the layer, every choice in the config.

    Attributes:
        order: optional, at layers with several methods the least acts first; without it 0. Below it, the method changes
            the input.
        layer_name: optional, for a family and a kind of module that PEFT calls by another name.
        peft_layer: optional, the class of PEFT that its layers pass for where others ask.
        refused_by_mamba: optional, False where PEFT lets it on weights that Mamba's kernels read themselves.
        condense_targets: optional, False where a long list of targets has to stay as it was given.
        only_for_training: optional, slots of which a pool that serves the adapter has no use.
        uncapturable: optional, why a model with such adapters cannot be recorded once and replayed.
        uncapturable_training: optional, the same of training steps in which they are active.
    """

    peft_type: ClassVar[str]
    prefix: ClassVar[str]  # "lora_": the parameters that are this method's start with it
    family: ClassVar[str]  # "lora": what reprs and status reports call its layers, before the kind of module
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

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        """Output with all `active` adapters of this method. `y` is the output so far; None means the base product has
        not been computed, and the method may fuse it."""
        ...

    def describe(self, cfg: PeftConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        """In a few words, what an adapter from a file does to the module `key`. `tensors`: of this module, by slot."""
        ...

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        """`dense` with the adapter inside; `base` is the weight without any adapter. Pure, but for what is `spare`: the
        layer stores the result, and keeps the original bytes for unmerging."""
        ...


class Targeting(Protocol):
    """Optional, known by its functions, of which a method may have any: configs that are completed in place, by the
    model, in this order."""

    def retarget(self, cfg: PeftConfig, model: nn.Module) -> None:
        """Bring targets to the model's own names for them."""
        ...

    def choose_targets(self, cfg: PeftConfig, model: nn.Module) -> None:
        """A default for `target_modules` that no table of `default_targets` could have."""
        ...

    def resolve(self, cfg: PeftConfig, model: nn.Module) -> None:
        """What else a config leaves to the model; its targets are known."""
        ...


class Tieable(Protocol):
    """Optional, known by its attributes: adapters on weights that a model ties to its input embedding.

    `always_ties`: they follow the embedding's whenever that has one; otherwise where `ensure_weight_tying` asks.
    """

    always_ties: ClassVar[bool]

    def tied_slots(self, site: Site) -> Mapping[str, str]:
        """Slots of a tied module -> those of the embedding that they share, the same tensors or, where the names
        differ, theirs transposed."""
        ...

    # Optional: init_untied(site, adapter), as `init`, of a tied module's other slots, where a method has any.


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
    """Optional, known by its first function: adapters that add a matrix to the weight, as a plain LoRA could."""

    def as_product(self, adapter: Adapter) -> tuple[Tensor, Tensor] | None:
        """The down and the up factor of what merging adds, scaling included; None where it has none."""
        ...


class Scaling(Protocol):
    """Optional, known by its one attribute: adapters that multiply features of the weight, and change nothing else."""

    scales: ClassVar[bool]


class Brief(Protocol):
    """Optional, known by its attribute: adapters of which one is merged by writing three times to the weight, in its
    place if it is `spare`; fp32 does for that, where more of them would round more often than PEFT."""

    few_roundings: ClassVar[bool]


class Joint(Protocol):
    """Optional, known by its one function: adapters that have a product, or scale, and that are merged in one step."""

    def merged_together(self, site: Site, dense: Dense, adapters: Sequence[Adapter]) -> Dense:
        """`merged` for several, rounded once if `dense` is `spare`."""
        ...


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

    def part(position: int) -> Tensor:
        if position < 0:
            return rows.own(position, y)
        start = None if fresh else rows.own(position, y)
        return method.forward(site, rows.own(position, x), start, [adapters[position]])

    count = len(adapters)
    return rows.joined([(position, part(position)) for position in rows.turns(count)], count)


class Slotted(Protocol):
    """Optional, known by its one function: adapters that slots of a pool can hold."""

    def for_slot(
        self, site: Site, cfg: PeftConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """Down factor, up factor and scaling of an adapter from a file.

        Args:
            tensors: of this module, by slot name.

        Raises:
            ValueError: it is more than a pair of factors.
        """
        ...


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
    """Optional, known by its attribute: adapters whose factors mean something else with zeros at their ends, or that
    keep more than factors by their rank, so that one of another rank cannot take their place."""

    pads: ClassVar[bool]  # False; methods without it can be padded


class NeverIdle(Protocol):
    """Optional, known by its attribute: adapters that change the output also where all their tensors are zero."""

    acts_when_zero: ClassVar[bool]


class Based(Protocol):
    """Optional, known by its one function: adapters that keep something of the base weight."""

    def base_replaced(self, adapter: Adapter) -> None:
        """The weight may be another one by now, or be it as soon as nothing is merged."""
        ...


class Rewriting(Protocol):
    """Optional, known by its one function: adapters whose `init` may write to the base weight, so that loading has to
    repeat it."""

    def changes_base(self, cfg: PeftConfig) -> bool: ...


class Repeated(Protocol):
    """Optional, known by its one function: adapters of which loading repeats `init` though it leaves the base as it is.
    Without it, those of which `changes_base`."""

    def repeats_init(self, cfg: PeftConfig) -> bool: ...


class Restartable(Protocol):
    """Optional, known by its one function: adapters that can start anew."""

    def restart(self, site: Site, adapter: Adapter, init: bool | str) -> None:
        """Fill the factors as the initialisation `init`, True or "gaussian", does."""
        ...


class Trimmed(Protocol):
    """Optional, known by its one function: adapters of which files have less than the model."""

    def to_file(self, cfg: PeftConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a file has of `tensors`, under the same names."""
        ...


class Prepared(Protocol):
    """Optional, known by its one function: adapters whose `init` starts from what somebody has left on the module."""

    def check_init(self, site: Site, cfg: PeftConfig, settings: Mapping[str, Any]) -> None:
        """ValueError where `init` would find nothing to start from. Asked of every module before any is changed."""
        ...


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


def retarget(cfg: PeftConfig, model: nn.Module) -> None:
    """Bring the targets of a config to the model's own names for them, in place: layers that were modules where an
    adapter comes from may be parts of a fused Parameter here."""
    method = method_for(cfg)
    if hasattr(type(method), "retarget"):
        method.retarget(cfg, model)


def chooses_targets(method: AdapterMethod) -> bool:
    """Whether a method has a default for `target_modules` that no table has (`choose_targets`)."""
    return hasattr(type(method), "choose_targets")


def changes_base(cfg: PeftConfig) -> bool:
    """Whether initialising an adapter of this config writes to the base weight."""
    return rewrites(method_for(cfg), cfg)


def rewrites(method: AdapterMethod, cfg: PeftConfig) -> bool:
    """`changes_base`, where the config's method is known."""
    asked = getattr(method, "changes_base", None)
    return asked is not None and asked(cfg)


def repeats_init(cfg: PeftConfig) -> bool:
    """Whether an adapter of this config has to be initialised where it is loaded, before its tensors are."""
    return getattr(method_for(cfg), "repeats_init", changes_base)(cfg)


def reads_base(cfg: PeftConfig) -> bool:
    """Whether adding an adapter of this config takes the base weight as it is then, whole."""
    return getattr(method_for(cfg), "reads_base", changes_base)(cfg)


M = TypeVar("M", bound=type)

METHODS: list[AdapterMethod] = []
#: The same by the names of their classes, which a graph of torch's asks for with less than an object.
BY_NAME: dict[str, AdapterMethod] = {}


def register_method(cls: M) -> M:
    """Class decorator: the one registration that configs, injection, files and merging look methods up in. Later
    registrations are asked first, so variants register after what they vary. ValueError for a name that is taken."""
    if cls.__name__ in BY_NAME:
        raise ValueError(f"There is a method of the name {cls.__name__}: {type(BY_NAME[cls.__name__])!r}")
    cls.__reduce__ = _reduce
    BY_NAME[cls.__name__] = method = cls()
    METHODS.insert(0, method)
    return cls


def _reduce(self: AdapterMethod) -> tuple:
    """Copied or unpickled, a method is the one object that there is of it: another would pass for another method than
    that of the adapters which are added later."""
    return _registered, (type(self),)


def _registered(cls: type) -> AdapterMethod:
    return BY_NAME[cls.__name__]


def method_for(cfg: PeftConfig) -> AdapterMethod:
    """The method a config asks for; ValueError naming the known ones."""
    import peftfast.methods  # noqa: F401  (registers every method)

    for method in METHODS:
        if method.claims(cfg):
            return method
    raise ValueError(
        f"No adapter method handles {type(cfg).__name__} with peft_type {plain_name(cfg.peft_type)!r}. "
        f"Known methods: {', '.join(sorted({plain_name(m.peft_type) for m in METHODS}))}"
    )
