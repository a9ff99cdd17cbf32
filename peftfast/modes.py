"""Modes and hooks that modules have for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Afterwards they, and each of what they consist of, train or not as they did before."""
    before = {m: m.training for module in modules for m in module.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The whole model in training or in evaluation mode inside the `with` block."""
    with modes_kept(model):
        model.train(training)
        yield


@contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """What they consist of is in evaluation mode inside the `with` block, and nothing hears of it."""
    with modes_kept(*modules):
        for module in modules:
            for part in module.modules():
                part.training = False
        yield


@contextmanager
def removed_after(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there inside the `with` block only, whatever becomes of it."""
    hooks = list(hooks)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
