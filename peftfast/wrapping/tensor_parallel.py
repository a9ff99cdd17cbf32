"""Bases that transformers has spread over processes by a `tp_plan`: the factor on the side that is spread is spread in
the same way, so that what goes between processes is of the rank's size."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.errors import enumerate_some
from peftfast.layers.layer import BaseTunerLayer, site_of
from peftfast.method import AdapterMethod, reads_base
from peftfast.wrapping.inventory import Inventory
from peftfast_kernels import keep_mask, keep_scale

#: Plan of a linear layer -> which of the two factors has the features that are spread.
_SPREAD = {"colwise": 1, "rowwise": 0}


class Spread(NamedTuple):
    """How one layer is spread: the plan's name, transformers' object for it, and the processes."""

    plan: str
    style: Any
    mesh: Any

    def take_apart(self, layer: BaseTunerLayer, name: str) -> None:
        """Let every process have its share of adapter `name`, which all have whole, as the first process has it."""
        adapter = layer.adapters[name]
        group = self.mesh.get_group()
        source = torch.distributed.get_global_rank(group, 0)
        for tensor in adapter.parameters().values():
            if not tensor.is_meta:
                torch.distributed.broadcast(tensor.data, source, group=group)
        holder = getattr(layer, adapter.pair[_SPREAD[self.plan]])[name]
        for parameter in ("weight", "bias"):
            self.style.shard_param(holder, parameter, self.mesh)
        self.style.install_forward(holder, self.mesh)
        dropout = layer.lora_dropout[name]
        if self.plan == "colwise" and isinstance(dropout, nn.Dropout):
            layer.lora_dropout[name] = SharedDropout(dropout.p, group).train(dropout.training)
        layer.spread = self.plan
        adapter.locate()


class SharedDropout(nn.Dropout):
    """The same mask in all processes, whose inputs are the same: the down factor's gradients would differ otherwise.
    The seed is the first process's, drawn anew in every call, so that checkpointing draws it again."""

    def __init__(self, p: float, group: Any) -> None:
        super().__init__(p)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        seed = torch.empty((), dtype=torch.int64, device=x.device).random_()
        torch.distributed.broadcast(seed, torch.distributed.get_global_rank(self._group, 0), group=self._group)
        keep = keep_mask(seed, self.p, x.numel() // x.shape[-1], x.shape[-1], x.device)
        return x * (keep.view(x.shape) * keep_scale(self.p)).to(x.dtype)


def plan_spreading(
    inventory: Inventory, cfg: PeftConfig, method: AdapterMethod, targets: Sequence[str], others: Collection[str]
) -> dict[str, Spread]:
    """How the targets are spread; those that are not are left out.

    Args:
        others: modules of which something else is to train: copies, rows of tokens, Parameters.

    Raises:
        NotImplementedError: what is spread cannot be adapted in this way. Nothing was changed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    plan, mesh = _plan_of(inventory.model)
    if not plan:
        older = [key for key in targets if getattr(inventory.base_module(key), "_hf_tp_plan", None) is not None]
        if older:
            raise NotImplementedError(
                f"{enumerate_some(older)} are spread over processes in the way of transformers before 5.17; adapters "
                "know the newer one"
            )
        return {}
    styles = {key: plan.get(_generic(key)) for key in targets}
    found = {key: style for key, style in styles.items() if style is not None}
    spread = [key for key in others if plan.get(_generic(key)) is not None]
    problem = None
    if spread:
        problem = f"{enumerate_some(spread)} cannot be trained in full or in part"
    elif unknown := {key: style for key, style in found.items() if style not in _SPREAD}:
        problem = f"{enumerate_some(list(unknown))}, spread by {sorted(set(unknown.values()))}, cannot be adapted"
    elif found and reads_base(cfg):
        problem = f"{type(cfg).__name__} with these settings starts from the weight, which no process has whole"
    elif bad := [key for key in found if not _is_a_pair(inventory, cfg, method, key)]:
        problem = f"{enumerate_some(bad)} can have a plain LoRA only, no {type(cfg).__name__} with other tensors"
    if problem:
        raise NotImplementedError(
            f"The model is spread over processes (tp_plan): {problem}. Linear layers that are spread by "
            f"{' or '.join(_SPREAD)} can have LoRAs; FSDP2 spreads models with every kind of adapter."
        )
    if not found:
        return {}
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    return {key: Spread(style, ALL_PARALLEL_STYLES[style], mesh) for key, style in found.items()}


def _generic(key: str) -> str:
    """A module's name as plans have it: with `*` in place of the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", key)


def _plan_of(model: nn.Module) -> tuple[dict[str, str], Any]:
    """Module name -> plan, and the processes; empty where the model is not spread in this way."""
    mesh = getattr(model, "_device_mesh", None)
    plan = getattr(model, "tp_plan", None)
    settings = getattr(getattr(model, "config", None), "distributed_config", None)
    if mesh is None or not plan or getattr(settings, "tp_size", 1) <= 1:
        return {}, None
    names = mesh.mesh_dim_names
    if names is not None and "tp" not in names:
        return {}, None
    return dict(plan), mesh["tp"] if mesh.ndim > 1 else mesh


def _is_a_pair(inventory: Inventory, cfg: PeftConfig, method: AdapterMethod, key: str) -> bool:
    """Whether all that the adapter keeps there are two factors in modules of their own."""
    site = site_of(inventory.module(key))
    slots = method.slots(site, cfg, method.settings(site, cfg, key))
    return len(slots) == 2 and all(slot.holder is not None for slot in slots.values())
