"""What is in a saved adapter, in words: a line a module, without its base model; and which programs would load it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from peftfast.config import PeftConfig, plain_name
from peftfast.files.io import read_adapter
from peftfast.interop.servers import Facts, Verdict, judge_servers
from peftfast.keys import in_base
from peftfast.method import method_for
from peftfast.wrapping.patterns import pattern_value


class Contents(NamedTuple):
    """A saved adapter.

    Attributes:
        config: as it was saved. lines: module -> what the adapter does to it. servers: what other programs do with it.
    """

    config: PeftConfig
    lines: Mapping[str, str]
    servers: Sequence[Verdict] = ()

    def __str__(self) -> str:
        kind = plain_name(self.config.peft_type)
        head = f"{kind} for {self.config.base_model_name_or_path or 'a base model that it does not name'}"
        said = {v.server: "; ".join([v.verdict, *v.reasons]) for v in self.servers}
        return "\n".join([head, *_columns(self.lines), "in other programs", *_columns(said)])


def _columns(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines), default=0)
    return [f"  {name:<{width}}  {said}" for name, said in lines.items()]


def _natural(item: tuple[str, Any]) -> list[tuple[str, int]]:
    """Layer 10 behind layer 9."""
    return [("", int(part)) if part.isdigit() else (part, 0) for part in item[0].split(".")]


def adapter_contents(folder: str | os.PathLike, *, max_lora_rank: int = 16) -> Contents:
    """Read an adapter's folder or Hub repository and say what it does where: ranks, how large the change of a weight is
    and in how many directions most of it lies; which features IA3 makes larger and smaller; and what vLLM (started with
    `max_lora_rank`), SGLang, llama.cpp and MLX do with these files, in the releases that `interop/servers.py` names.

    Raises:
        ValueError: a file is not there. AdapterLoadError: one that is damaged.
    """
    stored = read_adapter(folder)
    method = method_for(stored.config)
    own: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        name = in_base(key).removesuffix(".weight")
        module, found, slot = name.rpartition(f".{method.prefix}")
        if found:
            own.setdefault(module, {})[method.prefix + slot] = tensor
        else:
            others[in_base(key)] = tensor
    lines = {
        module: method.describe(stored.config, module, tensors) for module, tensors in sorted(own.items(), key=_natural)
    }
    lines |= {key: f"kept whole, {' x '.join(map(str, tensor.shape))}" for key, tensor in others.items()}
    return Contents(stored.config, lines, judge_servers(_facts(stored.config, own, others, max_lora_rank)))


def _facts(cfg: PeftConfig, adapted: Collection[str], others: Collection[str], max_rank: int) -> Facts:
    """What servers' rules ask of a saved adapter; `others` are its keys that no module's adapter has."""
    lora = cfg.peft_type == "LORA"
    tokens = [key for key in others if "trainable_tokens_delta" in key]
    biases = [key for key in others if key.endswith(".bias")] if lora and cfg.bias != "none" else []
    # prompts have no place; a copy of what is under an adapter is the base's own
    modules = [key.rpartition(".")[0] for key in others if key not in (*tokens, *biases)]
    return Facts(
        cfg,
        ranks=[pattern_value(cfg.rank_pattern, module, cfg.r) for module in adapted] if lora else [],
        alphas=[pattern_value(cfg.alpha_pattern, module, cfg.lora_alpha) for module in adapted] if lora else [],
        max_rank=max_rank,
        modules=list(adapted),
        saved=list(dict.fromkeys(name for name in modules if name and not name.endswith(".base_layer"))),
        tokens=bool(tokens),
        parameters=[module for module in adapted if ".base_layer" in f".{module}"]
        or list(getattr(cfg, "target_parameters", None) or ()),
    )
