"""Weights that a model ties to its input embedding, and rows of them that are trained: what a config means for every
module that has such a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.embeddings import input_embeddings
from peftfast.errors import close_matches, warn
from peftfast.keys import ends_of
from peftfast.layers.layer import without_adapters
from peftfast.sharding import whole_shape
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.targets import name_ends


def embedding_name(inventory: Inventory) -> str:
    """Name of the input embedding inside the model."""
    embedding = input_embeddings(inventory.model)
    for name in inventory.names:
        module = inventory.module(name)
        if embedding is module or embedding is without_adapters(module):  # models may answer with either
            return name
    raise ValueError("The model's input embedding is not among its modules")


def tied_module_names(inventory: Inventory) -> list[str]:
    """Modules whose weight is the input embedding's, other than the embedding itself."""
    model = inventory.model
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or input_embeddings(model) is None:
        return []
    embedding = embedding_name(inventory)
    own = {key.rpartition(".")[0]: source for key, source in _tied_keys(inventory).items()}
    weight = _base_weight(inventory.module(embedding))
    tied = []
    for name, source in own.items():
        if name in inventory.names and name != embedding:
            same = _base_weight(inventory.module(name)) is weight
            if same or source is None or source.rpartition(".")[0] == embedding:
                tied.append(name)
    return tied


def _tied_keys(inventory: Inventory) -> dict[str, str | None]:
    """Parameter -> the one it is tied to, as the model and its parts declare; None where they do not say to which."""
    found: dict[str, str | None] = {}
    for prefix in ("", *inventory.names):
        module = inventory.module(prefix) if prefix else inventory.model
        keys = getattr(module, "_tied_weights_keys", None) or ()
        inside = f"{prefix}." if prefix else ""
        for key in keys:
            found.setdefault(inside + key, inside + keys[key] if isinstance(keys, Mapping) else None)
    return found


def _base_weight(module: nn.Module) -> Tensor | None:
    """The weight of a module, or of the one that an adapter or a kept copy stands for."""
    return getattr(without_adapters(module), "weight", None)


_TIED_WARNING = (
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` is not "
    "set to True. This can lead to complications, for example when merging the adapter or converting your model to "
    "formats other than safetensors."
)


def plan_tying(inventory: Inventory, cfg: PeftConfig, heads: list[str]) -> tuple[list[str], list[str]]:
    """The `heads` that follow the input embedding's adapter, and those that follow the copy kept of it, if the config
    asks for that; it names the embedding instead of them from then on."""
    ensure = getattr(cfg, "ensure_weight_tying", False)
    if not heads:
        if ensure:
            rows = getattr(cfg, "trainable_token_indices", None)
            warn(
                "ensure_weight_tying=True but the model does not have tied weights: the rows in "
                "trainable_token_indices are trained apart in every module"
                if rows
                else "You have requested `ensure_weight_tying`, but no tied modules were found in the model"
            )
        return [], []
    embedding = embedding_name(inventory)
    both = [embedding, *heads]
    targets, saved = cfg.target_modules, list(getattr(cfg, "modules_to_save", None) or ())
    if isinstance(targets, str):
        targeted = [n for n in both if re.fullmatch(targets, n)]
    else:
        targeted = [n for n in both if not set(targets or ()).isdisjoint(ends_of(n))]
    kept = [n for n in both if any(n.endswith(s) for s in saved)]
    if not ensure:
        if targeted or kept:
            warn(_TIED_WARNING)
        return [], []
    if kept:
        cfg.modules_to_save = [s for s in saved if not any(h.endswith(s) for h in heads)]
        if embedding not in cfg.modules_to_save:
            cfg.modules_to_save.append(embedding)
        return [], heads
    if targeted:
        if isinstance(targets, str):
            cfg.target_modules = rf"(?:{targets}|^{re.escape(embedding)}$)"
        else:
            own = set(targets).difference(*map(ends_of, heads))
            cfg.target_modules = own | {embedding}
        return heads, []
    warn(
        "You have requested `ensure_weight_tying`, but no tied modules are added in either `modules_to_save` or "
        "`target_modules`"
    )
    return [], []


def plan_tokens(
    inventory: Inventory, cfg: PeftConfig, rows: Any, heads: list[str]
) -> tuple[dict[str, list[int]], list[str]]:
    """Module name -> rows to train, and the tied `heads` among them that share the input embedding's."""
    if rows is None:
        return {}, []
    if not isinstance(rows, dict):
        if input_embeddings(inventory.model) is None:
            raise ValueError(
                "trainable_token_indices as a list needs a model with get_input_embeddings(); give a dict "
                "{module name: rows} instead"
            )
        rows = {embedding_name(inventory): rows}
    plan: dict[str, list[int]] = {}
    for target, indices in rows.items():
        found = [n for n in inventory.names if target in ends_of(n)]
        if not found:
            raise ValueError(
                f"trainable_token_indices: Target modules {{{target!r}}} not found in the base model."
                f"{close_matches(target, name_ends(inventory.names))}"
            )
        for key in found:
            module = inventory.module(key)
            weight = _base_weight(module)
            shape = whole_shape(weight) if isinstance(weight, Tensor) else ()
            if len(shape) != 2:
                raise ValueError(f"trainable_token_indices: {key!r} is a {type(module).__name__}, not a table of rows")
            outside = [i for i in indices if i >= shape[0]]
            if outside:
                raise ValueError(
                    f"trainable_token_indices {outside} are outside {key!r}, which has rows 0 to {shape[0] - 1}; "
                    "model.resize_token_embeddings(...) adds rows"
                )
            plan[key] = list(indices)
    embedding = embedding_name(inventory) if heads else None
    if embedding not in plan:
        return plan, []
    own = {h: plan[h] for h in heads if h in plan}
    if any(indices != plan[embedding] for indices in own.values()):
        if getattr(cfg, "ensure_weight_tying", False):
            raise ValueError(
                "Cannot ensure weight tying when different token indices are specified for modules that share one "
                "weight, got "
                f"trainable_token_indices { ({embedding: plan[embedding], **own}) }"
            )
        return plan, []  # rows of their own, as asked
    others = {key: indices for key, indices in plan.items() if key not in own}
    return others | dict.fromkeys(heads, plan[embedding]), heads
