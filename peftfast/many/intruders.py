"""Weakening what a LoRA added in directions that the base did not have (Shuttleworth et al., arXiv 2410.21228)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftType, plain_name
from peftfast.errors import check_present
from peftfast.many.combining import add_weighted_adapter
from peftfast.methods.combination import Combination
from peftfast.methods.lora.combine import padded, svd_of_sum
from peftfast.methods.lora.stack import factors
from peftfast.rules import integer, number
from peftfast.sites import Site


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add and activate a copy of a LoRA whose intruder dimensions are weaker, so that the model forgets less of what it
    knew. The old adapter stays as it is.

    Of W + ΔW, a left singular vector that is like none of W's is an intruder. ΔW loses a part of each, and is brought
    back to its rank by an SVD.

    Args:
        top_k: how many singular vectors of W + ΔW are looked at, those of the largest singular values.
        threshold_epsilon: a vector is an intruder if its largest |cosine| with a singular vector of W is below this.
        mitigation_lambda: what is kept of an intruder's singular value, 1 for all of it.
        logging_sink: told of every layer; None: nobody is.

    Raises:
        ValueError: no such adapter, no plain LoRA, one of Parameters, the new name is taken, adapters are merged, or
            a number is out of its range. TypeError: one is none.
        NotImplementedError: ΔW is no weight of an adapted module (grouped convolutions).
    """
    top_k = integer(1).enforce(top_k, "top_k")
    number().enforce(threshold_epsilon, "threshold_epsilon")
    number().enforce(mitigation_lambda, "mitigation_lambda")
    log = logging_sink or (lambda line: None)
    configs = peft_model.peft_config
    check_present(old_adapter_name, configs)
    if new_adapter_name in configs:
        raise ValueError(f"Adapter with name '{new_adapter_name}' already exists.")
    cfg = configs[old_adapter_name]
    variant = getattr(cfg, "variant", None)
    if cfg.peft_type != PeftType.LORA or variant is not None:
        raise ValueError(
            "The provided model is not using LoRA and is therefore not supported: "
            f"{old_adapter_name} is {plain_name(cfg.peft_type)}{f' with {variant}' if variant else ''}."
        )
    if cfg.target_parameters:
        raise ValueError(
            f"reduce_intruder_dimension does not support adapters of Parameters, and {old_adapter_name} has "
            f"target_parameters={sorted(cfg.target_parameters)}"
        )
    inventory = peft_model.base_model.inventory
    merged = {name for layer in inventory.layers.values() for name in layer.merged_adapters}
    if merged:
        raise ValueError(f"The base weights contain {', '.join(sorted(merged))} now. Please unmerge first.")
    add_weighted_adapter(inventory, [old_adapter_name], [1.0], new_adapter_name, Combination("linear"))
    try:
        for key, layer in inventory.layers.items():
            old = layer.adapters.get(old_adapter_name)
            if old is None:
                continue
            count, pair = _reduced(layer.site, old, top_k, threshold_epsilon, mitigation_lambda)
            log(f"{key}: Intruders: {count}" if count else f"{key}: No intruders")
            new = layer.adapters[new_adapter_name]
            for axis, (slot, value) in enumerate(zip(new.pair, pair or factors(new), strict=True)):
                new[slot].data = padded(value, axis, new[slot].shape[axis]).to(old[slot].dtype)
            layer.changed(new_adapter_name)
    except BaseException:
        inventory.delete(new_adapter_name)
        raise
    log(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _reduced(
    site: Site, adapter: Adapter, top_k: int, threshold: float, kept: float
) -> tuple[int, tuple[Tensor, Tensor] | None]:
    """How many intruders there are, and factors with scaling 1 in which they are weaker, of the adapter's rank or the
    weight's if that is smaller; None where there are none."""
    a, b = (f.float() for f in factors(adapter))
    site.delta(a, b)  # raises where the product of the factors is no weight
    weight = site.weight.dense(torch.float32)
    weight = weight.t() if site.looks_up else weight
    down, up = a.flatten(1), adapter.scale * b.flatten(1)
    known, _, _ = torch.linalg.svd(weight, full_matrices=False)
    u, s, vh = torch.linalg.svd(weight + up @ down, full_matrices=False)
    found = torch.where((u[:, :top_k].t() @ known).abs().amax(1) < threshold)[0]
    if not len(found):
        return 0, None
    u, s, vh = svd_of_sum([(down, up), (vh[found], u[:, found] * s[found])], [1.0, kept - 1.0])
    root = s[: len(a)].sqrt()
    new_a, new_b = root[:, None] * vh[: len(a)], u[:, : len(a)] * root
    return len(found), (new_a.unflatten(1, a.shape[1:]), new_b.unflatten(1, (-1, *b.shape[2:])))
