"""Rotary embedding: an attention's own code with Liger's function for the global one that it calls."""

from __future__ import annotations

import inspect
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.sites.site import is_untouched
from peftfast.training.liger.part import DIFFERS, Part, same

ROTARY = "apply_rotary_pos_emb"  # what transformers' attentions call


class Rotary(Part):
    """One attention, checked at its first call."""

    kind = "rotary"

    def __init__(self, name: str, module: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.module, self.operation = module, operations.liger_rope
        self.original = inspect.unwrap(type(module).forward).__globals__[ROTARY]

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Its code calls the function by its global name."""
        own = inspect.unwrap(type(module).forward)
        return isinstance(own, FunctionType) and ROTARY in own.__code__.co_names and ROTARY in own.__globals__

    def attach(self) -> None:
        function = _with_global(type(self.module).forward, ROTARY, self.rotate)
        if not is_untouched(self.module):
            self.off("it has hooks or another forward")
        elif function is None:
            self.off("its forward is wrapped in something unknown")
        else:
            self.put(self.module, "forward", MethodType(function, self.module))

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple:
        usable = not (args or kwargs or torch.compiler.is_compiling())
        if usable and self.state == "new" and not torch.is_inference_mode_enabled():
            self._check(q, k, cos, sin)
        if not usable or self.state != "on":
            return self.original(q, k, cos, sin, *args, **kwargs)
        return self.operation(q, k, cos, sin)

    def _check(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        def ours(q: Tensor, k: Tensor) -> tuple:
            return self.operation(q, k, cos, sin)

        def theirs(q: Tensor, k: Tensor) -> tuple:
            return self.original(q, k, cos, sin)

        self.decide(lambda: None if same(ours, theirs, q, k) else DIFFERS)


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType | None:
    """The same code with another value for one of its globals, through decorators that keep what they wrap in their
    closure; None where one does not. The function itself is as before."""
    inner = getattr(function, "__wrapped__", None)
    names, closure = function.__globals__, function.__closure__
    if inner is None:
        names = {**names, name: value}
    else:
        new = _with_global(inner, name, value)
        if new is None or not any(cell.cell_contents is inner for cell in closure or ()):
            return None
        closure = tuple(CellType(new) if cell.cell_contents is inner else cell for cell in closure)
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    if inner is not None:
        copied.__wrapped__ = new
    return copied
