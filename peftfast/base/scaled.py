"""Weights of one byte each, codes in int8 or float8, that share a scale by blocks: transformers' FP8 modules, and
torchao's int8 and float8 tensors. The modules themselves multiply: most of them quantise the input as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftfast.base.opaque import ByModule
from peftfast.base.rounding import drawn, drawn_float
from peftfast.base.weight import comes_from, kept_copy, register_format


class Scaled(NamedTuple):
    """W [N, K]: `codes` [N, K], each times the scale of its block.

    Attributes:
        scales: [N / rows, K / columns] of a block, rounded up.
        block: (rows, columns). limit: the largest code.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    limit: float

    def spread(self, scales: Tensor) -> Tensor:
        """[N, K], or what stands for it: every weight's scale."""
        (n, k), (rows, columns) = self.codes.shape, self.block
        wide = scales if rows >= n else scales.repeat_interleave(rows, dim=0)[:n]
        return wide if columns >= k else wide.repeat_interleave(columns, dim=1)[:, :k]

    def drawn(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Codes of another W [N, K], fp32, of the same scales, rounded stochastically."""
        shares = weight / self.spread(self.scales.to(torch.float32))
        if self.codes.dtype.is_floating_point:
            return drawn_float(shares, self.codes.dtype, generator)
        least = min(-self.limit, float(self.codes.min()))  # some use the one code more that there is below zero
        levels = torch.arange(least, self.limit + 1, dtype=torch.float32, device=weight.device)
        return levels[drawn(shares, levels, generator).to(torch.int32)].to(self.codes.dtype)

    def dense(self) -> Tensor:
        return self.codes.to(torch.float32) * self.spread(self.scales.to(torch.float32))

    def quantised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of another W [N, K], fp32: a block's largest magnitude becomes the largest code."""
        (n, k), (rows, columns) = weight.shape, self.block
        rows, columns = min(rows, n), min(columns, k)
        blocks = nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
        largest = blocks.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
        steps = torch.where(largest > 0, largest / self.limit, 1.0)
        if self.scales.dtype == getattr(torch, "float8_e8m0fnu", None):  # powers of two
            steps = torch.exp2(torch.ceil(torch.log2(steps)))
        scales = steps.to(self.scales.dtype)
        codes = (weight / self.spread(scales.to(torch.float32))).clamp(-self.limit, self.limit)
        return (codes if self.codes.dtype.is_floating_point else codes.round()).to(self.codes.dtype), scales


class ScaledWeight(ByModule):
    """What the two formats have in common; each knows where its codes and scales are."""

    draws = True

    def scaled(self) -> Scaled:
        """Codes and scales, where they are stored.

        Raises:
            ValueError: they do not fit each other. NotImplementedError: they mean more than their product.
        """
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.scaled().dense().to(dtype or torch.float32)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        stored = self.scaled()
        self.restore(stored.quantised(weight.to(stored.codes.device, torch.float32)))

    @torch.no_grad()
    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        stored = self.scaled()
        stored.codes.copy_(stored.drawn(weight.to(stored.codes.device, torch.float32), generator))

    def snapshot(self, host: bool = False) -> tuple[Tensor, Tensor]:
        stored = self.scaled()
        return kept_copy(stored.codes, host), kept_copy(stored.scales, host)

    @torch.no_grad()
    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        for kept, own in zip(snapshot, self.scaled(), strict=False):
            own.copy_(kept)


@register_format
class Fp8Weight(ScaledWeight):
    """transformers' `FP8Linear`, `FP8Embedding`, `FbgemmFp8Linear`, `CompressedTensorsFP8Linear`, and others that keep
    a float8 `weight` [N, K] with a `weight_scale_inv` or `weight_scale`: one for all, one a row, or one a block of
    `block_size`."""

    quantization = "fp8"
    _SCALES = ("weight_scale_inv", "weight_scale")

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.element_size() != 1 or weight.dim() != 2:
            return False
        return any(isinstance(getattr(module, name, None), Tensor) for name in cls._SCALES)

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.shape)

    def scaled(self) -> Scaled:
        m = self.module
        scales = next(s for name in self._SCALES if isinstance(s := getattr(m, name, None), Tensor)).data
        codes, (n, k), block = m.weight.data, self.shape, getattr(m, "block_size", None)
        if scales.numel() == 1:
            found = scales.view(1, 1), (n, k)
        elif block is not None and tuple(scales.shape) == (-(-n // block[0]), -(-k // block[1])):
            found = scales, tuple(block)
        elif scales.numel() == n:
            found = scales.view(n, 1), (1, k)
        else:
            raise ValueError(
                f"{self.name or type(m).__name__}: the scales of its float8 weight [{n}, {k}] have shape "
                f"{list(scales.shape)}; there must be one, one a row, or one a block of block_size={block}"
            )
        return Scaled(codes, *found, torch.finfo(codes.dtype).max)


_INTEGERS = {f"torch.int{bits}": bits for bits in range(2, 9)}


@register_format
class TorchAoWeight(ScaledWeight):
    """`nn.Linear` with a weight of torchao's. What is more than codes and scales (packed, with zero points, ...) can
    be trained on and read, but not written: there is nothing to merge into."""

    quantization = "torchao"

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return comes_from(type(getattr(module, "weight", None)), "torchao", "TorchAOBaseTensor")

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.module.weight.shape)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def _simple(self) -> Scaled | None:
        """None where W is not codes times scales."""
        w = self.module.weight
        codes, scales, block = (getattr(w, name, None) for name in ("qdata", "scale", "block_size"))
        zero = getattr(w, "zero_point", None)
        if codes is None or scales is None or block is None or codes.element_size() != 1 or codes.shape != w.shape:
            return None
        if getattr(w, "act_pre_scale", None) is not None or (zero is not None and bool(zero.any())):
            return None
        if w.dim() != 2 or tuple(scales.shape) != tuple(-(-size // b) for size, b in zip(w.shape, block, strict=True)):
            return None
        if codes.dtype.is_floating_point:
            return Scaled(codes, scales, tuple(block), torch.finfo(codes.dtype).max)
        bits = _INTEGERS.get(str(getattr(w, "target_dtype", codes.dtype)))  # fewer may be kept in 8 each
        if bits is None or codes.dtype != torch.int8:
            return None
        bits -= bool(getattr(w, "reduce_range", False))
        return Scaled(codes, scales, tuple(block), 2.0 ** (bits - 1) - 1)

    def scaled(self) -> Scaled:
        found = self._simple()
        if found is None:
            kind = type(self.module.weight).__name__
            raise NotImplementedError(
                f"{self.name or type(self.module).__name__}: nothing can be merged into torchao's {kind} of this kind; "
                "merge_and_unload(dequantize=True) merges into dense weights"
            )
        return found

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        found = self._simple()
        weight = self.module.weight.dequantize() if found is None else found.dense()
        return weight.to(dtype or torch.float32)
