"""The adapter of every sample, as a tensor that a recording reads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from peftfast.many.router import Choice, resolve
from peftfast.rows.routing import BASE, Routing


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
    if isinstance(choice, Tensor):
        return routing.index
    places = {name: place for place, name in enumerate([BASE, *tuner.inventory.numbers], -1)}
    return torch.tensor([places[name] for name in choice], dtype=torch.int64, device=device)


def following(tuner: Any, index: Tensor, tokens: int | None, keeps: bool = True) -> AbstractContextManager[None]:
    """A context in which layers follow `index` as it is read on the device, on a CPU too. One for every forward: what
    layers share of a routing is worked out by the first of them and must be in the recording.

    Args:
        index: [B], see `chosen_adapters`. tokens: of a sample.
        keeps: stacks of factors are made once and outside the recording; False: in every forward, as training wants it.
    """
    names, _ = tuner.inventory.number_table(index.device)
    return tuner.inventory.control.use(Routing(names, index, None, tokens=tokens, keeps=keeps))


def check_routable(model: Any, tuner: Any, what: str) -> None:
    """ValueError if there are no layers whose adapters could be chosen by sample."""
    if tuner is None:
        raise ValueError(f"{what} chooses among the adapters of a PeftModel's layers; {type(model).__name__} has none")
