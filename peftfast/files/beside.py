"""What is told when adapters come from files and go to files: for those who keep something of their own beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torch import Tensor


class KeepsBeside:
    """Keeps nothing; whoever does overrides this."""

    def before_load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None] | None:
        """Called with the tensors of a file before they are compared with the model's; returns how to undo what it did,
        should they be refused."""

    def after_load(self, adapter_name: str, folder: str | os.PathLike) -> None:
        """Called when an adapter has been loaded for training from a local folder."""

    def save_beside(self, adapter_name: str, folder: str | os.PathLike) -> None:
        """Called when an adapter has been written to a folder."""
