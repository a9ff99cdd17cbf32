"""Operations on tensors of a GPU that is not there, computed by torch on the host's memory that they really lie in."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
#: Whose operators have kernels of their own for GPUs, and others for CPUs.
TWINS = ("bitsandbytes",)
#: Operations that launch nothing.
NATIVE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "set_", "resize_", "record_stream"}


def install() -> None:
    """For this process from now on."""
    torch.backends.cuda.enable_flash_sdp(False)  # torch has no such attention on a CPU
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    Compute().__enter__()
    _print_from_the_host()


def on_gpu(value: Any) -> bool:
    return type(value) in PLAIN and value.device.type == "cuda"


def on_host(tensor: Tensor) -> Tensor:
    """A CPU tensor in the same memory."""
    storage = tensor.untyped_storage()
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    made = torch.empty(0, dtype=tensor.dtype, device=CPU)
    made.set_(raw.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    made = made.conj() if tensor.is_conj() else made
    return torch._neg_view(made) if tensor.is_neg() else made


def to_gpu(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda:0")
    if tensor.numel():
        on_host(made).copy_(tensor)
    return made


def _drawn_from(generator: torch.Generator | None) -> torch.Generator:
    """A generator of the CPU, seeded by the GPU's, which goes on as if it had been drawn from."""
    generator = generator or torch.cuda.default_generators[0]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + 4)
    return torch.Generator(CPU).manual_seed((seed * 1000003 + offset * 7919) % 2**63)


@functools.cache
def _is_native(function: Any) -> bool:
    """Whether it makes a view, or a tensor without values."""
    returns = function._schema.returns
    is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return is_view or _name(function) in NATIVE


@functools.cache
def _name(function: Any) -> str:
    return function._schema.name.partition("::")[2]


@functools.cache
def _draws(function: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in function.tags


class Compute(TorchDispatchMode):
    """See the head of this file."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        values, form = pytree.tree_flatten((args, kwargs))
        if any(type(v) not in PLAIN and isinstance(v, Tensor) for v in values):
            return function(*args, **kwargs)  # of a subclass, which comes back with what is in it
        if not any(on_gpu(v) or isinstance(v, torch.device) and v.type == "cuda" for v in values):
            return function(*args, **kwargs)
        if function.namespace not in ("aten", "prims", *TWINS):  # an operator of somebody's, made of others
            with self:
                return function(*args, **kwargs)
        if _is_native(function):
            return function(*args, **kwargs)
        special = getattr(self, f"_{_name(function).lstrip('_')}_", None)
        if special is not None:
            result = special(function, *args, **kwargs)
            if result is not NotImplemented:
                return result
        own: dict[int, Tensor] = {}
        lowered = []
        for value in values:
            low = self._lowered(value)
            if on_gpu(value):
                own[id(low)] = value
            lowered.append(low)
        args, kwargs = pytree.tree_unflatten(lowered, form)
        if _draws(function) and not any(isinstance(value, torch.Generator) for value in lowered):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_drawn_from(None).initial_seed())
                result = function(*args, **kwargs)
        elif function.namespace in TWINS:
            with torch._dynamo.config.patch(disable=True):  # which would not know the host's memory for a tensor's
                result = function(*args, **kwargs)
        else:
            result = function(*args, **kwargs)

        def raised(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return own[id(value)] if id(value) in own else to_gpu(value)

        return pytree.tree_map(raised, result)

    @staticmethod
    def _lowered(value: Any) -> Any:
        if on_gpu(value):
            return on_host(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            return CPU
        if isinstance(value, torch.Generator) and value.device.type == "cuda":
            return _drawn_from(value)
        return value

    # ---- operations that a CPU has in another form ---------------------------------------------------------------
    @staticmethod
    def _to_copy_(function: Any, x: Tensor, **options: Any) -> Tensor:
        device = torch.device(options.pop("device", None) or x.device)
        options.pop("pin_memory", None)
        options.pop("non_blocking", None)
        if device.type not in ("cpu", "cuda"):
            return function(x, device=device, **options)
        copy = torch.ops.aten._to_copy.default(on_host(x) if on_gpu(x) else x, device=CPU, **options)
        return to_gpu(copy) if device.type == "cuda" else copy

    @staticmethod
    def _copy__(function: Any, to: Tensor, source: Tensor, *_: Any) -> Tensor:
        (on_host(to) if on_gpu(to) else to).copy_(on_host(source) if on_gpu(source) else source)
        return to

    @staticmethod
    def _mm_(function: Any, left: Tensor, right: Tensor, dtype: Any = None, **_: Any) -> Any:
        """With a dtype for the result, which products on a CPU do not take."""
        if dtype is None:
            return NotImplemented
        return to_gpu(on_host(left).to(dtype) @ on_host(right).to(dtype))

    _bmm_ = _mm_

    @staticmethod
    def _addmm_(function: Any, x: Tensor, left: Tensor, right: Tensor, dtype: Any = None, **factors: Any) -> Any:
        if dtype is None:
            return NotImplemented
        return to_gpu(torch.addmm(*(on_host(one).to(dtype) for one in (x, left, right)), **factors))


def _print_from_the_host() -> None:
    """Printing switches modes off, and looks at values."""
    from torch import _tensor_str

    original = _tensor_str._str

    def text(self: Tensor, *, tensor_contents: str | None = None) -> str:
        return original(self.detach().cpu() if on_gpu(self) else self, tensor_contents=tensor_contents)

    _tensor_str._str = text
