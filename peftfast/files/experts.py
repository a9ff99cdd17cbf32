"""Factors of experts as earlier releases laid them out, brought to today's layout: one pair a layer of every expert
(transformers 4), and the two factors the other way round (PEFT up to 0.18)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import AdapterLoadError, enumerate_some
from peftfast.files.entry import Entry
from peftfast.files.migrate import expert_layout
from peftfast.sites.parameter import ParameterSite
from peftfast.version import COMPATIBLE_PEFT_VERSION
from peftfast.wrapping.expert_targets import family_of

_ONE_EXPERT = re.compile(r"^(?P<experts>.+)\.(?P<expert>\d+)\.(?P<layer>[^.]+)\.lora_(?P<factor>[AB])\.weight$")


def migrate_experts(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Entry], cfg: PeftConfig, base: nn.Module
) -> dict[str, Tensor]:
    """Tensors of a file under today's keys and in today's layout.

    Args:
        tensors: keys as `entries` has them. cfg: of the file.

    Raises:
        AdapterLoadError: some experts are missing, or the layout cannot be told.
    """
    stacks = _stacks(entries)
    if not stacks:
        return dict(tensors)
    tensors = dict(tensors)
    turned = [_turn(tensors, f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight", site, cfg)
              for site, prefix in stacks.values()]  # fmt: skip
    if any(turned):
        cfg.peft_version = COMPATIBLE_PEFT_VERSION  # or what is saved next would be turned again
    return _fused(tensors, stacks, base)


def _stacks(entries: Mapping[str, Entry]) -> dict[str, tuple[ParameterSite, str]]:
    """Full name of every adapted Parameter -> its site, and what its factors' keys begin with."""
    found = {}
    for key, entry in entries.items():
        site = None if entry.layer is None else entry.layer.site
        if site is not None and not site.adapts_output:
            prefix = key.rpartition(".lora_")[0]
            found[f"{prefix.replace('.base_layer', '')}.{site.parameter}"] = (site, prefix)
    return found


# ---- one pair an expert ---------------------------------------------------------------------------------
def _fused(
    tensors: Mapping[str, Tensor], stacks: Mapping[str, tuple[ParameterSite, str]], base: nn.Module
) -> dict[str, Tensor]:
    try:
        family = family_of(base)
    except ImportError:
        family = None
    if family is None:
        return dict(tensors)
    left: dict[str, Tensor] = {}
    single: dict[tuple[str, str], dict[tuple[int, str], Tensor]] = {}
    for key, tensor in tensors.items():
        for old, new in family.moved.items():
            key = key.replace(f".{old}.", f".{new}.")
        found = _ONE_EXPERT.match(key)
        if found and f"{found['experts']}.{family.parameters.get(found['layer'])}" in stacks:
            single.setdefault((found["experts"], found["layer"]), {})[int(found["expert"]), found["factor"]] = tensor
        else:
            left[key] = tensor
    if not single:
        return left
    for name, (site, prefix) in stacks.items():
        experts, _, parameter = name.rpartition(".")
        layers = [layer for layer in family.fused.get(parameter, [parameter]) if (experts, layer) in single]
        layers = layers or [old for old, new in family.renamed.items() if new == parameter and (experts, old) in single]
        if layers:
            pairs = [_pair(single[experts, layer], f"{experts}.*.{layer}", site.experts) for layer in layers]
            left[f"{prefix}.lora_A.weight"], left[f"{prefix}.lora_B.weight"] = _side_by_side(pairs)
    return left


def _pair(parts: Mapping[tuple[int, str], Tensor], name: str, count: int) -> tuple[Tensor, Tensor]:
    """[E, r, K] and [E, N, r] of one layer of every expert."""
    missing = [f"{name.replace('*', str(e))}.lora_{f}" for e in range(count) for f in "AB" if (e, f) not in parts]
    if missing:
        raise AdapterLoadError(f"The file has factors of some experts only; it lacks {enumerate_some(missing)}")
    try:
        a, b = (torch.stack([parts[e, f] for e in range(count)]) for f in "AB")
    except RuntimeError as e:
        raise AdapterLoadError(f"The experts' factors {name} are not of one shape: {e}") from e
    return a, b


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Factors [E·r, K] and [N, r·E] of weights that lie below each other: ranks add up, and each pair has its own."""
    a = torch.cat([a for a, _ in pairs], dim=1)
    rows, ranks = (sum(b.shape[i] for _, b in pairs) for i in (1, 2))
    together = pairs[0][1].new_zeros(a.shape[0], rows, ranks)
    row = rank = 0
    for _, b in pairs:
        together[:, row : row + b.shape[1], rank : rank + b.shape[2]] = b
        row, rank = row + b.shape[1], rank + b.shape[2]
    return a.flatten(0, 1), together.permute(1, 2, 0).flatten(1)


# ---- the other way round --------------------------------------------------------------------------------
def _turn(tensors: dict[str, Tensor], a_key: str, b_key: str, site: ParameterSite, cfg: PeftConfig) -> bool:
    a, b, shape = tensors.get(a_key), tensors.get(b_key), site.weight.value.shape
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(shape) != 3:
        return False
    if {a.shape[1], b.shape[0]} != set(shape[1:]) or a.shape[0] != b.shape[1] or a.shape[0] % shape[0]:
        return False  # what is wrong with them is said where they are compared
    if expert_layout(cfg.peft_version, a.shape, b.shape, shape, site.transposed) == site.reads:
        return False
    tensors[a_key] = b.reshape(b.shape[0], -1, site.experts).permute(2, 1, 0).flatten(0, 1)
    tensors[b_key] = a.reshape(site.experts, -1, a.shape[1]).permute(2, 1, 0).flatten(1)
    return True
