"""Adapters whose initialisation changed the base (PiSSA, OLoRA) rewritten as plain LoRA for the unchanged base.

With the initial factors A0, B0 taken out of the base and A, B trained, the change of the original weight is
s (B A - B0 A0) = s [B, -B0] [A; A0]: a LoRA of twice the rank.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfast.config import PeftConfig
from peftfast.files.io import load_peft_weights
from peftfast.wrapping.targets import pattern_value

_SLOT = re.compile(r"\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$")


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
    init = getattr(cfg, "init_lora_weights", None)
    if not (isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "lora_ga"))):
        raise ValueError(
            "`path_initial_model_for_weight_conversion` only works for `init_lora_weights` that change the base "
            f"('pissa', 'olora', 'corda'), got {init!r}"
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
    plain.r = cfg.r * 2
    plain.rank_pattern = {k: v * 2 for k, v in cfg.rank_pattern.items()}
    if cfg.use_rslora:
        plain.lora_alpha = cfg.lora_alpha * math.sqrt(2)
    else:
        plain.lora_alpha = cfg.lora_alpha * 2
        plain.alpha_pattern = {k: v * 2 for k, v in cfg.alpha_pattern.items()}
    return plain, result
