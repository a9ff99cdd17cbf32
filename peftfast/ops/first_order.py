"""Backward passes that have no derivative of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a `Function.backward`: differentiating it a second time raises instead of giving zeros.

    torch's `once_differentiable`, at no cost in the usual backward pass, which records nothing that could be
    differentiated.
    """
    guarded = once_differentiable(backward)

    def wrapper(ctx: Any, *grads: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return wrapper
