"""torch's MultiheadAttention. It hands its weights to a function and calls no module, so what is adapted are the
weights for as long as it runs: the stacked projections of query, key and value, and with them that of the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.sites.parameter import ParameterSite, in_turn
from peftfast.sites.site import is_untouched, register_site


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


@register_site("torch.nn.MultiheadAttention", _is_attention)
class AttentionSite(ParameterSite):
    """in_proj_weight [3·E, E] of a MultiheadAttention.

    Raises:
        ValueError: query, key and value have weights of their own. TypeError: the output projection is no linear layer.
    """

    parts = ("out_proj",)

    def __init__(self, module: nn.MultiheadAttention) -> None:
        if not module._qkv_same_embed_dim:
            raise ValueError(
                "Only same embed for query/key/value is supported as of now for MultiheadAttention; this one has "
                f"embed_dim={module.embed_dim}, kdim={module.kdim}, vdim={module.vdim}"
            )
        out = getattr(module.out_proj, "base_layer", module.out_proj)
        if not isinstance(out, nn.Linear) or not out.weight.is_floating_point():
            raise TypeError(
                "out_proj must be an instance of nn.Linear for MultiheadAttention, and its weight in floating point; "
                f"this is {out}"
            )
        super().__init__(module, "in_proj_weight")

    def part(self, name: str) -> OutProjectionSite:
        child = getattr(self.module, name)
        return OutProjectionSite(getattr(child, "base_layer", child))


class OutProjectionSite(ParameterSite):
    """The weight [E, E] of `out_proj`: W + 2 s B A. PEFT (0.21.2) adds the change twice, in every forward and when
    merging; factors that it has trained mean that, and it reads ours so."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module, "weight")

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        left, right = super().factors(a, b)
        return 2.0 * left, right


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None


class _WithWeights:
    """A MultiheadAttention as its `forward` reads it, with other weights. Nothing of the module is swapped, so threads
    may run it at the same time."""

    def __init__(self, module: nn.MultiheadAttention, in_proj: Tensor, out_proj: Tensor) -> None:
        self._module = module
        self.in_proj_weight = in_proj
        self.out_proj = _Linear(out_proj, module.out_proj.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend(
    module: nn.MultiheadAttention, in_proj: Tensor, out_proj: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`module(*args, **kwargs)` with these weights.

    Args:
        out_proj: what `module.out_proj.weight` answers as well.
    """
    if type(module).forward is nn.MultiheadAttention.forward and is_untouched(module):
        return nn.MultiheadAttention.forward(_WithWeights(module, in_proj, out_proj), *args, **kwargs)
    # hooks and classes derived from it are given the module itself
    with in_turn(module):
        return torch.func.functional_call(module, {"in_proj_weight": in_proj}, tuple(args), dict(kwargs))
