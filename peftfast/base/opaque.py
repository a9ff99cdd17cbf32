"""Linear layers whose weight only they themselves can multiply by: formats of other libraries (GPTQ, AWQ, AQLM, EETQ,
...). Adapters train on them and are saved; what needs the weight itself is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from peftfast.base.weight import UsualWeight, register_format
from peftfast_kernels.decode import Operand


class ByModule(UsualWeight):
    """What is alike in all formats in which the module does the product."""

    cuts_gradients = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """The input's, whatever that will be; adapters get the dtype of the module's own floating-point tensors."""
        dtypes = [t.dtype for t in _tensors(self.module) if t.is_floating_point() and t.element_size() > 1]
        return dtypes[0] if dtypes else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return next(_tensors(self.module)).device

    def readable(self) -> Operand:
        weight = self.dense()
        return Operand("dense", [weight], self.shape, weight.dtype)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer, but none of torch's, with integers in place of a weight."""
    own = module.__dict__  # every module of a model is asked, and most have neither
    sizes = [own.get(name) for name in ("in_features", "out_features")]
    if any(type(size) is not int for size in sizes) or module._modules:
        return False
    if isinstance(module, nn.Linear):
        return type(module) is not nn.Linear
    return any(not t.is_floating_point() and t.dtype != torch.bool and t.numel() > 1 for t in _tensors(module))


@register_format
class OpaqueWeight(ByModule):
    """A weight that nobody else claims, of a module that says how many features it has."""

    quantization = "a format of its own"
    known = False
    foreign_linear = True

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return is_packed_linear(module)

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        kind = f"{type(self.module).__module__}.{type(self.module).__name__}"
        raise NotImplementedError(
            f"{self.name or 'The layer'}: the weight of a {kind} is known to the module alone. A LoRA or IA3 trains on "
            "it and is saved; merging, DoRA, and initialisations that start from the weight need a base that is dense "
            "or in a format that peftfast reads (bitsandbytes, FP8, torchao's int8 and float8, HQQ, optimum-quanto)"
        )

    dense = assign = snapshot = restore = _refuse
