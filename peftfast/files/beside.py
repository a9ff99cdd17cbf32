"""What is told when adapters come from files and go to files: for those who keep something of their own beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor


class KeepsBeside:
    """Keeps nothing; whoever does overrides this."""

    def before_load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None] | None:
        """Called with the tensors of a file before they are compared with the model's; returns how to undo what it did,
        should they be refused."""

    def after_load(self, adapter_name: str, find: Callable[[str], str | None]) -> None:
        """Called when an adapter has been loaded for training, with what finds a file beside the adapter's by its name;
        None: there is none."""

    def save_beside(self, adapter_name: str, folder: str | os.PathLike) -> None:
        """Called when an adapter has been written to a folder."""


@contextmanager
def room_for(keeper: object, adapter_name: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, an adapter that `keeper` manages has room for tensors that are compared with it; an error undoes it."""
    undo = keeper.before_load(adapter_name, tensors) if isinstance(keeper, KeepsBeside) else None
    try:
        yield
    except BaseException:
        if undo is not None:
            undo()
        raise
