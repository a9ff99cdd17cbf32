"""Whether a model's head is the product with its weight, nothing less and nothing more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from peftfast.embeddings import output_embeddings
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.saved_modules import AuxiliaryTrainingWrapper
from peftfast.layers.walk import name_of
from peftfast.sites.site import is_untouched


def head_trouble(base: nn.Module, installed: Any = None) -> str | None:
    """Why a product with the head's weight is not what the head computes; None if it is.

    Args:
        installed: whose method in place of the head's `forward` is known not to matter.
    """
    head = output_embeddings(base)
    if head is None:
        return f"{type(base).__name__} has no head over a vocabulary"
    trouble = _trouble_of(head, installed)
    return None if trouble is None else f"{name_of(base, head) or type(head).__name__} {trouble}"


def _trouble_of(head: nn.Module, installed: Any) -> str | None:
    if isinstance(head, BaseTunerLayer):
        return f"is adapted ({', '.join(head.adapters)}), which a product with its weight would leave out"
    if isinstance(head, AuxiliaryTrainingWrapper):
        return f"is trained beside the adapter ({type(head).__name__})"
    if type(head) is not nn.Linear:
        return f"is a {type(head).__name__}, not a torch.nn.Linear"
    state = dict(head.__dict__)
    if installed is not None and getattr(state.get("forward"), "__self__", None) is installed:
        del state["forward"]
    if not is_untouched(SimpleNamespace(**state)):
        return "has hooks or another forward"
    if type(head.weight) is not nn.Parameter or head.weight.is_meta or not head.weight.is_floating_point():
        return "has a weight that is not an ordinary tensor"
    return None
