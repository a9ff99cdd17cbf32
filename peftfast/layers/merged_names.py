"""The names of the adapters that are inside a layer's weight, as a list that PEFT's users write to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer


class MergedNames(list[str]):
    """`BaseTunerLayer.merged_adapters`; a change in place is an assignment."""

    def __init__(self, layer: BaseTunerLayer, names: Iterable[str]) -> None:
        super().__init__(names)
        self._layer = layer

    def __reduce__(self) -> tuple:
        return list, (list(self),)


def _assigning(name: str) -> Callable[..., Any]:
    change = getattr(list, name)

    @functools.wraps(change)
    def changed(self: MergedNames, *args: Any) -> Any:
        result = change(self, *args)
        self._layer.merged_adapters = self
        return result

    return changed


for _name in ("append", "clear", "extend", "insert", "pop", "remove", "__delitem__", "__iadd__", "__setitem__"):
    setattr(MergedNames, _name, _assigning(_name))
