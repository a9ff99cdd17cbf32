"""BD-LoRA: a LoRA of which A or B is block-diagonal, so that the slices of a layer on several devices need nothing of
each other's adapter. What is kept, and is in files, is the blocks one under the other; `ops.block_diagonal` multiplies
by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.method import register_method
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import initialise, start_bias
from peftfast.methods.lora.lora import up_bias
from peftfast.methods.lora.packed import PackedLora
from peftfast.methods.lora.stack import factors
from peftfast.ops.block_diagonal import by_blocks, grouped_lora, spread
from peftfast.ops.plan import Way
from peftfast.sites import Site, Slot
from peftfast.sites.called import register_plain
from peftfast.sites.holders import empty_module


@register_plain
class BlockDiagonalLinear(nn.Module):
    """x [..., in_features] -> [..., out_features] by a matrix of `nblocks` blocks on the diagonal.

    Attributes:
        weight: [out_features, in_features / nblocks], the blocks one under the other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, nblocks)
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks, dtype=dtype, device=device))
        if init_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return by_blocks(x.reshape(-1, self.in_features), self.weight).reshape(*x.shape[:-1], self.out_features)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """[out_features, in_features], with the zeros."""
        return spread(self.weight, self.nblocks)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"


def _check_sizes(in_features: int, out_features: int, blocks: int) -> None:
    if in_features % blocks or out_features % blocks:
        raise ValueError(
            f"a factor with in_features={in_features} and out_features={out_features} is not divisible by "
            f"nblocks={blocks}"
        )


def _holder(in_features: int, out_features: int, blocks: int) -> nn.Module:
    return empty_module(BlockDiagonalLinear, in_features=in_features, out_features=out_features, nblocks=blocks)


def blocks_of(cfg: LoraConfig, key: str) -> tuple[int | None, int | None]:
    """Of how many blocks A and B are at the module `key`; None for a whole factor.

    Raises:
        ValueError: both would be block-diagonal, or none, and the config is strict about that.
    """
    bd = cfg.use_bdlora
    down, up = (
        any(pattern in key for pattern in patterns or ())
        for patterns in (bd.target_modules_bd_a, bd.target_modules_bd_b)
    )
    if down and up:
        raise ValueError(f"Target {key} matches both A and B block-diagonal patterns of use_bdlora")
    if bd.match_strict and not down and not up:
        raise ValueError(
            f"Target {key} matches neither A nor B block-diagonal patterns of use_bdlora "
            f"({bd.target_modules_bd_a} and {bd.target_modules_bd_b}). With match_strict=False it gets a plain LoRA."
        )
    return bd.nblocks if down else None, bd.nblocks if up else None


@register_method
class BdLora(PackedLora):
    variant: ClassVar[str | None] = "use_bdlora"
    by: ClassVar[str] = "bdlora_blocks"  # of how many blocks A and B are, None for a whole factor
    in_blocks: ClassVar[bool] = True
    pads: ClassVar[bool] = False  # ranks lie in one run for each block, none at a factor's end

    @staticmethod
    def whole(how: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        down, up = how
        return a if down is None else spread(a, down), b if up is None else spread(b, up)

    def few(self, how: tuple[int | None, int | None]) -> Way:
        return grouped_lora

    def how(self, cfg: LoraConfig, key: str) -> tuple[int | None, int | None]:
        return blocks_of(cfg, key)

    def said(self, how: tuple[int | None, int | None]) -> str:
        return "".join(
            f", {name} in {count} blocks" for name, count in zip("AB", how, strict=True) if count is not None
        )

    def small_slots(self, cfg: LoraConfig, settings: Mapping[str, Any], shape: tuple[int, int]) -> Mapping[str, Slot]:
        (n, k), r, (down, up) = shape, settings["r"], settings[self.by]
        small = {}
        if down is not None:
            _check_sizes(k, r, down)
            small["lora_A"] = Slot((r, k // down), holder=partial(_holder, k, r, down))
        if up is not None:
            if cfg.lora_bias:
                raise ValueError("lora_bias=True: a block-diagonal B has no bias")
            _check_sizes(r, n, up)
            small["lora_B"] = Slot((n, r // up), holder=partial(_holder, r, n, up))
        return small

    def init(self, site: Site, adapter: Adapter) -> None:
        """As a plain LoRA begins, but for a block-diagonal A, which is uniform over what a block reads, as in PEFT."""
        whole = [torch.empty_like(factor) for factor in self.pair(adapter)]
        initialise(site, *whole, adapter)  # which draws as PEFT does, also what is not used
        if adapter.cfg.lora_bias:
            start_bias(site, up_bias(adapter), whole[1], adapter.cfg)
        (a, b), (down, up), start = factors(adapter), adapter.setting(self.by), adapter.cfg.init_lora_weights
        if down is None:
            a.copy_(whole[0])
        elif start == "gaussian":
            a.normal_(std=1 / adapter.setting("r"))
        else:
            nn.init.kaiming_uniform_(a)
        if up is None:
            b.copy_(whole[1])
        elif start is False:
            nn.init.kaiming_uniform_(b)
        else:
            b.zero_()
