"""QA-LoRA: y = W x + s B A pool(x), where pool(x) [K / group] has one number for every group of input features (Xu et
al., arXiv 2309.14717). Within a group the change of W is the same for all features, so that a base which is quantised
by groups can take it into its zero points.

As in PEFT, pool(x) is the mean of a group times the number of groups. PEFT has it for GPTQ only; here it is a LoRA on
any storage format: A with every column repeated is that of a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.method import register_method
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.packed import PackedLora
from peftfast.ops.composed import composed_lora
from peftfast.ops.plan import Way
from peftfast.sites import Slot
from peftfast.sites.called import register_plain
from peftfast.sites.holders import empty_module


def pool(x: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., K / group]."""
    groups = x.shape[-1] // group
    return x.unflatten(-1, (groups, group)).sum(-1) * (groups / group)


@register_plain
class PooledLinear(nn.Linear):
    """x [..., K] -> [..., out_features] by the weight [out_features, K / group] of x pooled."""

    group: int

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(pool(x, self.group), self.weight)


def _holder(in_features: int, out_features: int, group: int) -> nn.Module:
    return empty_module(PooledLinear, in_features=in_features, out_features=out_features, group=group)


@register_method
class QaLora(PackedLora):
    variant: ClassVar[str | None] = "use_qalora"
    by: ClassVar[str] = "qalora_group_size"

    @staticmethod
    def whole(how: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (a * (a.shape[1] / how)).unsqueeze(-1).expand(-1, -1, how).flatten(1), b

    def few(self, how: int) -> Way:
        return partial(composed_lora, read=partial(pool, group=how))

    def how(self, cfg: LoraConfig, key: str) -> int:
        return cfg.qalora_group_size

    def said(self, how: int) -> str:
        return f", inputs in groups of {how}"

    def small_slots(self, cfg: LoraConfig, settings: Mapping[str, Any], shape: tuple[int, int]) -> Mapping[str, Slot]:
        (_, k), r, group = shape, settings["r"], settings[self.by]
        if k % group:
            raise ValueError(
                f"`use_qalora=True` requires `module.in_features` ({k}) to be divisible by 'qalora_group_size' "
                f"({group})"
            )
        return {"lora_A": Slot((r, k // group), holder=partial(_holder, k // group, r, group))}
