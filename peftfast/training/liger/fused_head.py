"""Head and loss in one, never holding all logits."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.autocast import is_autocasting
from peftfast.embeddings import output_embeddings
from peftfast.layers.walk import name_of
from peftfast.modes import without_dropout
from peftfast.training.blocks import uncounted
from peftfast.training.liger.head import head_trouble
from peftfast.training.liger.losses import other_loss, token_loss
from peftfast.training.liger.part import Part

_thread = threading.local()  # whose head stands aside in this thread, and whether a loss was asked for


class FusedHead(Part):
    """Stands in for the model's `forward`: in a training step the head hands on its input, and the loss function, which
    knows that, multiplies by the head's weight. Called with anything else, or after somebody has adapted the head, it
    changes nothing.

    The first step is computed both ways and compared.

    Args:
        explicit: somebody relies on it; that it cannot be used is an error.
    """

    kind = "fused linear cross-entropy"

    def __init__(self, base: nn.Module, operations: ModuleType, explicit: bool) -> None:
        self.base, self.head, self.explicit = base, output_embeddings(base), explicit
        super().__init__(name_of(base, self.head) or "the model")
        self.operation = operations.liger_fused_linear_cross_entropy

    def attach(self) -> None:
        why = head_trouble(self.base) or other_loss(self.base)
        if why is not None:
            self.off(why)
            return
        self.__signature__ = inspect.signature(self.base.forward)  # trainers read which columns it takes
        self.loss_before, self.forward_before = self.base.loss_function, self.base.__dict__.get("forward")
        self.put(self.base, "_loss_function", self.loss)
        self.put(self.base, "forward", self)
        self.put(self.head, "forward", self.project)

    def condition(self) -> str:
        trouble = head_trouble(self.base, self) if self.state in ("new", "on") else None
        return self.state if trouble is None else f"off: {trouble}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state not in ("new", "on") or not self._is_step(kwargs):
            return self._plain(*args, **kwargs)
        if self.state == "new":
            self._check(args, kwargs)
        return self._fused(*args, **kwargs) if self.state == "on" else self._plain(*args, **kwargs)

    def _is_step(self, kwargs: Mapping[str, Any]) -> bool:
        returns = kwargs.get("return_dict", getattr(self.base.config, "return_dict", True))
        kept = kwargs.get("logits_to_keep", 0)
        return (
            self.base.training
            and torch.is_grad_enabled()
            and kwargs.get("labels") is not None
            and isinstance(kept, int)
            and not kept
            and returns is not False
            and not torch.compiler.is_compiling()
            and head_trouble(self.base, self) is None
        )

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward_before is not None:
            return self.forward_before(*args, **kwargs)
        return type(self.base).forward(self.base, *args, **kwargs)

    def _fused(self, *args: Any, **kwargs: Any) -> Any:
        _thread.aside = self
        try:
            output = self._plain(*args, **kwargs)
        finally:
            _thread.aside = None
        return type(output)(**{k: v for k, v in output.items() if k != "logits"})  # those were hidden states

    def project(self, x: Tensor) -> Tensor:
        """In place of the head's `forward`."""
        return x if getattr(_thread, "aside", None) is self else type(self.head).forward(self.head, x)

    def loss(self, logits: Tensor, labels: Tensor | None, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the model's loss function."""
        _thread.asked = True
        if getattr(_thread, "aside", None) is self:
            return self._from_hidden(logits, labels, *args, **kwargs)
        return self.loss_before(logits, labels, vocab_size, *args, **kwargs)

    def _from_hidden(self, hidden: Tensor, labels: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.head.weight
        rows = hidden.reshape(-1, weight.shape[1])
        if rows.dtype != weight.dtype and not is_autocasting(rows):
            rows = rows.to(weight.dtype)
        operation = partial(self.operation, bias=self.head.bias)
        return token_loss(operation, (rows, weight), labels, *args, **kwargs)

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        with torch.no_grad(), without_dropout(self.base), uncounted():
            _thread.asked = False
            theirs = self._plain(*args, **kwargs).loss
            if _thread.asked:
                self.decide(lambda: self._difference(self._fused(*args, **kwargs).loss, theirs))
            else:
                self.off("the model computes its loss without its loss_function")
        if self.explicit and self.state != "on":
            raise RuntimeError(f"fused_linear_cross_entropy=True: {self.name} is {self.state}")

    def _difference(self, ours: Tensor, theirs: Tensor) -> str | None:
        # logits are rounded to the head's dtype in both, in another order
        eps = torch.finfo(torch.bfloat16 if is_autocasting(theirs) else self.head.weight.dtype).eps
        limit = (4 if eps > 1e-5 else 64) * eps
        if torch.allclose(ours.float(), theirs.float(), rtol=limit, atol=limit, equal_nan=True):
            return None
        return f"its loss is another one, {ours.item():.6g} instead of {theirs.item():.6g}"
