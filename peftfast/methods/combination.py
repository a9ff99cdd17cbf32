"""Arithmetic on adapters: weighted sums, pruning by magnitude or at random (DARE, Yu et al., arXiv 2311.03099), sign
election (TIES, Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfast.errors import close_matches, warn


@dataclass(frozen=True)
class Combination:
    """How adapters become one; the arguments of `add_weighted_adapter`.

    Attributes:
        kind: one of `KINDS`. density: share of values that pruning keeps.
        svd_rank: of the result; None: the largest. svd_clamp: quantile at which factors are clamped.
        svd_full_matrices, svd_driver: of `torch.linalg.svd`.
        majority_sign_method: "total" weighs signs by magnitude, "frequency" counts them.
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def on_products(self) -> bool:
        """Whether it acts on the products B A, which are decomposed again, rather than on the factors."""
        return self.kind.endswith("svd")

    @property
    def arithmetic(self) -> str:
        """The kind without where it acts."""
        return "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")

    def check(self) -> None:
        """Raises ValueError or TypeError for what cannot be meant."""
        if self.kind not in KINDS:
            raise ValueError(
                f"Invalid combination_type: {self.kind}.{close_matches(self.kind, KINDS)} One of {', '.join(KINDS)}"
            )
        if _ARITHMETIC.get(self.arithmetic, _linear) is not _linear:
            if self.density is None:
                raise TypeError(f"combination_type {self.kind!r} needs a density: a number >= 0 and, to prune, < 1")
            if self.density < 0:
                raise ValueError(f"Density should be >= 0, got {self.density}")
            if self.density >= 1:
                warn(f"The density {self.density} is greater than or equal to 1, no pruning will be performed.")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank must be at least 1, got {self.svd_rank}")

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The tensors [P, ...], all of one shape, as one. Each of the P parts is pruned by itself."""
        w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        return _ARITHMETIC[self.arithmetic](list(tensors), w.view(-1, *(1,) * tensors[0].dim()), self)


def _linear(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    return (torch.stack(tensors) * weights).sum(0)


def _magnitude_prune(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    return _linear([_keep_largest(t, how.density) for t in tensors], weights, how)


def _ties(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    return _elect([_keep_largest(t, how.density) for t in tensors], weights, how)


def _dare_linear(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    return _linear([_keep_random(t, how.density) for t in tensors], weights, how)


def _dare_ties(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    return _elect([_keep_random(t, how.density) for t in tensors], weights, how)


_ARITHMETIC: dict[str, Callable[[list[Tensor], Tensor, Combination], Tensor]] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}

KINDS = ("svd", "cat", *_ARITHMETIC, *(f"{kind}_svd" for kind in _ARITHMETIC if kind != "linear"))


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    flat = tensor.flatten(1)
    keep = flat.abs().topk(int(density * flat.shape[1])).indices
    return tensor * torch.zeros_like(flat).scatter_(1, keep, 1).view(tensor.shape)


def _keep_random(tensor: Tensor, density: float) -> Tensor:
    """Values kept with probability `density` and scaled so that the expectation stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def _elect(tensors: list[Tensor], weights: Tensor, how: Combination) -> Tensor:
    """Per element the weighted mean of the values that have the majority's sign."""
    stacked = torch.stack(tensors)
    sign = stacked.sign()
    votes = stacked if how.majority_sign_method == "total" else sign
    agrees = sign == torch.where(votes.sum(0) >= 0, 1, -1)
    return (stacked * weights * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)


def split_weight(weight: float) -> tuple[float, float]:
    """A factor for each of a pair, whose product is `weight`."""
    root = math.sqrt(abs(weight))
    return (root if weight >= 0 else -root), root
