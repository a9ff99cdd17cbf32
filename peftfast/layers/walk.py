"""Going through a model that has adapters, in time that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from peftfast.config import require_module
from peftfast.keys import WRAPPED, strip_wrappers


def base_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel; others as they are. TypeError for what is no module."""
    require_module(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def inside(module: nn.Module) -> nn.Module:
    """The module in the wrappers that are called as it is to everybody else: torch.compile's and the like."""
    while not WRAPPED.isdisjoint(module._modules):
        module = next(child for name, child in module._modules.items() if name in WRAPPED)
    return module


def at(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, which may have wrappers in it or not."""
    module = inside(model)
    for part in filter(None, strip_wrappers(name).split(".")):
        module = inside(module._modules[part])
    return module


def base_modules(model: nn.Module, every_place: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` by name, as `named_modules` gives them, without what layers and wrappers keep by adapter.
    What is `inside` another is known by the other's name alone, as it would be without it.

    Args:
        every_place: a module that hangs in several places comes in all of them, not in the first alone.
    """
    seen: set[nn.Module] = set()
    left = [("", model)]
    while left:
        name, module = left.pop()
        module = inside(module)
        if module in seen:
            continue
        if not every_place:
            seen.add(module)
        yield name, module
        # most modules have none, and asking them for what they do not have takes them a while
        kept = module.__dict__.get("adapter_layer_names") or getattr(type(module), "adapter_layer_names", ())
        if kept:
            kept = {*kept, *getattr(module, "other_param_names", ())}
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is not None and key not in kept:
                left.append((prefix + key, child))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The Parameters of `base_modules`, each by the name of its first place."""
    seen: set[int] = set()
    for name, module in base_modules(model):
        for leaf, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{name}.{leaf}" if name else leaf, p


def name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """Which of `base_modules` this is, by the name of its first place; None: none of them."""
    wanted = None if module is None else inside(module)
    return next((name for name, m in base_modules(model) if m is wanted), None)


def outer_modules(
    model: nn.Module, closed: Callable[[nn.Module], bool], every_place: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """`base_modules`, without those inside one that is `closed`."""
    within: str | None = None
    for name, module in base_modules(model, every_place):
        if within is None or not name.startswith(within):
            within = f"{name}." if closed(module) else None
            yield name, module


def put(parent: nn.Module, attribute: str, module: nn.Module) -> None:
    """Put `module` in a child's place, and in lists that the parent has of its own: MaskFormer's heads call what is in
    one."""
    child = parent._modules[attribute]
    setattr(parent, attribute, module)
    for held in parent.__dict__.values():
        if type(held) is list:
            for i, item in enumerate(held):
                if item is child:
                    held[i] = module
