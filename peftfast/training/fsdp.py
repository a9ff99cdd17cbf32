"""What FSDP1 is to wrap."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from torch import nn


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable:
    """Wrapping policy for FSDP1, which needs `use_orig_params=True`: every transformer block, and every leaf with a
    trained weight that is called as a module. The factors of adapted layers are not: fused kernels read their tensors
    from outside, where FSDP1 would leave a flat shard, so they are gathered with their block. FSDP1 then also reduces
    zeros for the block's frozen weights; FSDP2 does not.

    Args:
        model: names its blocks in `_no_split_modules`; the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP (class
            names joined by commas) overrides it.

    Raises:
        TypeError: the model has no module of a named class.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    found = {type(m).__name__: type(m) for m in model.modules()}
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if named is None:  # parts of a model may name blocks of their own, and blocks that this one has not
        blocks = {n for m in model.modules() for n in getattr(m, "_no_split_modules", None) or ()}
        wanted = [n for n in found if n in blocks]
    else:
        wanted = [n for n in named.split(",") if n]
    missing = [n for n in wanted if n not in found]
    if missing:
        raise TypeError(f"Could not find the transformer layer class to wrap in the model: {', '.join(missing)}")

    read_from_outside = {
        m for layer in model.modules() if hasattr(layer, "adapter_layer_names") for m in layer.modules()
    }

    def is_trained_leaf(module: nn.Module) -> bool:
        if module in read_from_outside or next(module.children(), None) is not None:
            return False
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad

    return functools.partial(
        _or_policy,
        policies=[
            functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf),
            functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={found[n] for n in wanted}),
        ],
    )
