"""KappaTune: which weights to adapt, by their condition numbers. Weights whose singular values are alike have the least
that is particular to few directions, and so the least to forget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.devices import singular_values
from peftfast.files.state import without_places
from peftfast.layers.walk import base_of
from peftfast.rules import integer, number, optional
from peftfast.wrapping.targets import linear_modules

#: How the names of Parameters end that hold the weights of all experts of a layer.
EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value, the mean over the matrices of a stack; infinite for a lost rank."""
    values = singular_values(weight.float())
    return (values[..., 0] / values[..., -1]).nan_to_num(nan=math.inf, posinf=math.inf).mean().item()


class KappaTuneSelector:
    """Condition numbers of a model's weights, computed once, when first asked for.

    Args:
        model: a base model, or one with adapters, which count for nothing; quantised weights count as what they stand
            for.
        max_dim_size_to_analyze: larger matrices are left out.
        moe_param_suffixes: how the names of Parameters of fused experts end; one string, or several.
        show_progress: with a progress bar; singular values of a large model take minutes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: str | tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.largest, self.show_progress = base_of(model), max_dim_size_to_analyze, show_progress
        suffixes = moe_param_suffixes or EXPERTS
        self.suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of the linear layers with the smallest condition numbers, the smallest first.

        Args:
            num_modules: as many. top_p: else this share of them, at least one. threshold: else those up to it.
        """
        if self._modules is None:
            weights = [(name, base_weight(module)) for name, module in linear_modules(self.model)]
            weights = [(name, weight) for name, weight in weights if self._is_analysed(*weight.shape)]
            with torch.no_grad():
                self._modules = {
                    name: condition_number(weight.dense(torch.float32))
                    for name, weight in self._progress(weights, "layers")
                }
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same for Parameters of fused experts."""
        if self._parameters is None:
            stacks = [
                (name, parameter)
                for name, parameter in ((without_places(n), p) for n, p in self.model.named_parameters())
                if name.endswith(self.suffixes) and parameter.dim() == 3 and self._is_analysed(*parameter.shape[1:])
            ]
            with torch.no_grad():
                self._parameters = {
                    name: condition_number(parameter) for name, parameter in self._progress(stacks, "experts")
                }
        return _best(self._parameters, top_p, num_modules, threshold)

    def _is_analysed(self, *sizes: int) -> bool:
        return max(sizes) <= self.largest

    def _progress(self, items: Sequence[tuple[str, Any]], what: str) -> Iterable[tuple[str, Any]]:
        from tqdm.auto import tqdm

        return tqdm(items, desc=f"Condition numbers of {what}", disable=not self.show_progress)


def _best(
    numbers: Mapping[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    optional(integer(0)).enforce(num_modules, "num_modules")
    optional(number(0, 1)).enforce(top_p, "top_p")
    names = sorted(numbers, key=numbers.__getitem__)
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: str | tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` (None where the model has no fused experts) for a LoraConfig: the share
    `top_p` of each with the smallest condition numbers. Other arguments as of `KappaTuneSelector`."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is a share of the weights, above 0 and at most 1, got {top_p!r}")
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
