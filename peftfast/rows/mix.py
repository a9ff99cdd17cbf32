"""What a layer does for the adapters of a routing, whichever of its samples get which: looked up once and kept, since
every layer of every mixed forward asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ref

from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.method import AdapterMethod, sample_by_sample
from peftfast.sites import Site
from peftfast.watch import ContentWatch

if TYPE_CHECKING:
    from peftfast.rows.routing import Routing


class Kept(Protocol):
    """What a method makes of several adapters together and keeps from forward to forward."""

    watch: ContentWatch | None  # of what it was made of; never None where it is kept

    @property
    def quick(self) -> bool:
        """Whether `short` may be called and is the best there is."""
        ...

    def short(self, site: Site, x: Tensor, routing: Routing) -> Tensor:
        """The output in few steps, for a routing that `arranges` x. Without gradients."""
        ...


class Group(tuple):
    """The adapters of one method at one layer that a routing names. Two of them are equal only if they are one."""

    kept: Kept | None = None

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class MixedStep(NamedTuple):
    """One method's part."""

    run: Callable[..., Tensor]  # as `Routable.routed`
    adapters: Sequence[Adapter]
    positions: Sequence[int] | None  # where they are among the layer's adapters of this mix; None: they are all of them


class Mix:
    """Of the adapters that a routing names, those of one layer.

    Attributes:
        present: for each of the names, whether the layer has it.
        adapters: those it has, in order.
        steps: methods in the order in which they act.
        single: the one group, if the layer has all of the adapters and they are of one method, which acts on all inputs
            alike.

    Args:
        group: makes the adapters of one method a sequence.
    """

    __slots__ = ("present", "adapters", "steps", "single")

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        names: Sequence[str],
        group: Callable[[list[Adapter]], Sequence[Adapter]] = Group,
    ) -> None:
        found = [adapters.get(name) for name in names]
        self.present = tuple([adapter is not None for adapter in found])
        self.adapters = [adapter for adapter in found if adapter is not None]
        groups: dict[int, tuple[AdapterMethod, list[int]]] = {}
        for position, adapter in enumerate(self.adapters):
            groups.setdefault(id(adapter.method), (adapter.method, []))[1].append(position)
        self.steps = []
        # methods that change the input must see it before anybody has multiplied it
        for method, positions in sorted(groups.values(), key=_order):
            run = getattr(method, "routed", None)  # asking the protocol costs as much as a small product
            own = group([self.adapters[p] for p in positions])
            if run is None:  # compilers of torch 2.11 cannot ask a method whether it is true
                run = partial(sample_by_sample, method)
            self.steps.append(MixedStep(run, own, positions if len(groups) > 1 else None))
        alone = len(self.steps) == 1 and all(self.present)
        # what is kept of adapters says nothing of the inputs, which some act by (see `Noting`)
        self.single = self.steps[0].adapters if alone and not hasattr(self.adapters[0].method, "note") else None


def _order(group: tuple[AdapterMethod, Any]) -> int:
    return getattr(group[0], "order", 0)


#: The mixes of all layers of a model for one set of adapters, by layer; the layers have what these are kept in.
Mixes = dict[ref[Any], Mix]


def groups_of(mixes: Mixes) -> list[Group]:
    """All that something may be kept of; other threads may add to `mixes` meanwhile."""
    return [step.adapters for mix in list(mixes.values()) for step in mix.steps]


class Verdicts:
    """Which kept things still hold, found out for all layers when the first of them asks: between the products of a
    forward it takes three times as long, because every layer finds the processor's caches full of other things.

    An answer is good for one question, so that a layer's second forward is not answered by what held before its first.

    Args:
        trusting: everything holds, without looking.
    """

    def __init__(self, mixes: Mixes, trusting: bool = False) -> None:
        self.mixes, self.trusting = mixes, trusting
        self._known: dict[Group, Kept | None] = {}

    def current(self, group: Group) -> Kept | None:
        """What is kept of `group` if it still holds, else None."""
        if self.trusting:
            return group.kept
        if group not in self._known:
            kept = [(other, other.kept) for other in groups_of(self.mixes)]
            self._known = {other: k if k.watch.holds() else None for other, k in kept if k is not None}
        return self._known.pop(group, None)
