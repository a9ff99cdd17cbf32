"""Modules trained in full beside the adapter (`modules_to_save`) and single token rows (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.base.offload import bring_home
from peftfast.base.weight import base_weight
from peftfast.errors import enumerate_some
from peftfast.layers.layer import OF_ONE_MODULE, BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.rows.control import Control
from peftfast.rows.routing import Routing
from peftfast.sharding import copy_of, is_distributed, put_together, whole, whole_shape
from peftfast.sites import Dense
from peftfast.sites.linear import is_quantised, linear_with


class AuxiliaryTrainingWrapper(StandIn, nn.Module):
    """Stands in for a module and gives way to an adapter's own version of it while that adapter is active.

    Names are PEFT's: `original_module`, and below it whatever the subclass keeps per adapter.
    """

    def counterparts(self) -> tuple[str, ...]:
        return (f"utils.other.{next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)}",)

    def _standing_in(self) -> nn.Module:
        """The module that answers now."""
        raise NotImplementedError

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        names = self.active_adapters
        self._active_adapter = names[0] if len(names) == 1 else names  # PEFT keeps the name: scripts use it as a key

    def _activate_remaining(self, names: list[str]) -> None:
        """After another adapter was deleted; what stays active stays frozen if it was."""
        if names != self.active_adapters:
            self.set_adapter(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._standing_in()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            own = name.startswith("__") or name in OF_ONE_MODULE
            if own or "_modules" not in self.__dict__ or not self._modules:
                raise
            try:
                standing_in = self._standing_in()
            except KeyError:
                raise AttributeError(
                    f"{type(self).__name__} has no attribute {name!r}, and no module for its active adapter "
                    f"{self._active_adapter!r}"
                ) from None
            return getattr(standing_in, name)


_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A copy of the whole module for every adapter, trained in full."""

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str | None = None) -> None:
        if isinstance(module_to_save, (*_CONTAINERS, BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module_to_save)}")
        super().__init__()
        self.original_module = module_to_save
        self.modules_to_save = nn.ModuleDict()
        self.follows: set[str] = set()  # the adapters whose copy has the input embedding's weight
        if adapter_name is not None:
            self.update(adapter_name)

    def update(self, adapter_name: str, tied: nn.Parameter | None = None) -> None:
        """Make the adapter's copy, frozen and inactive; a `tied` weight is shared instead of copied."""
        if adapter_name in self._adapters:
            return
        with whole(self.original_module.parameters()):
            self.modules_to_save[adapter_name] = _trainable_copy(self.original_module, tied)
        self._adapters.add(adapter_name)
        if tied is not None:
            self.modules_to_save[adapter_name].weight = tied
            self.follows.add(adapter_name)
        self.original_module.requires_grad_(False)
        self.modules_to_save[adapter_name].requires_grad_(False)

    def replaces(self, adapter_name: str) -> bool:
        return adapter_name in self._adapters

    def check_set_adapter(self, adapter_name: str | list[str]) -> list[str]:
        names = super().check_set_adapter(adapter_name)
        if len(names) > 1:
            kind = f"{type(self).__name__}({type(self.original_module).__name__})"
            raise ValueError(
                f"Only one adapter can be set at a time for {kind}, "
                f"got {len(names)}: {enumerate_some(names)} have each its own copy of the module"
            )
        return names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self._routing
        if routing is None or self._disable_adapters:
            return self._standing_in()(*args, **kwargs)
        if routing.slots is not None:
            return self.original_module(*args, **kwargs)
        return routing.reaching(self._routed(routing, args, kwargs), self)

    def _routed(self, routing: Routing, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Every sample by its own adapter's copy of the module, or by the module itself."""
        name = type(self.original_module).__name__
        if len(args) != 1 or not isinstance(args[0], Tensor) or any(isinstance(v, Tensor) for v in kwargs.values()):
            raise TypeError(
                f"Mixed batches are not supported for {name} in modules_to_save, which takes more than one tensor"
            )
        x = args[0]
        names = [n for n in routing.names if n in self._adapters]
        present = tuple(n in self._adapters for n in routing.names)
        rows = routing.rows(x, present, {}, f"{name} in modules_to_save")

        def part(position: int) -> Tensor:
            module = self.original_module if position < 0 else self.modules_to_save[names[position]]
            own = rows.own(position, x)
            return _samples_first(module(own, **kwargs), own, name)

        return rows.joined([(position, part(position)) for position in rows.turns(len(names))], len(names))

    def _standing_in(self) -> nn.Module:
        """In a batch of several adapters the module itself: no copy's weight is that of all samples."""
        names, routing = self.active_adapters, self._routing
        if routing is not None:
            alike = routing.slots is None and routing.uniform
            names = [name for name in routing.names if name in self._adapters] if alike else []
        if self._disable_adapters or not names:
            return self._modules["original_module"]
        return self._modules["modules_to_save"][names[0]]

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        if adapter_name not in self._adapters:
            return
        self._activate_remaining([n for n in new_active_adapters or [] if n in self._adapters][:1])
        self.follows.discard(adapter_name)
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._adapters.discard(adapter_name)  # last: until then all of it can be done again

    def adapter_parameters(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        if adapter_name not in self._adapters:
            return {}
        return dict(self.modules_to_save[adapter_name].named_parameters())

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._adapters:
            return {}
        return {k: f"modules_to_save.{adapter_name}.{k}" for k in self.modules_to_save[adapter_name].state_dict()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        names = [n for n in (adapter_names or self.active_adapters) if n in self._adapters]
        # unloading without merging gives the trained copy as well: there is no other place for what was trained
        return self.modules_to_save[names[0]] if names else self.original_module

    def left_behind(self, module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
        """All but the weight, where the copy has the embedding's and so stays as tied as the original was."""
        if module not in [self.modules_to_save[name] for name in self.follows]:
            return {}
        old = self.original_module._parameters
        return {p: module._parameters[name] for name, p in old.items() if p is not None and name != "weight"}


@torch.no_grad()
def _trainable_copy(module: nn.Module, tied: nn.Parameter | None = None) -> nn.Module:
    """A copy in which packed linear layers are dense, because nobody can train the packed bytes, or read them in a
    file, and what FSDP2 has taken apart is whole, because FSDP2 knows nothing of the copy. With `tied` as its weight,
    which is that of another copy."""
    dense_tied = tied is not None and not is_quantised(module)
    copied = copy_of(module, {id(module.weight): tied} if dense_tied else None)
    bring_home(copied, module)
    for part in copied.modules():
        for name, p in part._parameters.items():
            if is_distributed(p):
                part._parameters[name] = nn.Parameter(put_together(p.detach()), p.requires_grad)
    for name, part in [*copied.named_modules()]:
        if is_quantised(part) and (stored := base_weight(part)).known:
            dense = linear_with(stored.dense(stored.compute_dtype), part)
            if not name:
                return dense
            copied.set_submodule(name, dense)
    return copied


def _samples_first(output: Any, like: Tensor, name: str) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != like.shape[0]:
        raise TypeError(
            f"Mixed batches are not supported for {name} in modules_to_save, whose output is not one tensor with the "
            "samples first"
        )
    return output


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Rows of an embedding trained per adapter; `token_adapter` is an ordinary adapter layer around the module."""

    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices",)

    def __init__(self, module_to_save: nn.Module) -> None:
        super().__init__()
        self.token_adapter = BaseTunerLayer(module_to_save)

    def share(self, control: Control) -> None:
        super().share(control)
        self.token_adapter.share(control)

    @property
    def original_module(self) -> nn.Module:
        return self._modules["token_adapter"].base_layer

    @property
    def _disable_adapters(self) -> bool:
        """One state with `token_adapter`, whoever sets it."""
        return self._modules["token_adapter"]._disable_adapters

    @_disable_adapters.setter
    def _disable_adapters(self, value: bool) -> None:
        layer = self._modules.get("token_adapter")
        if layer is not None:
            layer._disable_adapters = value

    def add(self, adapter_name: str, cfg: Any, method: Any, dtype: torch.dtype | None = None, **where: Any) -> None:
        """Add an adapter's rows.

        Args:
            cfg: a TrainableTokensConfig. method: its method.
        """
        self.token_adapter.add_adapter(adapter_name, method, cfg, "", dtype=dtype, **where)
        self._adapters.add(adapter_name)

    def _standing_in(self) -> nn.Module:
        return self._modules["token_adapter"]

    @property
    def weight(self) -> Tensor:
        """The table with the rows of the adapters in force in it, for whoever multiplies by it instead of calling the
        module (losses that never hold all logits). The base's own Parameter where there are none, where an engine has
        taken it apart, and in batches of several adapters, for which there is no one table."""
        layer = self._modules["token_adapter"]
        base = Dense(layer.weight, None)
        if is_distributed(base.weight) or whole_shape(base.weight) != base.weight.shape:
            return base.weight
        dense = base
        for adapter in self._in_force(layer):
            dense = adapter.method.merged(layer.site, dense, adapter, base)
        return dense.weight

    def _in_force(self, layer: BaseTunerLayer) -> list[Adapter]:
        """The adapters that a call now would have for all rows alike, without those inside the weight."""
        routing = self._routing
        if routing is None or self._disable_adapters:
            return [adapter for _, adapters in layer._steps() for adapter in adapters]
        alike = routing.slots is None and routing.uniform
        return [layer.adapters[n] for n in routing.names if n in layer.adapters] if alike else []

    def check_set_adapter(self, adapter_name: str | list[str]) -> list[str]:
        names = super().check_set_adapter(adapter_name)
        rows = [row for name in names for row in self.token_adapter.token_indices[name]]
        if len(set(rows)) < len(rows):
            twice = sorted({row for row in rows if rows.count(row) > 1})
            raise ValueError(
                f"Only one adapter can be set at a time for {type(self).__name__} to train the same token rows; "
                f"{names} have {enumerate_some(twice)} in common"
            )
        return names

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.token_adapter.activate(self.active_adapters)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        if adapter_name not in self._adapters:
            return
        self._activate_remaining([n for n in new_active_adapters or [] if n in self._adapters])
        self.token_adapter.forget(adapter_name)
        self._adapters.discard(adapter_name)

    def adapter_parameters(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        adapter = self.token_adapter.adapters.get(adapter_name)
        if adapter is None:
            return {}
        own = self.token_adapter.trainable_tokens_delta
        return {f"token_adapter.{k}": v for k, v in adapter.parameters().items() if adapter_name in own}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if not self.adapter_parameters(adapter_name) or self.is_tied(adapter_name):
            return {}
        return {"token_adapter.trainable_tokens_delta": f"token_adapter.trainable_tokens_delta.{adapter_name}"}

    def is_tied(self, adapter_name: str) -> bool:
        """Whether the rows belong to another module (a tied head) and are saved there."""
        return adapter_name in self.token_adapter.merger.sources

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names, keep=False)
        return self.token_adapter.base_layer
