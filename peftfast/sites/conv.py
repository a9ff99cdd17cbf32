"""Convolutions of one to three dimensions, transposed ones too: the down factor has the base's kernel, the up factor is
1x1."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.ops.dora import weight_norm
from peftfast.sites.called import register_plain
from peftfast.sites.holders import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, conv_holder, empty_module
from peftfast.sites.site import Slot, UsualSite, probe_of, register_site

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class ConvSite(UsualSite):
    """y = W * x + bias with x [B, Cin, ...] and y [B, Cout, ...], or without B; W is seen as [Cout, Cin · kernel]."""

    def __init__(self, module: nn.Module) -> None:
        self.weight = base_weight(module)
        self._ones = (1,) * len(module.kernel_size)
        self._conv = _CONV[len(self._ones) - 1]
        self.groups = module.groups

    def probe(self) -> Tensor | None:
        m = self.module
        sizes = [2 * d * (k - 1) + 2 for k, d in zip(m.kernel_size, m.dilation, strict=True)]
        return probe_of(self, 1, m.in_channels, *sizes)

    def low_rank_slots(self, rank: int, bias: bool = False) -> Mapping[str, Slot]:
        m = self.module
        if rank % m.groups:
            raise ValueError(
                f"Targeting a {type(m).__name__} with groups={m.groups} and rank {rank}. Currently, support is limited "
                "to conv layers where the rank is divisible by groups. Either choose a different rank or do not target "
                "this specific layer."
            )
        up = partial(
            conv_holder, m, rank, m.out_channels, kernel_size=self._ones, stride=self._ones, dilation=self._ones,
            padding=(0,) * len(self._ones), padding_mode="zeros", groups=m.groups,
            _reversed_padding_repeated_twice=[0, 0] * len(self._ones), transposed=False,
            output_padding=(0,) * len(self._ones),
        )  # fmt: skip
        return {
            "lora_A": Slot((rank, m.in_channels, *m.kernel_size), holder=partial(self._down_holder, rank)),
            "lora_B": Slot(
                (m.out_channels, rank // m.groups, *self._ones), holder=up, bias=(m.out_channels,) if bias else None
            ),
        }

    def _down_holder(self, rank: int) -> nn.Module:
        return conv_holder(self.module, self.module.in_channels, rank)

    def adapt_each(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
        runs = a.shape[0]
        x, out = x.to(a.dtype).unflatten(0, (runs, -1)), y.unflatten(0, (runs, -1))
        scales = scale if isinstance(scale, Tensor) else [scale] * runs
        each = [self.up(self.down(x[i], a[i]), b[i]) * scales[i] for i in range(runs)]
        return (out + torch.stack(each)).to(y.dtype).view(y.shape)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        m = self.module
        if a.dim() == 2:  # factors that are kept as matrices
            a = a.reshape(len(a), -1, *m.kernel_size)
        if m.padding_mode != "zeros":
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
            return self._conv(x, a, None, m.stride, 0, m.dilation)
        return self._conv(x, a, None, m.stride, m.padding, m.dilation)

    def up(self, t: Tensor, b: Tensor) -> Tensor:
        if b.dim() == 2:
            b = b.reshape(*b.shape, *self._ones)
        return self._conv(t, b, groups=self.module.groups)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.module.groups > 1:
            # every output channel sees all input channels through A, which a grouped weight has no place for
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        return b.flatten(1), a.flatten(1)

    def _per_channel(self, s: Tensor) -> Tensor:
        return s.reshape(-1, *self._ones)

    def scale_output(self, y: Tensor, s: Tensor) -> Tensor:
        return (y * self._per_channel(s)).to(y.dtype)

    scale_input = scale_output

    def add_to_output(self, y: Tensor, v: Tensor) -> Tensor:
        return y + self._per_channel(v.to(y.dtype))

    def vector_shape(self, side: str) -> tuple[int, ...]:
        return (1, self.module.in_channels if side == "input" else self.module.out_channels, *self._ones)

    def on_weight(self, s: Tensor, side: str) -> Tensor:
        if side != "input":
            return s.reshape(-1, 1)
        m = self.module
        # every output channel sees the input channels of its own group
        per_row = s.reshape(m.groups, 1, -1).expand(-1, m.out_channels // m.groups, -1).reshape(m.out_channels, -1)
        return per_row.repeat_interleave(self.weight.shape[1] // per_row.shape[1], dim=1)

    def adapted_norm(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        if self.module.groups == 1:
            return weight_norm(self.weight.readable(), a.flatten(1), b.flatten(1), scale)
        # Every output channel sees all input channels through A, so the weight with the adapter inside is not a grouped
        # one, and has no norm of that shape. PEFT reads the numbers of B [N, r / groups] as [N / groups, r] and those
        # of its product with A as [N, K]. That is ‖W‖ while B is zero, and what magnitudes in files were trained
        # against, so they are divided by it here as well.
        wide = torch.promote_types(a.dtype, torch.float32)
        delta = (b.detach().to(wide).reshape(-1, len(a)) @ a.detach().to(wide).flatten(1)).view(self.weight.shape)
        return self.output_norm(self.weight.dense(wide) + scale * delta)


@register_plain
class TransposedDown(nn.Module):
    """The down factor of a transposed convolution as a module. In its weight [r, input channels, ...] the rank comes
    first, as in all down factors; in torch's own modules it would be second."""

    def forward(self, x: Tensor) -> Tensor:
        return _transposed(self, x, self.weight)


class TransposedConvSite(ConvSite):
    """y = W * x + bias where y [B, Cout, ...] may be larger than x [B, Cin, ...]; W is seen as [Cout, Cin · kernel]."""

    in_peft = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        if module.groups > 1:
            raise ValueError(f"{type(module).__name__} with groups={module.groups} is not supported, only groups=1 is")

    def base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise TypeError(
                f"An adapted {type(self.module).__name__} takes no output_size, of which its adapters would not know; "
                "set the module's output_padding"
            )
        return super().base(x)

    def _down_holder(self, rank: int) -> nn.Module:
        m = self.module
        same = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "output_padding", "dilation")}
        return empty_module(TransposedDown, in_channels=m.in_channels, out_channels=rank, **same)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        m = self.module
        return _transposed(m, x, a.reshape(len(a), -1, *m.kernel_size))


def _transposed(m: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    conv = _TRANSPOSED[len(m.kernel_size) - 1]
    return conv(x, a.transpose(0, 1), None, m.stride, m.padding, m.output_padding, 1, m.dilation)


for _kinds, _site in ((CONVOLUTIONS, ConvSite), (TRANSPOSED_CONVOLUTIONS, TransposedConvSite)):
    for _cls in _kinds:
        register_site(f"torch.nn.{_cls.__name__}", lambda module, _cls=_cls: isinstance(module, _cls))(_site)
