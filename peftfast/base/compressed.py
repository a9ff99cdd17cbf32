"""Models whose weights compressed-tensors keeps compressed until their first forward, which makes them dense."""

from __future__ import annotations

from torch import nn

_HOOK = "ct_decompress_hook"


def decompress(model: nn.Module) -> None:
    """What the first forward would do: adapters that come before it would be given weights in a format that they no
    longer have after it, and the library would take their layers for compressed ones."""
    handle = model.__dict__.get(_HOOK)
    hook = None if handle is None else model._forward_pre_hooks.get(handle.id)
    if hook is not None:
        hook(model, ())
