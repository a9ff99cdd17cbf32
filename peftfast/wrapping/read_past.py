"""The warning of modules whose weights others read instead of calling them: an adapter there has no effect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.sites import parts_of
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.parameters import Targets, full_names
from peftfast.wrapping.parents import never_calls


def say_read_by_parents(inventory: Inventory, keys: Iterable[str], parameters: Targets) -> None:
    """Warn of modules, and Parameters of modules, that their parents read the weights of instead of calling them."""
    unused, in_evaluation = defaultdict(list), []
    for key in (*keys, *parameters):
        parent, _, leaf = key.rpartition(".")
        kind = inventory.base_module(parent) if parent in inventory.names else inventory.model
        if key not in parameters and never_calls(kind, leaf):
            unused[type(kind), leaf].append(key)
        elif isinstance(kind, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            if key in parameters:
                in_evaluation += full_names({key: parameters[key]})
            elif not parts_of(inventory.base_module(key)):  # what is read of an attention has the adapters in it
                in_evaluation.append(key)
    for (parent_class, leaf), read in unused.items():
        torchs = "torch.nn." if parent_class.__module__.startswith("torch.") else ""
        warn(
            f"{enumerate_some(read)}: {torchs}{parent_class.__name__} reads the weight of its {leaf} and never calls "
            f"it, so an adapter there is neither used nor trained. Leave it out (exclude_modules=[{leaf!r}]).",
            PeftWarning,
        )
    if in_evaluation:
        warn(
            f"{enumerate_some(in_evaluation)}: in evaluation without gradients torch.nn.TransformerEncoderLayer reads "
            "these weights itself, past any adapter. Merge before evaluating, or switch that off: "
            "torch.backends.mha.set_fastpath_enabled(False).",
            PeftWarning,
        )
