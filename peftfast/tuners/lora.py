"""The module around LoRA adapters and their variants."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.methods.lora.kasa import DIAGONAL, kasa_loss
from peftfast.methods.lora.monteclora import SAMPLER, monteclora_loss
from peftfast.tuners.steps import PeftSteps
from peftfast.tuners.tuner import BaseTuner


class LoraModel(PeftSteps, BaseTuner):
    """A model with LoRA, QLoRA or DoRA adapters."""

    prefix = "lora_"

    def _get_kasa_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What a training with KaSA adds to its loss, as in PEFT: see `peftfast.methods.lora.kasa.kasa_loss`.

        Args:
            adapter_names: of which adapters; None: the active ones. Others than KaSA's count for nothing.
        """
        return kasa_loss([adapter for adapter in self._adapters_of(adapter_names) if DIAGONAL in adapter.slots])

    def _get_monteclora_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """The same for MonteCLoRA: see `peftfast.methods.lora.monteclora.monteclora_loss`."""
        return monteclora_loss([adapter for adapter in self._adapters_of(adapter_names) if SAMPLER in adapter.slots])

    def _adapters_of(self, names: str | Sequence[str] | None) -> list[Adapter]:
        """These adapters, or the active ones, in every layer that has them."""
        names = self.active_adapters if names is None else [names] if isinstance(names, str) else names
        return [adapter for name in names for adapter in self.inventory.adapters(name)]
