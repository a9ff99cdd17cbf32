"""Modes and hooks for the time of a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or in evaluation mode; afterwards every module in the one that it was in."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def removed_after(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there inside the `with` block only, whatever becomes of it."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
