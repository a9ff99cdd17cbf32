"""Arithmetic on adapters: weighted sums, pruning by magnitude or at random (DARE, Yu et al., arXiv 2311.03099), sign
election (TIES, Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfast.errors import close_matches, warn
from peftfast.rules import integer, number, optional


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
        if self.kind != "cat" and _ARITHMETIC[self.arithmetic][0] is not None:
            if self.density is None:
                raise TypeError(f"combination_type {self.kind!r} needs a density: a number >= 0 and, to prune, < 1")
            number().enforce(self.density, "density")
            if self.density < 0:
                raise ValueError(f"Density should be >= 0, got {self.density}")
            if self.density >= 1:
                warn(f"The density {self.density} is greater than or equal to 1, no pruning will be performed.")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        optional(integer(1)).enforce(self.svd_rank, "svd_rank")
        optional(number(0, 1)).enforce(self.svd_clamp, "svd_clamp")

    def combine(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The tensors [P, ...], all of one shape, as one. Each of the P parts is pruned by itself."""
        w = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        prune, add = _ARITHMETIC[self.arithmetic]
        if prune is not None and self.density < 1:
            tensors = [prune(tensor, self.density) for tensor in tensors]
        return add(torch.stack(list(tensors)), w.view(-1, *(1,) * tensors[0].dim()), self)


def _linear(stacked: Tensor, weights: Tensor, how: Combination) -> Tensor:
    return (stacked * weights).sum(0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Of each of the parts [P, ...] the share `density` of the values, those of the largest magnitude."""
    flat = tensor.flatten(1)
    keep = flat.abs().topk(int(density * flat.shape[1])).indices
    return tensor * torch.zeros_like(flat).scatter_(1, keep, 1).view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool = True) -> Tensor:
    """Values kept with probability `density`; with `rescale` scaled so that the expectation stays."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def has_majority(stacked: Tensor, method: str) -> Tensor:
    """Where the stacked tensors have the sign that most of them have, by magnitude ("total") or by their number."""
    sign = stacked.sign()
    votes = stacked if method == "total" else sign
    return sign == torch.where(votes.sum(0) >= 0, 1, -1)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean, per element, of what the mask keeps of the stacked tensors."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1.0)


def _elect(stacked: Tensor, weights: Tensor, how: Combination) -> Tensor:
    return disjoint_merge(stacked * weights, has_majority(stacked, how.majority_sign_method))


_Prune = Callable[[Tensor, float], Tensor]
_Add = Callable[[Tensor, Tensor, Combination], Tensor]

#: How values are pruned first, if they are, and how what is left is added.
_ARITHMETIC: dict[str, tuple[_Prune | None, _Add]] = {
    "linear": (None, _linear),
    "ties": (keep_largest, _elect),
    "dare_linear": (random_pruning, _linear),
    "dare_ties": (random_pruning, _elect),
    "magnitude_prune": (keep_largest, _linear),
}

KINDS = ("svd", "cat", *_ARITHMETIC, *(f"{kind}_svd" for kind in _ARITHMETIC if kind != "linear"))


def named_together(fields: Sequence[str | Collection[str] | None]) -> str | set[str] | None:
    """What several configs name, each by a pattern, or each by a list of modules; None where some do one and some the
    other."""
    if all(isinstance(field, str) for field in fields):
        return "|".join(f"({field})" for field in fields)
    if any(isinstance(field, str) for field in fields):
        return None
    return set().union(*(field or () for field in fields))


def split_weight(weight: float) -> tuple[float, float]:
    """A factor for each of a pair, whose product is `weight`."""
    root = math.sqrt(abs(weight))
    return (root if weight >= 0 else -root), root
