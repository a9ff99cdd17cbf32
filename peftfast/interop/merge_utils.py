"""`peft.utils.merge_utils`: what `peftfast.methods.combination` does, under PEFT's names and with its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftfast.errors import warn
from peftfast.methods.combination import Combination, has_majority, keep_largest, random_pruning
from peftfast.methods.combination import disjoint_merge as disjoint_merge


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """The weights with as many dimensions as the stacked tensors have."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Only the share `density` of the values, those of the largest magnitude."""
    return keep_largest(tensor[None], density)[0]


def prune(tensor: Tensor, density: float, method: str, rescale: bool = False) -> Tensor:
    """Prune by "magnitude" or at "random"."""
    if density >= 1:
        warn(f"The density {density} is greater than or equal to 1, no pruning will be performed.")
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method not in ("magnitude", "random"):
        raise ValueError(f"Unknown method {method}")
    return (
        magnitude_based_pruning(tensor, density) if method == "magnitude" else random_pruning(tensor, density, rescale)
    )


def calculate_majority_sign_mask(tensor: Tensor, method: str = "total") -> Tensor:
    """Where the stacked tensors have the sign that most of them have, by magnitude or by their number ("frequency")."""
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    return has_majority(tensor, method)


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    return _combined("linear", task_tensors, weights)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    return _combined("magnitude_prune", task_tensors, weights, density)


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    return _combined("ties", task_tensors, weights, density, majority_sign_method)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    return _combined("dare_linear", task_tensors, weights, density)


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: str = "total"
) -> Tensor:
    return _combined("dare_ties", task_tensors, weights, density, majority_sign_method)


def _combined(
    kind: str, tensors: Sequence[Tensor], weights: Tensor, density: float | None = None, sign_method: str = "total"
) -> Tensor:
    how = Combination(kind, density=density, majority_sign_method=sign_method)
    how.check()
    return how.combine([tensor[None] for tensor in tensors], weights.tolist())[0]
