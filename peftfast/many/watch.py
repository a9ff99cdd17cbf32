"""Whether the Parameters that something was made of are what they were then."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

_VERSION = operator.attrgetter("_version")


class Watch:
    """Sees whoever replaces a watched value, writes to a watched tensor or gives it other memory. Writing through
    `tensor.data` leaves no trace to see.

    Args:
        cells: dicts, keys and what is to stay there.
        tensors: are not to be written to. None may be an inference tensor, which does not count writes.
    """

    __slots__ = ("dicts", "keys", "values", "tensors", "versions", "addresses", "_aliases")

    def __init__(self, cells: Iterable[tuple[dict[Any, Any], Any, Any]], tensors: Sequence[Tensor]) -> None:
        self.dicts, self.keys, self.values = map(list, zip(*cells, strict=True))
        self.tensors = list(tensors)
        self.versions, self.addresses = list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))
        # the aliases keep the storage alive, so that no other tensor can appear at its address
        self._aliases = [t.detach() for t in tensors]

    def unchanged(self) -> bool:
        """Whether everything is as it was. Loops in C: in a small model they take longer than its products."""
        return (
            all(map(operator.is_, map(dict.get, self.dicts, self.keys), self.values))
            and list(map(_VERSION, self.tensors)) == self.versions
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )
