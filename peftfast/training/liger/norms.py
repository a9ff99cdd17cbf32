"""RMSNorm: Liger's in place of a norm's `forward`."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from peftfast.sites.site import is_untouched
from peftfast.training.liger.part import DIFFERS, Part, probe, same


class RmsNorm(Part):
    """One norm. One that would compute in another way for a dtype is left to itself for that dtype."""

    kind = "RMSNorm"
    CANDIDATES = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"), (1.0, "llama"))  # offset of the weight, casting

    def __init__(self, name: str, module: nn.Module, operations: ModuleType) -> None:
        super().__init__(name)
        self.module, self.operation, self.eps = module, operations.liger_rms_norm, _epsilon(module)
        self.modes: dict[torch.dtype, tuple[float, str] | None] = {}

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Named like one, with one vector of weights, one epsilon and nothing else."""
        weight = module._parameters.get("weight")
        return (
            "RMSNorm" in type(module).__name__
            and isinstance(_epsilon(module), float)
            and weight is not None
            and weight.dim() == 1
            and len(module._parameters) == 1
            and not module._modules
        )

    def attach(self) -> None:
        if not is_untouched(self.module):
            self.off("it has hooks or another forward")
        else:
            self.put(self.module, "forward", self.forward)
            self.decide(lambda: DIFFERS if self._mode(self.module.weight.dtype) is None else None)

    def forward(self, x: Tensor) -> Tensor:
        mode = None if torch.compiler.is_compiling() or not x.numel() else self._mode(x.dtype)
        return self._plain(x) if mode is None else self._liger(mode, x, self.module.weight)

    def _plain(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)

    def _liger(self, mode: tuple[float, str], x: Tensor, weight: Tensor) -> Tensor:
        # not in place: the gradient may belong to a residual as well
        return self.operation(x, weight, self.eps, *mode, False)

    def _mode(self, dtype: torch.dtype) -> tuple[float, str] | None:
        if dtype not in self.modes:
            if torch.is_inference_mode_enabled():  # no gradients to compare; next time
                return None
            weight = self.module.weight
            x = probe(4, weight.shape[0], like=weight, dtype=dtype)
            fitting = [m for m in self.CANDIDATES if same(lambda x, m=m: self._liger(m, x, weight), self._plain, x)]
            with torch.no_grad():  # several where only their rounding differs
                error = {m: (self._liger(m, x, weight) - self._plain(x)).abs().max().item() for m in fitting}
            self.modes[dtype] = min(fitting, key=error.__getitem__, default=None)
        return self.modes[dtype]


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))
