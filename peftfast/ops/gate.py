"""Gates of a low-rank product: for every token, whether or how much each of its ranks acts.

The down factor's product t [M, r] is what is gated, being as narrow as a rank: inputs and outputs are never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated(t: Tensor, gate: Tensor | None) -> Tensor:
    """t [..., r] times a gate [..., 1] or [..., r]; a bool one puts zeros, also in place of what is not finite."""
    if gate is None:
        return t
    if gate.dtype is torch.bool:
        return torch.where(gate, t, 0.0)
    return (t * gate).to(t.dtype)


def gate_grad(p: Tensor, t: Tensor, gate: Tensor) -> Tensor:
    """The gradient of a gate, for p = ∂ / ∂ `gated(t, gate)`."""
    return (p * t).sum_to_size(gate.shape).to(gate.dtype)


def gate_rows(gate: Tensor | None) -> Tensor | None:
    """[M, 1] or [M, r] for a gate [..., 1] or [..., r] of an input [..., K] that is flattened to [M, K]."""
    return gate if gate is None or gate.dim() == 2 else gate.reshape(-1, gate.shape[-1])
