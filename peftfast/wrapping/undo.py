"""Putting a model back as it was when something is refused half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_if_refused(model: nn.Module, *configs: object) -> Iterator[None]:
    """If the block raises, the model has its modules, parameters, hooks, attributes, modes and `requires_grad` back,
    and its config and these their fields. Values of tensors are not copied; the block must not have written any."""
    modules = list(model.modules())
    states = [_state(module) for module in modules]
    grads = [(p, p.requires_grad) for p in model.parameters()]
    fields = [(c, dict(c.__dict__)) for c in (getattr(model, "config", None), *configs) if hasattr(c, "__dict__")]
    try:
        yield
    except BaseException:
        for module, state in zip(modules, states, strict=True):
            _restore(module, state)
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
        for config, values in fields:
            config.__dict__.clear()
            config.__dict__.update(values)
        raise


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute; of dicts (parameters, children, hooks) and lists what is in them as well."""
    return {
        k: (v, dict(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else None)
        for k, v in module.__dict__.items()
    }


def _restore(module: nn.Module, state: dict[str, tuple[Any, Any]]) -> None:
    for name in [k for k in module.__dict__ if k not in state]:
        del module.__dict__[name]
    for name, (value, items) in state.items():
        module.__dict__[name] = value
        if isinstance(value, list):
            value[:] = items
        elif items is not None:
            value.clear()
            value.update(items)
