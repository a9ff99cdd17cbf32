"""Adapters whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA) rewritten as plain LoRA for the
unchanged base.

With the initial factors A0, B0 taken out of the base and A, B trained, the change of the original weight is
s (B A - B0 A0) = s [B, -B0] [A; A0]: a LoRA of twice the rank.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.files.io import Stored
from peftfast.files.state import adapter_entries
from peftfast.methods.lora.lora import scaling_of

_SLOT = re.compile(r"\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")


def changes_base(cfg: PeftConfig) -> str | None:
    """What the initialisation of such an adapter is called if it changed the base in a way that can be taken back."""
    kind = getattr(cfg, "base_changed_by", None)
    return None if kind == "LoftQ" else kind


def warn_beside_others(configs: Iterable[PeftConfig]) -> None:
    """Warn of several adapters on a base that one of them changed: the others were not trained for it."""
    configs = list(configs)
    kinds = [kind for kind in map(changes_base, configs) if kind is not None]
    if kinds and len(configs) > 1:
        warn(
            f"{kinds[0]} changes the base weights of the model and should thus not be used with other adapters. "
            f"Convert the {kinds[0]} adapter to a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            PeftWarning,
        )


def as_plain_lora(
    model: nn.Module, name: str, configs: Mapping[str, PeftConfig], tensors: Mapping[str, Tensor], initial: Stored
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of the plain LoRA that is equivalent to an adapter of `model`.

    Args:
        name: which of `configs`, those of all adapters of the model, is meant. tensors: its, by file key.
        initial: the adapter as saved right after its initialisation.

    Raises:
        ValueError: rsLoRA together with rank or alpha patterns, whose scaling cannot be doubled consistently, an
            initialisation that did not change the base, or one that is not the initial adapter's.
    """
    cfg: Any = configs[name]
    init = getattr(cfg, "init_lora_weights", None)
    # True is what saving the initial adapter needs, and what loading the result does; some leave it so in between
    if changes_base(cfg) is None and init is not True:
        raise ValueError(
            f"Adapter {name!r}: `path_initial_model_for_weight_conversion` only works for `init_lora_weights` that "
            f"change the base ('pissa', 'olora', 'corda', 'lora_ga'), got {init!r}"
        )
    if cfg.use_rslora and (cfg.rank_pattern or cfg.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "rsLoRA with `rank_pattern` or `alpha_pattern`."
        )
    layers = {e.file: e.layer for e in adapter_entries(model, name) if e.layer is not None and _SLOT.search(e.file)}
    adapters = {key: layer.adapters[name] for key, layer in layers.items()}
    _check_start(name, configs, tensors, adapters, initial)
    result = {}
    for key, tensor in tensors.items():
        if key not in adapters:
            result[key] = tensor
            continue
        before = initial.tensors[key].to(tensor)
        ranks, before = (0, before) if _SLOT.search(key)["factor"] == "A" else (1, -before)
        stacked = layers[key].site.experts
        have = tensor.shape[ranks] // stacked
        # a layer with fewer directions than the rank has fewer of them, but in the plain LoRA as many as any other
        missing = list(tensor.shape)
        missing[ranks] = 2 * (adapters[key].setting("r") - have) * stacked
        # every expert has its own ranks; A counts them expert by expert, B rank by rank
        runs = (stacked, -1) if ranks == 0 else (-1, stacked)
        parts = [part.unflatten(ranks, runs) for part in (tensor, before, tensor.new_zeros(missing))]
        result[key] = torch.cat(parts, dim=1).flatten(ranks, ranks + 1)
    plain: Any = copy.deepcopy(cfg)
    plain.init_lora_weights = True
    plain.corda_config = plain.lora_ga_config = None  # how it began means nothing any more
    plain.r = cfg.r * 2
    plain.rank_pattern = {k: v * 2 for k, v in cfg.rank_pattern.items()}
    if cfg.use_rslora:
        plain.lora_alpha = cfg.lora_alpha * math.sqrt(2)
    else:
        plain.lora_alpha = cfg.lora_alpha * 2
        plain.alpha_pattern = {k: v * 2 for k, v in cfg.alpha_pattern.items()}
    return plain, result


def _check_start(
    name: str,
    configs: Mapping[str, PeftConfig],
    tensors: Mapping[str, Tensor],
    adapters: Mapping[str, Adapter],
    initial: Stored,
) -> None:
    """ValueError if the adapter cannot have begun as `initial`."""
    cfg, start = configs[name], initial.tensors
    first = {key for key in start if _SLOT.search(key)}
    reasons = []
    for what, keys in (("initial adapter", adapters.keys() - first), ("adapter itself", first - adapters.keys())):
        if keys:
            reasons.append(f"the {what} has no {enumerate_some(sorted(keys))}")
    together = [key for key in adapters if key in start]
    shapes = [f"{key} {list(tensors[key].shape)}, there {list(start[key].shape)}" for key in together
              if tensors[key].shape != start[key].shape]  # fmt: skip
    if shapes:
        reasons.append(f"factors of another shape: {enumerate_some(shapes)}")
    scaled = [key for key in together
              if scaling_of(cfg, adapters[key].key) != scaling_of(initial.config, adapters[key].key)]  # fmt: skip
    if scaled:
        reasons.append(f"another scaling (r, lora_alpha, use_rslora) of {enumerate_some(scaled)}")
    init, began = (getattr(c, "init_lora_weights", None) for c in (cfg, initial.config))
    if init != began and True not in (init, began):
        reasons.append(f"init_lora_weights={init!r}, there {began!r}")
    changing = [n for n, other in configs.items() if n != name and changes_base(other) is not None]
    if init is True and changing:
        reasons.append(f"init_lora_weights=True, so it was {enumerate_some(changing)} that changed the base")
    if reasons:
        raise ValueError(
            f"Adapter {name!r} did not begin as the one that path_initial_model_for_weight_conversion names: "
            f"{'; '.join(reasons)}. Nothing was saved; selected_adapters= says which adapters are meant."
        )
