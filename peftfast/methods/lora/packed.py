"""LoRAs of which less is kept than a module is adapted by: factors that are made of what is kept, in every product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.methods.combination import Combination
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.lora import Lora, describe_change, pair_of, scaling_of
from peftfast.methods.lora.stack import factors
from peftfast.ops.plan import Part, Way
from peftfast.sites import Site, Slot
from peftfast.sites.bound import BoundLora

#: `init_lora_weights` of which every factor by itself can be filled.
_STARTS = (True, False, "gaussian")


class PackedLora(Lora):
    """A LoRA on linear layers whose factors A [r, K] and B [N, r] are made of smaller ones.

    Subclasses say which, in `small_slots` and `whole`. Making a factor takes as much memory as it has, rank-sized;
    everything else is then as for any LoRA.

    Attributes:
        by: the setting of a layer that says how factors are made.
    """

    by: ClassVar[str]

    @staticmethod
    def whole(how: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r] of what is kept; `how` is the setting `by`."""
        raise NotImplementedError

    def small_slots(self, cfg: LoraConfig, settings: Mapping[str, Any], shape: tuple[int, int]) -> Mapping[str, Slot]:
        """The slots that are not as in a plain LoRA, for W of `shape` [N, K]."""
        raise NotImplementedError

    def few(self, how: Any) -> Way | None:
        """A way to multiply few tokens by the factors as they are kept."""
        return None

    def said(self, how: Any) -> str:
        """For `peftfast inspect`: how its factors are made."""
        raise NotImplementedError

    def pair(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return self.whole(adapter.setting(self.by), *factors(adapter))

    def slots(self, site: Site, cfg: LoraConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        if cfg.init_lora_weights not in _STARTS:
            raise ValueError(
                f"{self.variant} does not go with init_lora_weights={cfg.init_lora_weights!r}, which makes whole "
                f"factors; use one of {', '.join(map(repr, _STARTS))}"
            )
        slots, r, (n, k) = super().slots(site, cfg, settings), settings["r"], site.weight.shape
        if [(name, slot.shape) for name, slot in slots.items()] != [("lora_A", (r, k)), ("lora_B", (n, r))]:
            raise ValueError(f"{self.variant} is for linear layers, not for a {type(site.module).__name__}")
        return {**slots, **self.small_slots(cfg, settings, (n, k))}

    def bind(self, site: Site, active: Sequence[Adapter]) -> BoundLora | None:
        if len(active) != 1 or active[0].cfg.lora_bias:
            return None
        how = active[0].setting(self.by)

        def made(part: Part) -> Part:
            a, b = self.whole(how, part.a, part.b)
            return part._replace(a=a, b=b)

        return site.bind(active[0], made, self.few(how))

    def describe(self, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        how = self.how(cfg, key)
        return describe_change(*self.whole(how, *pair_of(tensors)), scaling_of(cfg, key)) + self.said(how)

    def how(self, cfg: LoraConfig, key: str) -> Any:
        """The setting `by` at the module `key`."""
        raise NotImplementedError

    def settings(self, site: Site, cfg: LoraConfig, key: str) -> Mapping[str, Any]:
        return {**super().settings(site, cfg, key), self.by: self.how(cfg, key)}

    def for_slot(
        self, site: Site, cfg: LoraConfig, key: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, float]:
        """Slots of a pool hold whole factors."""
        settings = self.settings(site, cfg, key)
        slots = self.slots(site, cfg, settings)
        for name, tensor in tensors.items():
            if name in slots and tensor.shape != slots[name].shape:
                raise ValueError(f"{name} of {key} is {list(tensor.shape)}, its config means {list(slots[name].shape)}")
        if set(tensors) == set(slots):
            tensors = dict(zip(slots, self.whole(settings[self.by], *(tensors[n] for n in slots)), strict=True))
        return Lora().for_slot(site, cfg, key, tensors)

    def combined_fields(self, adapters: Sequence[Sequence[Adapter]], how: Combination) -> Mapping[str, Any]:
        """The result is a plain LoRA: most combinations cannot be kept so."""
        plain = LoraConfig.__dataclass_fields__[self.variant].default
        return {**super().combined_fields(adapters, how), self.variant: plain}
