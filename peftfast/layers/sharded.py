"""Adapters where FSDP2 has taken the base apart and not them, or them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.sharding import as_copies, is_distributed, put_together

if TYPE_CHECKING:
    from peftfast.layers.layer import BaseTunerLayer


class _Beside(Adapter):
    """An adapter as the base is, taken apart or whole, where FSDP2 has taken one of the two apart alone: it was told to
    ignore the other, or the adapter came later."""

    __slots__ = ("_base",)

    def __init__(self, adapter: Adapter, layer: BaseTunerLayer, base: Tensor | None) -> None:
        super().__init__(adapter.name, adapter.cfg, adapter.key, adapter.method, adapter.slots, layer)
        self._base = base
        self.locate()

    def __getitem__(self, slot: str) -> Tensor:
        return as_copies(put_together(super().__getitem__(slot)), self._base)


def beside(layer: BaseTunerLayer, name: str, base: Tensor | None) -> Adapter:
    """An adapter of `layer` for sums with `base`, or with whole tensors (None), whatever FSDP2 has taken apart."""
    adapter = layer.adapters[name]
    tensors = adapter.parameters().values()
    apart = any(map(is_distributed, tensors))
    # torch gives no tensor another shape whose shards would not be of one size: by expert, or by block, and a vector of
    # channels, [1, C, ...], is all in one shard
    regrouped = not layer.site.adapts_output or getattr(adapter.method, "in_blocks", False)
    regrouped = regrouped or any(t.dim() > 2 and t.shape[0] == 1 for t in tensors)
    alike = apart == is_distributed(base) and not (apart and regrouped)
    return adapter if alike else _Beside(adapter, layer, base)
