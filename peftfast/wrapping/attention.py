"""Which parts of a MultiheadAttention are adapted with it, and what cannot be adapted beside it."""

from __future__ import annotations

from collections.abc import Sequence

from peftfast.config import PeftConfig
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.method import AdapterMethod
from peftfast.sites import parts_of
from peftfast.wrapping.inventory import Inventory


def plan_attention(
    inventory: Inventory, cfg: PeftConfig, method: AdapterMethod, matched: Sequence[str], saved: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The matched modules that are adapted by themselves, and the names of all parts that are adapted with them.

    Args:
        saved: names that `modules_to_save` matched.

    Raises:
        ValueError: a part that is to be adapted or kept by itself; something that adapters of a MultiheadAttention
            cannot do.
    """
    parts = {f"{n}.{part}": n for n in matched for part in parts_of(inventory.base_module(n))}
    taken = dict(parts)
    for name, layer in inventory.layers.items():
        if not inventory.is_nested(name):
            taken |= {f"{name}.{where.removeprefix('base_layer.')}": name for where in layer.inside()}
    alone = [n for n in matched if n not in parts]
    for name in (*alone, *saved, *(n for n in parts if n in inventory.layers or n in inventory.extras)):
        if name in taken:
            raise ValueError(
                f"{name} is a part of {taken[name]} and cannot be adapted or kept by itself where that is adapted"
            )
    if parts:
        _check_settings(enumerate_some(dict.fromkeys(parts.values())), cfg, method)
    return alone, list(parts)


def _check_settings(names: str, cfg: PeftConfig, method: AdapterMethod) -> None:
    what = f"{names}: MultiheadAttention does not support"
    if not hasattr(method, "changes"):
        raise ValueError(f"{what} {type(cfg).__name__}, only LoRA")
    if cfg.use_dora:
        raise ValueError(f"{what} DoRA (yet), please set use_dora to False")
    if cfg.variant is not None:
        raise ValueError(f"{what} {cfg.variant}, please leave it out")
    if cfg.lora_bias:
        raise ValueError(f"{what} lora_bias=True, please set it to False")
    if cfg.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"{what} init_lora_weights={cfg.init_lora_weights!r}; use True, False or 'gaussian'")
    if cfg.lora_dropout:
        warn(
            f"{names}: lora_dropout={cfg.lora_dropout} has no effect in MultiheadAttention, which takes changed "
            "weights and no adapter's output (as in PEFT).",
            PeftWarning,
        )
