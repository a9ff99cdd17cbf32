"""What a module is that stands in for one of the base model and has its own way with adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peftfast.layers.activation import HasActivation
from peftfast.rows.control import Control


class StandIn(HasActivation):
    """Mixin of the modules that stand in for a module of the base model and keep, per adapter, what only they know: a
    copy of the module, rows of an embedding, or whatever a user's own layer has. `original_module` is the module.
    """

    adapter_layer_names: tuple[str, ...] = ()  # where tensors of adapters are kept, by adapter
    other_param_names: tuple[str, ...] = ()  # the same for what is no tensor

    def __init__(self) -> None:
        super().__init__()
        self._adapters: set[str] = set()
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.__dict__["control"] = Control()

    # ---- which are active --------------------------------------------------------------------------------------------
    def _get_available_adapters(self) -> set[str]:
        return set(self._adapters)

    def check_set_adapter(self, adapter_name: str | list[str]) -> list[str]:
        """Which of these adapters this module has. ValueError if that is more than it can have active."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        return [n for n in names if n in self._adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate the adapter's version, trainable unless `inference_mode`; freeze all others."""
        names = self.check_set_adapter(adapter_names)
        for name in self._adapters:
            self.set_requires_grad(name, name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(requires_grad and parameter.is_floating_point())

    def enable_adapters(self, enabled: bool) -> None:
        for name in self._adapters:
            self.set_requires_grad(name, enabled and name in self.active_adapters)
        self._disable_adapters = not enabled

    def replaces(self, adapter_name: str) -> bool:
        """Whether the adapter has a whole module of its own, so that the original is no part of what it computes."""
        return False

    # ---- what subclasses answer --------------------------------------------------------------------------------------
    def adapter_parameters(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Key in the file -> key in this module, for all that belongs to an adapter."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module to put back in this one's place."""
        raise NotImplementedError

    def left_behind(self, module: nn.Module) -> Mapping[nn.Parameter, nn.Parameter]:
        """Parameters of the original that others share -> what they are to share with `module`, which takes its
        place."""
        return {}
