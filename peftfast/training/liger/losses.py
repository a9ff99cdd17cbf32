"""Cross-entropy of a causal language model: how transformers counts tokens, and Liger's from logits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.training.liger.part import DIFFERS, Part, probe, same


def token_loss(
    operation: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """As transformers' ForCausalLMLoss: every position is to foretell the next token.

    Args:
        operation: (*inputs, targets [B · T], ignore_index=, reduction=) -> loss [].
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets, count = shift_labels.reshape(-1).to(inputs[0].device), num_items_in_batch
    loss = operation(*inputs, targets, ignore_index=ignore_index, reduction="mean" if count is None else "sum")
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def other_loss(base: nn.Module) -> str | None:
    """Why a model's loss is not the one that `token_loss` computes; None if it is."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    function = getattr(base, "loss_function", None)
    if function is ForCausalLMLoss or isinstance(getattr(function, "__self__", None), CrossEntropy):
        return None
    return f"the model's loss is {getattr(function, '__name__', function)}, not ForCausalLMLoss"


class CrossEntropy(Part):
    """The model's `loss_function`, from logits."""

    kind = "cross-entropy"

    def __init__(self, name: str, base: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.base, self.operation = base, operations.liger_cross_entropy

    def attach(self) -> None:
        why = other_loss(self.base)
        if why is not None:
            self.off(why)
        else:
            theirs = self.base.loss_function
            self.put(self.base, "_loss_function", self.loss)
            self.decide(lambda: self._difference(theirs))

    def _difference(self, theirs: Callable[..., Tensor]) -> str | None:
        weight = next(p for p in self.base.parameters() if p.is_floating_point())
        labels = torch.tensor([[1, 0, 2, -100, 3]], device=weight.device)
        logits = probe(1, 5, 7, like=weight)
        for count in (None, 9):
            settings = labels, 7, count
            if not same(lambda x, s=settings: self.loss(x, *s), lambda x, s=settings: theirs(x, *s), logits):
                return DIFFERS
        return None

    def loss(self, logits: Tensor, labels: Tensor | None, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the model's loss function."""
        rows = logits.float().view(-1, vocab_size)
        if rows.requires_grad and logits.dtype == torch.float32:
            rows = rows.clone()  # Liger writes the gradient over its input, which is the model's output as well
        return token_loss(self.operation, (rows,), labels, *args, **kwargs)
