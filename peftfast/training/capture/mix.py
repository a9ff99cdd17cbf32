"""The adapter of every sample in decoding, as a tensor that a recording reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftfast.many.router import Choice, resolve
from peftfast.many.routing import BASE


def chosen_adapters(
    tuner: Any, ids: Tensor, mask: Tensor | None, choice: Choice | None, device: torch.device
) -> Tensor:
    """[B] places among the names of `tuner.inventory.number_table`; -1 for the base model.

    Args:
        ids, mask: [B, T] prompts, as a router is given them.
        choice: what `adapter_names` was; None: the router's choice, or the active adapter.

    Raises:
        ValueError, TypeError: what `resolve` has to say about the choice; several active adapters.
    """
    if choice is None and tuner.router is not None:
        choice = tuner.router.choose({"input_ids": ids, "attention_mask": mask})
    if choice is None:
        active = list(tuner.active_adapters) or [BASE]
        if len(active) > 1:
            raise ValueError(f"Several adapters are active ({', '.join(active)}): pass adapter_names=")
        choice = active * ids.shape[0]
    routing = resolve(tuner.inventory, choice, (ids,), {})
    if not isinstance(choice, Tensor):  # places among all names, not among those that occur here
        routing = resolve(tuner.inventory, tuner.adapter_numbers(list(choice), device), (ids,), {})
    return routing.index
