"""LoRAs that do something else with their factors in the calls of training, and are plain ones in all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.method import sample_by_sample
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.lora import Lora
from peftfast.rows.routing import Rows
from peftfast.sites import Site
from peftfast.sites.bound import BoundLora


class TrainedOtherwise(Lora):
    """Subclasses say which calls are those of training, and what they do.

    Attributes:
        only_for_training: slots that nobody else has a use for, pools among them.
    """

    only_for_training: ClassVar[tuple[str, ...]]

    @staticmethod
    def trains(adapter: Adapter) -> bool:
        """Whether this call of the adapter is more than a LoRA's."""
        raise NotImplementedError

    def forward_training(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        """`forward` where one of the adapters `trains`."""
        raise NotImplementedError

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        if any(map(self.trains, active)):
            return self.forward_training(site, x, y, active)
        return super().forward(site, x, y, active)

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        """See `Bindable`: for calls that are a LoRA's."""
        (adapter, *others) = active
        if others or adapter.cfg.lora_bias:
            return None
        return site.bind(adapter, when=lambda x: not self.trains(adapter))

    def routed(self, site: Site, x: Tensor, y: Tensor | None, adapters: Sequence[Adapter], rows: Rows) -> Tensor:
        if any(map(self.trains, adapters)):
            return sample_by_sample(self, site, x, y, adapters, rows)
        return super().routed(site, x, y, adapters, rows)

    def for_slot(
        self, site: Site, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """See `Lora.for_slot`, to which nothing of `only_for_training` comes."""
        return Lora().for_slot(site, cfg, key, tensors)
