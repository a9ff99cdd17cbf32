"""What a low-rank linear is at one call, apart from its input: the same for all ways of computing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peftfast.autocast import autocast_dtype
from peftfast_kernels.decode import Operand


class Plan(NamedTuple):
    """What is fixed before the product: everything that is not a tensor."""

    format: str
    shape: tuple[int, int]
    dtype: torch.dtype  # of the base product
    branch: torch.dtype  # of the low-rank branch
    scale: float
    dropout: float
    block: int = 64  # of a 4-bit weight, and of its nested scales
    nested_block: int = 256

    def weight(self, stored: Sequence[Tensor]) -> Operand:
        """The base weight over the tensors that autograd kept."""
        return Operand(self.format, list(stored), self.shape, self.dtype, self.block, self.nested_block)


class Part(NamedTuple):
    """A low-rank linear at one call: everything but its input."""

    w: Operand  # [N, K]
    bias: Tensor | None  # [N]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    plan: Plan


#: How a product is computed: (x [..., K], part) -> [..., N].
Way = Callable[[Tensor, Part], Tensor]


def branch_dtype(x: Tensor, factor: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype of the low-rank branch: autocast's, else the wider of input and factors, so that fp32 factors on a
    bf16 base are applied in fp32 as PEFT applies them."""
    if autocast is not None:
        return autocast
    return x.dtype if x.dtype == factor.dtype else torch.promote_types(x.dtype, factor.dtype)


def plan_of(w: Operand, branch: torch.dtype, scale: float, dropout: float) -> Plan:
    """The plan, which is the same for every call until one of these changes."""
    return Plan(w.format, w.shape, w.dtype, branch, float(scale), dropout, w.block, w.nested_block)


def plan_beside(x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Plan:
    """The plan of factors that are added to an output which the base module has computed."""
    autocast = autocast_dtype(x)
    branch = branch_dtype(x, a, autocast)
    # under autocast the input is used in the branch's dtype; otherwise as it is
    dtype = x.dtype if autocast is None else branch
    return Plan("", (b.shape[0], a.shape[1]), dtype, branch, float(scale), dropout)
