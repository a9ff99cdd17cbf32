"""Adapters whose initialisation changed the base (PiSSA, OLoRA, CorDA, LoRA-GA) rewritten as plain LoRA for the
unchanged base.

With the initial factors A0, B0 taken out of the base and A, B trained, the change of the original weight is
s (B A - B0 A0) = s [B, -B0] [A; A0]: a LoRA of twice the rank.
"""

from __future__ import annotations

import copy
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning
from peftfast.files.io import load_peft_weights
from peftfast.wrapping.targets import pattern_value

#: Beginnings of `init_lora_weights` -> what the method is called.
_CHANGES_BASE = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA", "lora_ga": "LoRA-GA"}
_SLOT = re.compile(r"\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")


def changes_base(cfg: PeftConfig) -> str | None:
    """What the initialisation of such an adapter is called if it changed the base in a way that can be taken back."""
    init = getattr(cfg, "init_lora_weights", None)
    if not isinstance(init, str):
        return None
    return next((name for beginning, name in _CHANGES_BASE.items() if init.startswith(beginning)), None)


def warn_beside_others(configs: Iterable[PeftConfig]) -> None:
    """Warn of several adapters on a base that one of them changed: the others were not trained for it."""
    configs = list(configs)
    kinds = [kind for kind in map(changes_base, configs) if kind is not None]
    if kinds and len(configs) > 1:
        warnings.warn(
            f"{kinds[0]} changes the base weights of the model and should thus not be used with other adapters. "
            f"Convert the {kinds[0]} adapter to a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
            PeftWarning,
            stacklevel=3,
        )


def as_plain_lora(
    cfg: PeftConfig, tensors: Mapping[str, Tensor], initial: str | os.PathLike
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of the equivalent plain LoRA.

    Args:
        initial: folder of the adapter as saved right after its initialisation.

    Raises:
        ValueError: rsLoRA together with rank or alpha patterns, whose scaling cannot be doubled consistently, or an
            initialisation that did not change the base.
    """
    # True is what saving the initial adapter needs, and what loading the result does; some leave it so in between
    if changes_base(cfg) is None and cfg.init_lora_weights is not True:
        raise ValueError(
            "`path_initial_model_for_weight_conversion` only works for `init_lora_weights` that change the base "
            f"('pissa', 'olora', 'corda', 'lora_ga'), got {getattr(cfg, 'init_lora_weights', None)!r}"
        )
    if cfg.use_rslora and (cfg.rank_pattern or cfg.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "rsLoRA with `rank_pattern` or `alpha_pattern`."
        )
    start = load_peft_weights(initial)
    result = {}
    for key, tensor in tensors.items():
        if key not in start:
            raise ValueError(f"The initial adapter in {initial} has no {key!r}")
        before = start[key].to(tensor)
        slot = _SLOT.search(key)
        if slot is None:
            result[key] = tensor
            continue
        ranks = 0 if slot["factor"] == "A" else 1
        # a layer with fewer directions than the rank has fewer of them, but in the plain LoRA as many as any other
        missing = list(tensor.shape)
        missing[ranks] = 2 * max(0, pattern_value(cfg.rank_pattern, key[: slot.start()], cfg.r) - missing[ranks])
        parts = [tensor, before if slot["factor"] == "A" else -before, tensor.new_zeros(missing)]
        result[key] = torch.cat(parts, dim=ranks)
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
