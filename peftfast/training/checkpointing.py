"""Gradient checkpointing: a block that is checkpointed the reentrant way passes gradients on only if its input requires
them, and the input of the first block comes from a frozen embedding. This sees to it, whoever switches checkpointing on
and whenever."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.embeddings import input_embeddings

_SWITCH = "gradient_checkpointing"


def require_input_gradients(model: nn.Module) -> None:
    """Make what enters the first block of `model` require gradients, if the model has an input embedding.

    Frozen weights stay frozen: nothing but the graph begins earlier.
    """
    # a compiler takes neither a flag set on an intermediate nor the reentrant way, and the other way needs no flag
    if torch.compiler.is_compiling():
        return
    embedding = input_embeddings(model)  # which adapters stand around, or no longer do
    if embedding is not None and _require_gradient not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_require_gradient)


def leave_input_gradients(model: nn.Module) -> None:
    """Undo `require_input_gradients`."""
    embedding = input_embeddings(model)
    hooks = {} if embedding is None else embedding._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _require_gradient]:
        del hooks[key]


class _Beginning(torch.autograd.Function):
    """The same numbers as the beginning of a graph. No leaf, so that models may write into them (BLIP's positions)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.data  # neither the tensor itself nor detached, either of which autograd takes for a view of a leaf

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _require_gradient(module: nn.Module, inputs: Any, output: Any) -> Any:
    # only where a graph is recorded: under no_grad there is none to begin
    recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if recorded and isinstance(output, Tensor) and output.is_floating_point() and not output.requires_grad:
        return _Beginning.apply(output, torch.empty(0, requires_grad=True))
    return None


def checkpointing_switches(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that have transformers' switch `gradient_checkpointing`, on or off."""
    return [m for m in model.modules() if _SWITCH in m.__dict__ or hasattr(type(m), _SWITCH)]


def is_checkpointing(switches: list[nn.Module]) -> bool:
    return any(module.gradient_checkpointing for module in switches)


def switch_on(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Checkpointing of transformers' models and others like them, by the method that is not deprecated.

    Args:
        kwargs: of `torch.utils.checkpoint.checkpoint`.

    Raises:
        TypeError: the model's method takes none, and some are given.
    """
    from transformers import PreTrainedModel

    # transformers 5.23 renames the method; where somebody wrote one of the old name, that is what is meant
    old = getattr(model, "gradient_checkpointing_enable", None)
    is_transformers = getattr(old, "__func__", None) is getattr(PreTrainedModel, "gradient_checkpointing_enable", None)
    if is_transformers and hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        return
    accepted = inspect.signature(model.gradient_checkpointing_enable).parameters
    if kwargs and "gradient_checkpointing_kwargs" not in accepted:
        raise TypeError(
            f"{type(model).__name__}.gradient_checkpointing_enable takes no arguments; gradient_checkpointing_kwargs="
            f"{kwargs} cannot be honoured"
        )
    arguments = {"gradient_checkpointing_kwargs": kwargs} if "gradient_checkpointing_kwargs" in accepted else {}
    model.gradient_checkpointing_enable(**arguments)
