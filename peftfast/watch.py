"""Whether what was looked up still holds, asked in C: every call of every layer asks, and Python would take longer for
the question than for the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from operator import is_
from typing import Any

from torch import nn
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
Entry = tuple[Mapping[str, Any], str, Any]


class Watch:
    """Entries of dicts that have to be the very same objects, and collections that have to be empty."""

    __slots__ = ("dicts", "keys", "values", "empty")

    def __init__(self, entries: Iterable[Entry], empty: Iterable[Collection]) -> None:
        self.dicts, self.keys, self.values = zip(*entries, strict=True)
        self.empty = tuple(empty)

    def holds(self) -> bool:
        return all(map(is_, map(dict.get, self.dicts, self.keys), self.values)) and not any(self.empty)


def untouched(module: nn.Module) -> tuple[list[Entry], list[Collection]]:
    """What to watch for `is_untouched(module)`, but for hooks of all modules."""
    own = module.__dict__
    return [(own, "forward", None), *[(own, hooks, own[hooks]) for hooks in HOOKS]], [own[hooks] for hooks in HOOKS]
