"""Whether what was looked up still holds, asked in C: every call of every layer asks, and Python would take longer for
the question than for the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

#: What torch calls with every module.
GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")

#: A dict, a key, and what has to be there; None: nothing.
Entry = tuple[Mapping[Any, Any], Any, Any]

_VERSION = attrgetter("_version")


class Watch:
    """Entries of dicts that have to be the very same objects, and collections that have to be empty."""

    __slots__ = ("dicts", "keys", "values", "empty")

    def __init__(self, entries: Iterable[Entry], empty: Iterable[Collection]) -> None:
        self.dicts, self.keys, self.values = zip(*entries, strict=True)
        self.empty = tuple(empty)

    def holds(self) -> bool:
        return all(map(is_, map(dict.get, self.dicts, self.keys), self.values)) and not any(self.empty)


class TensorWatch:
    """Tensors that nobody may write to or give other memory. Writing through `tensor.data` leaves no trace to see; none
    of them may be an inference tensor, which does not count writes."""

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
        return None if any(t.is_inference() for t in tensors) else cls(tensors)

    def holds(self) -> bool:
        return (
            list(map(_VERSION, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )


class ContentWatch(Watch):
    """Besides, what is in tensors."""

    __slots__ = ("content",)

    def __init__(self, entries: Iterable[Entry], content: TensorWatch) -> None:
        super().__init__(entries, ())
        self.content = content

    def holds(self) -> bool:
        return Watch.holds(self) and self.content.holds()


def untouched(module: nn.Module) -> tuple[list[Entry], list[Collection]]:
    """What to watch for `is_untouched(module)`, but for hooks of all modules."""
    own = module.__dict__
    return [(own, "forward", None), *[(own, hooks, own[hooks]) for hooks in HOOKS]], [own[hooks] for hooks in HOOKS]
