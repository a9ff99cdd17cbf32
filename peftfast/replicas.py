"""What torch.nn.DataParallel calls on every device, made anew for every forward. transformers' Trainer wraps a model in
it where it sees several GPUs and no launcher."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn


class Replicated(nn.Module):
    """Mixin of modules that know their tensors by more than torch's shallow replicas have. A replica of one is a whole
    copy of it from its first call on, with what torch has put on its device in place of Parameters and buffers."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["_replicated"] = self
        replica.__class__ = _replica_class(type(self))
        return replica


class _Replica(nn.Module):
    """What torch fills in, child by child, before anybody calls it."""

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole = self.__dict__.get("_whole")
        if whole is None:
            whole = self.__dict__["_whole"] = self._copy()
        return whole(*args, **kwargs)

    def _copy(self) -> nn.Module:
        known: dict[int, Any] = {}
        for module, here in zip(self._replicated.modules(), self.modules(), strict=True):
            for key, tensor in here._former_parameters.items():
                here.__dict__.pop(key, None)  # where torch has it, because it is no Parameter
                known[id(module._parameters[key])] = here._parameters[key] = tensor
            known |= {id(b): here._buffers[key] for key, b in module._buffers.items() if b is not None}
            if not module._modules and not type(module).__module__.startswith("peftfast."):
                known[id(module)] = here  # nothing is missing there, and most modules are such
        return copy.deepcopy(self._replicated, known)


@functools.cache
def _replica_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Replica, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
