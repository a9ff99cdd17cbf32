"""A Parameter that is adapted by itself, whatever module has it and under whatever name: a stack of experts, a router,
a matrix of a module that is no linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfast.base.offload import at_hand, device_of, stored_weight
from peftfast.base.rounding import drawn_float
from peftfast.base.weight import UsualWeight, kept_copy
from peftfast.devices import widest
from peftfast.sharding import as_copies, is_distributed, put_together, taken_apart, whole_shape
from peftfast_kernels.decode import Operand


class ParameterWeight(UsualWeight):
    """A floating-point Parameter [N, K] or [E, N, K] behind the protocol of `BaseWeight`; a stack is seen as one
    matrix, the experts below each other: [E·N, K]. Not registered, because no module is of this format: a config names
    the Parameter."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        super().__init__(module)
        self.parameter = parameter

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        *rows, columns = whole_shape(self.value)
        return torch.Size(rows).numel(), columns

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.module, self.parameter)

    def readable(self) -> Operand:
        matrix = at_hand(self.module, self.parameter).detach().flatten(0, -2)
        return Operand("dense", [matrix], self.shape, self.compute_dtype)

    def seen(self) -> Tensor:
        stored = stored_weight(self.module, self.parameter).detach()
        return (stored if stored.dim() == 2 else as_copies(put_together(stored), stored)).flatten(0, -2)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        stored = self.seen()
        return stored.to(dtype=dtype or stored.dtype, copy=True)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        own = stored_weight(self.module, self.parameter, write=True)
        new = self.as_stored(weight, own.shape)
        # what `seen` gives may have been written to; the address of a sharded or packed tensor says nothing
        if type(own) is not nn.Parameter or new.data_ptr() != own.data_ptr():
            self._write(own, new)

    @property
    def draws(self) -> bool:
        return self.compute_dtype.itemsize == 2

    @torch.no_grad()
    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        own = stored_weight(self.module, self.parameter, write=True)
        drawn = drawn_float(weight, own.dtype, generator)
        self._write(own, self.as_stored(drawn, own.shape))

    def _write(self, own: Tensor, new: Tensor) -> None:
        """`own.copy_(new)`, which tensors of some libraries do to a copy of themselves.

        Raises:
            NotImplementedError: so that all is as before.
        """
        foreign = type(own) not in (Tensor, nn.Parameter) and not is_distributed(own)
        before = own.clone() if foreign else new
        own.copy_(taken_apart(new, own))
        if foreign and torch.equal(own, before) and not torch.equal(before, new.to(before.dtype)):
            raise NotImplementedError(
                f"{self.name or type(self.module).__name__}: a weight of type {type(own).__name__} keeps nothing of "
                "what is written to it: nothing can be merged into it"
            )

    @property
    def merge_dtype(self) -> torch.dtype:
        """Wide enough for the one rounding at the end to be the only one that shows."""
        return torch.float32 if self.compute_dtype in (torch.float16, torch.bfloat16) else widest(self.device)

    def snapshot(self, host: bool = False) -> Tensor:
        return kept_copy(stored_weight(self.module, self.parameter, write=True), host)

    @torch.no_grad()
    def restore(self, snapshot: Tensor) -> None:
        stored_weight(self.module, self.parameter, write=True).copy_(snapshot)
