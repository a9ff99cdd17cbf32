"""Going through a model that has adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn


def outer_modules(
    model: nn.Module, closed: Callable[[nn.Module], bool], every_place: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` by name, without those inside one that is `closed`.

    Args:
        every_place: a module that hangs in several places comes in all of them, not in the first alone.
    """
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=not every_place):
        if inside is None or not name.startswith(inside):
            inside = f"{name}." if closed(module) else None
            yield name, module
