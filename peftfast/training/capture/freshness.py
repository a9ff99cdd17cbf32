"""Whether a model is still the one that was recorded."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.training.capture.recording import tuner_of


class Snapshot:
    """What a recording depends on and nobody announces when it changes.

    Args:
        mixed: every sample has its own adapter: which ones are active or trainable does not matter then, but the
            factors' values do, because their stacks are made outside the recording.
    """

    def __init__(self, model: nn.Module, mixed: bool = False) -> None:
        self.mixed = mixed
        modules = list(model.named_modules())
        self._training = [(name, module, module.training) for name, module in modules]
        stateful = (_DropoutNd, BaseTunerLayer, StandIn)
        self._states = [(name, m, self._state(m)) for name, m in modules if isinstance(m, stateful)]
        containers = [
            (name, c) for name, m in modules for c in (m._modules, m._parameters, m._buffers) if c or m is model
        ]
        self._sizes = [(name, container, len(container)) for name, container in containers]
        self._entries = [(name, c, key, value) for name, c in containers for key, value in c.items()]
        tensors = [(f"{name}.{key}", t) for name, _, key, t in self._entries if isinstance(t, Tensor)]
        self._tensors = [(name, t, self._of(t)) for name, t in tensors]
        self._tuner = tuner_of(model)
        self._router = getattr(self._tuner, "router", None)
        self._outdated = self._tuner.inventory.control.outdated if mixed else 0

    def _state(self, module: nn.Module) -> tuple:
        """What a module computes with beside its tensors and children."""
        if isinstance(module, _DropoutNd):
            return (module.p,)
        active = () if self.mixed else module.active_adapters
        if not isinstance(module, BaseTunerLayer):
            return module._disable_adapters, active
        own = module.__dict__
        scales = [id(s) if isinstance(s, Tensor) else s for s in own.get("scaling", {}).values()]
        return own["_disable_adapters"], active, list(own["_merged"]), list(own["adapters"]), scales

    def _of(self, tensor: Tensor) -> tuple:
        if self.mixed:
            return tensor.data_ptr(), None if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), tensor.requires_grad

    def change(self) -> str | None:
        """What is different now, in words; None if nothing is."""
        for name, module, training in self._training:
            if module.training is not training:
                return f"the mode (train or eval) of {name or 'the model'}"
        for name, module, state in self._states:
            if self._state(module) != state:
                return f"adapters, scales or dropout of {name}"
        for name, container, size in self._sizes:
            if len(container) != size:
                return f"what {name or 'the model'} consists of"
        for name, container, key, value in self._entries:
            if container.get(key) is not value:
                return f"{name}.{key}, which was replaced"
        for name, tensor, state in self._tensors:
            if self._of(tensor) != state:
                return f"{name}: its values, address or requires_grad"
        if self.mixed and self._tuner.inventory.control.outdated != self._outdated:
            return "the adapters' values, as train(), eval() or forget_stacks() tell,"
        if getattr(self._tuner, "router", None) is not self._router:
            return "the router"
        return None
