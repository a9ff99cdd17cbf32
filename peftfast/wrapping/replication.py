"""`layer_replication`: a deeper model made of ranges of a model's own layers, which keep one set of weights among them
and get adapters of their own (SOLAR 10.7B, arXiv 2312.15166, stacks a model's layers like this)."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftfast.config import PeftConfig

#: What transformers' layers, and what is inside them, call their place in the model.
_PLACES = ("layer_idx", "layer_id")

#: Fields of configs that may list something of every layer: layer_types, no_rope_layers, block_types, ...
_PER_LAYER = re.compile("layer|block_type")


def ranges_of(cfg: PeftConfig) -> tuple[tuple[int, int], ...]:
    """The config's ranges of layers, each from the first to before the last; none where it leaves the layers alone."""
    return tuple((int(first), int(last)) for first, last in getattr(cfg, "layer_replication", None) or ())


class Replication:
    """Layers of one model, stacked anew.

    Attributes:
        ranges: of the model's own layers, in the order in which they are stacked.
        before, after: the list of layers as it was found, and as it is while replicated.
    """

    def __init__(self, model: nn.Module, ranges: Sequence[tuple[int, int]]) -> None:
        """Changes nothing yet.

        Raises:
            ValueError: the model has no single list of layers, or not as many layers as the ranges name.
        """
        self.ranges = tuple(ranges)
        self._name, self.before = _layers(model)
        count = len(self.before)
        for first, last in self.ranges:
            if not 0 <= first < last <= count:
                raise ValueError(
                    f"layer_replication: [{first}, {last}] is no range of the {count} layers {self._name}.0 to "
                    f"{self._name}.{count - 1}; ranges go from a first layer to before a last one: [0, {count}] is all"
                )
        self._order = [i for first, last in self.ranges for i in range(first, last)]
        self._config = getattr(model, "config", None)
        self._fields: dict[str, Any] = {}
        self.after = nn.ModuleList()

    def apply(self, model: nn.Module) -> None:
        """Stack the layers. Copies share Parameters and buffers with the layers they are copies of."""
        tensors = {id(t): t for t in (*self.before.parameters(), *self.before.buffers())}
        for place, index in enumerate(self._order):
            layer = copy.deepcopy(self.before[index], dict(tensors))
            for module in layer.modules():
                for name in _PLACES:
                    if isinstance(getattr(module, name, None), int):
                        setattr(module, name, place)
            self.after.append(layer)
        self._put(model, self.after)
        text = _text_config(self._config)
        changed: dict[str, Any] = {
            name: [value[i] for i in self._order]
            for name, value in (vars(text).items() if text is not None else ())
            if _PER_LAYER.search(name) and isinstance(value, list) and len(value) == len(self.before)
        }
        if hasattr(text, "num_hidden_layers"):  # in some models another name for a field
            changed["num_hidden_layers"] = len(self._order)
        self._fields = {name: getattr(text, name) for name in changed}
        for name, value in changed.items():
            setattr(text, name, value)

    def undo(self, model: nn.Module) -> None:
        """The model's own layers again."""
        self._put(model, self.before)
        for name, value in self._fields.items():
            setattr(_text_config(self._config), name, value)

    def part(self) -> None:
        """Give every layer weights of its own, as far as layers still share them."""
        seen: set[int] = set()
        for layer in self.after:
            for module in layer.modules():
                for store in (module._parameters, module._buffers):
                    for name, tensor in store.items():
                        if tensor is not None and id(tensor) in seen:
                            store[name] = copy.deepcopy(tensor)
            seen |= {id(t) for t in (*layer.parameters(), *layer.buffers())}

    def _put(self, model: nn.Module, layers: nn.ModuleList) -> None:
        parent, _, leaf = self._name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers)


@contextmanager
def replicated(model: nn.Module, cfg: PeftConfig) -> Iterator[None]:
    """The model with its layers stacked as the config says, for the time of a look at it."""
    ranges = ranges_of(cfg)
    replication = Replication(model, ranges) if ranges else None
    if replication is not None:
        replication.apply(model)
    try:
        yield
    finally:
        if replication is not None:
            replication.undo(model)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Where the model's layers are: the one list of as many modules as its config says, all of one class."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(layer) for layer in module}) == 1
    }
    count = getattr(_text_config(getattr(model, "config", None)), "num_hidden_layers", None)
    fitting = {name: layers for name, layers in lists.items() if count is None or len(layers) == count}
    outermost = {
        name: layers for name, layers in fitting.items() if not any(name.startswith(other + ".") for other in fitting)
    }
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({len(layers)})" for name, layers in lists.items()) or "none"
        raise ValueError(
            f"layer_replication needs the one list of layers of {type(model).__name__}"
            + (f", {count} by its config" if count is not None else "")
            + f"; lists of layers found: {found}"
        )
    return next(iter(outermost.items()))
