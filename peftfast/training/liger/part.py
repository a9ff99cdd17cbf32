"""Something of Liger's in one place of a model: put there, compared with what it replaces, taken away again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.training.comparing import agree

logger = logging.getLogger("peftfast")

DIFFERS = "it computes something else"


class Part:
    """One place.

    Attributes:
        state: "new", "on", or why it is off.
    """

    kind = ""

    def __init__(self, name: str) -> None:
        self.name, self.state = name, "new"
        self._put: list[tuple[nn.Module, str, Any, dict[str, Any]]] = []

    def attach(self) -> None:
        raise NotImplementedError

    def put(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Let `value` stand in for an attribute of this instance."""
        own = module.__dict__
        self._put.append((module, attribute, value, {attribute: own[attribute]} if attribute in own else {}))
        own[attribute] = value

    def detach(self) -> None:
        """Everything that was put somewhere is taken away, unless somebody has put something else there."""
        for module, attribute, value, before in reversed(self._put):
            if module.__dict__.get(attribute) == value:  # copies of a model have methods of their own, equal ones
                del module.__dict__[attribute]
                module.__dict__.update(before)
        self._put = []

    def off(self, why: str) -> None:
        self.state = f"off: {why}"
        logger.info("peftfast: Liger's %s at %s is %s", self.kind, self.name, self.state)
        self.detach()

    def decide(self, difference: Callable[[], str | None]) -> None:
        """On or off, by what `difference` says is different from what is replaced."""
        try:
            why = difference()
        except Exception as e:
            why = f"Liger cannot compute it here ({type(e).__name__}: {e})"
        if why is None:
            self.state = "on"
        else:
            self.off(why)

    def condition(self) -> str:
        """`state`, as it would be if it were used now."""
        return self.state


def same(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether two functions of tensors have equal values and gradients, but for rounding."""
    results = []
    for function in (ours, theirs):
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            out = list(out) if isinstance(out, (tuple, list)) else [out]
            # of no special direction: along its output, for one, the gradient of a norm vanishes
            along = [torch.arange(y.numel(), device=y.device).cos().view(y.shape).to(y.dtype) for y in out]
            grads = torch.autograd.grad(out, leaves, along)
        results.append([y.detach() for y in (*out, *grads)])
    return all(map(agree, *results))


def probe(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers that do not come from, and do not advance, the random generator."""
    values = torch.randn(shape, device="cpu", generator=torch.Generator().manual_seed(0))
    return values.to(device=like.device, dtype=dtype or like.dtype)
