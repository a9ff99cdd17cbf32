"""Experts of transformers' mixture-of-experts models with changes of their weights, for the routed tokens only.

The classes that transformers decorates with `use_experts_implementation` promise what a function in its
`ALL_EXPERTS_FUNCTIONS` needs: where the weights are, how they lie, how the gate is applied. `routed_experts` is such a
function. It is called in place of the module rather than registered, because the name of the implementation in use is
part of the model's config, which all of its layers share and which is the user's to choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.autocast import is_autocasting, without_autocast
from peftfast.ops.experts import Groups, LowRank, MixedGroups, experts_linear
from peftfast.ops.function import transformed
from peftfast.sites.site import is_plain, is_untouched

#: Implementations of transformers' that compute this formula, and whether their products follow autocast.
_IMPLEMENTATIONS = {None: True, "eager": True, "batched_mm": True, "grouped_mm": False, "deepgemm": False,
                    "sonicmoe": False}  # fmt: skip
#: By the name of the Parameter: its change, or one for each position that tokens may name.
Changes = Mapping[str, LowRank | Sequence[LowRank]]


def has_routed_form(
    module: nn.Module, changes: Mapping[str, Sequence[LowRank]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether `routed_experts` is what the module would compute with these changes."""
    if torch.compiler.is_compiling() or transformed() or kwargs or len(args) != 3:
        return False  # what is routed where is known to the host at every call, and to no graph
    if not (hasattr(module, "_apply_gate") and hasattr(type(module).forward, "__wrapped__")):
        return False
    # transformers below 5.18 does not say so of experts that it has spread over devices, but leaves its plan there
    if getattr(module, "_is_expert_parallel", hasattr(module, "_hf_tp_plan")) or not is_untouched(module):
        return False
    if getattr(module.config, "_experts_implementation", "") not in _IMPLEMENTATIONS:
        return False
    names = {_up(module), "down_proj"}
    weights = [module._parameters.get(name) for name in names]
    x, experts, scores = args
    return (
        changes.keys() <= names
        and all(w is not None and w.dim() == 3 and w.shape[0] == module.num_experts for w in weights)
        and is_plain(
            x, experts, scores, *weights, *(t for each in changes.values() for a, b, _ in each for t in (a, b))
        )
        and not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        and x.dim() == 2
        and experts.shape == scores.shape == (x.shape[0], experts.shape[-1])
    )


def _is_gated(module: nn.Module) -> bool:
    return getattr(module, "has_gate", "gate_up_proj" in module._parameters)  # transformers 5.0 does not say


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if _is_gated(module) else "up_proj"


def routed_experts(
    module: nn.Module, changes: Changes, x: Tensor, experts: Tensor, scores: Tensor, owners: Tensor | None = None
) -> Tensor:
    """The output [T, K] of experts with low-rank changes of their weights.

    Args:
        x: [T, K]. experts, scores: [T, k], the experts of every token, and what their outputs are multiplied by.
        owners: [T] int64, which of several changes a token gets; -1 for none. None: there is one, for all tokens.
    """
    if owners is None:
        groups = Groups(experts, module.num_experts)
    else:
        groups = MixedGroups(experts, module.num_experts, owners, len(next(iter(changes.values()))))
    k = experts.shape[1]
    h = _linear(module, changes, _up(module), x.index_select(0, groups.order // k), groups)
    h = module._apply_gate(h) if _is_gated(module) else module.act_fn(h)
    y = _linear(module, changes, "down_proj", h, groups)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y * scores.reshape(-1).index_select(0, groups.order).unsqueeze(1)
    # back in the tokens' order, where a sum over neighbours is the same sum every time
    return y.index_select(0, torch.argsort(groups.order)).view(*experts.shape, y.shape[1]).sum(1).to(x.dtype)


def _linear(module: nn.Module, changes: Changes, name: str, x: Tensor, groups: Groups) -> Tensor:
    """The product with the weight `name` in the dtype in which the module's own implementation would compute it."""
    stored = module._parameters[name]
    w = stored if module.is_transposed else stored.transpose(1, 2)
    dtype = w.dtype
    if is_autocasting(x) and _IMPLEMENTATIONS[module.config._experts_implementation]:
        dtype = torch.get_autocast_dtype(x.device.type)
    with without_autocast(x):
        y = experts_linear(x.to(dtype), w, groups, changes.get(name))
    if not module.has_bias:
        return y
    return y + getattr(module, f"{name}_bias").index_select(0, groups.experts)  # in fp32 where it is stored so
