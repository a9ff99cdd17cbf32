"""A PeftModel whose adapters may be of different types, and of which several may be active."""

from __future__ import annotations

from collections.abc import Sequence

from peftfast.config import PeftConfig, PeftType, plain_name
from peftfast.model import PeftModel
from peftfast.tuners.mixed import MixedModel
from peftfast.tuners.tuner import BaseTuner

#: What can be mixed, and the class around it: methods that add to a layer's output, which sum in any order.
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, type[BaseTuner]] = {
    PeftType.LORA: MixedModel,
    PeftType.ADALORA: MixedModel,
}


class PeftMixedModel(PeftModel):
    """A base model with adapters of different types: `get_peft_model(model, config, mixed=True)`.

    Differs from a `PeftModel` in that `add_adapter` takes any type that can be mixed, and `set_adapter` and
    `delete_adapter` take several names.
    """

    def tuner_class(self, peft_config: PeftConfig) -> type[BaseTuner]:
        self.check_type(peft_config)
        return PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_config.peft_type]

    def check_type(self, peft_config: PeftConfig) -> None:
        if peft_config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            known = ", ".join(t.value for t in PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise ValueError(
                f"The provided `peft_type` '{plain_name(peft_config.peft_type)}' is not compatible "
                f"with the `PeftMixedModel`. Compatible types are: {known}"
            )

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters, as a list."""
        return self._tuner.active_adapter

    @active_adapter.setter
    def active_adapter(self, names: str | list[str]) -> None:
        self.set_adapter(names)

    @property
    def active_peft_config(self) -> PeftConfig:
        if not self.active_adapters:
            raise ValueError(f"No adapter is active; there are {list(self.peft_config)}")
        return self.peft_config[self.active_adapters[0]]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, whose changes sum: trainable unless `inference_mode`, all others frozen."""
        self._tuner.set_adapter(self._known(adapter_name), inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Delete adapters, or none if one of them is merged."""
        names = self._known(adapter_name)
        self._tuner.inventory.check_deletable(names)
        for name in names:
            self._tuner.delete_adapter(name)

    def _known(self, names: str | Sequence[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        unknown = sorted(n for n in names if n not in self.peft_config)
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")
        return names

    def counterparts(self) -> tuple[str, ...]:
        return ("mixed_model.PeftMixedModel",)
