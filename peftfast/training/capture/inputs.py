"""Buffers that batches are copied into: the same keys, shapes and dtypes every time, and constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def buffers_for(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A buffer for every tensor; anything else is a constant."""
    return {k: v.detach().to(device, copy=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def check_batch(inputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """ValueError if `batch` does not fit into the buffers, or has other constants."""
    missing, new = inputs.keys() - batch.keys(), batch.keys() - inputs.keys()
    if missing or new:
        raise ValueError(
            f"A captured step takes the inputs it was captured with, {', '.join(inputs)}; "
            + "; ".join(f"{what} {', '.join(sorted(k))}" for what, k in (("missing", missing), ("new", new)) if k)
        )
    for name, buffer in inputs.items():
        value = batch[name]
        if isinstance(buffer, Tensor) and isinstance(value, Tensor):
            if value.shape != buffer.shape or value.dtype != buffer.dtype:
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}, but the step was captured for {buffer.dtype} "
                    f"{list(buffer.shape)}. Pad the batch, or capture another step for this shape."
                )
        elif isinstance(buffer, Tensor) or isinstance(value, Tensor) or value != buffer:
            raise ValueError(f"{name} is {_short(value)}, but the step was captured with {_short(buffer)}")


@torch.no_grad()
def copy_batch(inputs: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    """A batch that fits, into the buffers."""
    for name, buffer in inputs.items():
        if isinstance(buffer, Tensor):
            buffer.copy_(batch[name], non_blocking=buffer.is_cuda)


def _short(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
