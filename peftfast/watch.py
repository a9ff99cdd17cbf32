"""Whether what was looked up still holds. Every call of every layer asks, so the question has to cost less than looking
up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: What torch calls with every module.
GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)

#: A dict, a key, and what has to be there; None: nothing.
Place = tuple[Mapping[Any, Any], Any, Any]

_VERSION = attrgetter("_version")
T = TypeVar("T")


def read_off(known: MutableMapping[nn.Module, T], model: nn.Module, read: Callable[[nn.Module], T]) -> T:
    """What `read` finds in a model: once, because it is needed in every forward and takes a while. A compiler reads for
    itself: from what is known of all models it would make a graph that does not outlast the next one."""
    if torch.compiler.is_compiling():
        return read(model)
    found = known.get(model)
    if found is None:
        found = known[model] = read(model)
    return found


class Watch:
    """Entries of dicts that have to be the very same objects, and modules that have to be what `is_untouched` asks
    for."""

    __slots__ = ("entries", "modules")

    def __init__(self, entries: Iterable[Place], modules: Iterable[nn.Module] = ()) -> None:
        self.entries = tuple({(id(kept), key): (kept, key, value) for kept, key, value in entries}.values())
        self.modules = tuple([module.__dict__ for module in modules])

    def holds(self) -> bool:
        for kept, key, value in self.entries:  # faster than `map` since Python has bytecode of its own for dicts
            if kept.get(key) is not value:
                return False
        for own in self.modules:
            if (
                own["_forward_pre_hooks"]
                or own["_forward_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        return not (self.modules and any(GLOBAL_HOOKS))


class TensorWatch:
    """Tensors that nobody may write to or give other memory. Writing through `tensor.data` leaves no trace to see; none
    of them may be an inference tensor, which does not count writes, or what functorch's transforms wrap one in, which
    has no memory of its own."""

    __slots__ = ("tensors", "versions", "addresses", "_aliases")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.versions, self.addresses = list(map(_VERSION, self.tensors)), list(map(Tensor.data_ptr, self.tensors))
        # the aliases keep the storage alive, so that no other tensor can appear at its address
        self._aliases = [t.detach() for t in self.tensors]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> TensorWatch | None:
        """None where changes could not be seen."""
        tensors = list(tensors)
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        return None if any(t.is_inference() or wrapped(t) for t in tensors) else cls(tensors)

    def holds(self) -> bool:
        return (
            list(map(_VERSION, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )


class ContentWatch(Watch):
    """Besides, what is in tensors."""

    __slots__ = ("content",)

    def __init__(self, entries: Iterable[Place], content: TensorWatch, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__(entries, modules)
        self.content = content

    def holds(self) -> bool:
        return Watch.holds(self) and self.content.holds()
