"""How kernels are launched with little of the host's time.

Triton's `kernel[grid](...)` looks at every argument of every launch: names, types, multiples of 16, options. That takes
the host as long as five products by cuBLAS, and choosing tiles and grids takes it as long again. Both depend on shapes,
strides, dtypes and flags only. So a launcher makes a `Launch`, a kernel with everything but its pointers, once for all
calls that look alike, in a function that `planned` caches; a call of a `Launch` goes to the compiled kernel directly.

What Triton would look at in pointers is looked at here: dtype, device, and whether an address is a multiple of 16. The
first launch of each kind goes through Triton, which compiles; and so does every launch where something else than a
launch is to happen (hooks of profilers, the interpreter, another device than the current one), and all of them on AMD
and where Triton's own launch is not the one that is repeated here.
"""

import functools
import inspect
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from peftfast_kernels.op import is_interpreting

#: Launches remembered per launcher: a model has a few shapes of layers, training several numbers of tokens.
PLANS = 1024

#: Kinds of pointers remembered per `Launch`; there are one or two.
KINDS = 32

_PLANNED: list[Any] = []
_ADDRESS, _DEVICE, _DTYPE = Tensor.data_ptr, Tensor.get_device, attrgetter("dtype")


def planned(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function of numbers, dtypes and flags that gives a `Launch` (and what else a launcher needs to know).

    Whatever its result depends on has to be an argument, positional and hashable, settings of torch's too; no tensors.
    """
    cached = functools.lru_cache(maxsize=PLANS)(plan)
    _PLANNED.append(cached)
    return cached


def forget() -> None:
    """Drops everything that was made by functions that are `planned`."""
    for cached in _PLANNED:
        cached.cache_clear()


class Launch:
    """A kernel, its grid, and all its arguments but the first ones, which are the pointers, and ``INTERP``.

    Calling it with those launches. A pointer is a tensor, or, where the kernel takes a tuple, a tuple of tensors.
    """

    __slots__ = ("kernel", "grid", "arguments", "_grid", "_rest", "_compiled")

    def __init__(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if "INTERP" in kernel.arg_names:
            arguments["INTERP"] = is_interpreting()
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self._grid = (*grid, 1, 1)[:3]
        pointers = next(i for i, name in enumerate(kernel.arg_names) if name in arguments)
        rest = kernel.arg_names[pointers:]
        if not arguments.keys() >= set(rest):
            raise ValueError(f"{kernel.__name__}: only the first arguments may be left open, not all of {rest}")
        # the arguments after the pointers, in the kernel's order; None: everything goes through Triton
        self._rest: tuple | None = None
        if type(kernel) is JITFunction and _launches_as_expected():
            self._rest = tuple([arguments[name] for name in rest])
        self._compiled: dict[tuple, tuple] = {}

    def __call__(self, *pointers: Any) -> None:
        if self._rest is None or _is_watched(self.kernel):
            self._through_triton(pointers)
            return
        tensors: Any = pointers
        if tuple in map(type, pointers):
            tensors = []
            for pointer in pointers:
                tensors += pointer if type(pointer) is tuple else (pointer,)
        addresses = [*map(_ADDRESS, tensors)]
        together = 0
        for address in addresses:
            together |= address
        kind = (
            *map(_DTYPE, tensors),
            *map(_DEVICE, tensors),
            together & 15 and tuple([address & 15 == 0 for address in addresses]),
        )
        compiled = self._compiled.get(kind)
        triton = driver.active
        device = triton.get_current_device()
        if compiled is None or device != tensors[0].get_device():
            if compiled is None and len({*map(_DEVICE, tensors)}) > 1:  # Triton would launch all the same
                devices = " and ".join(sorted({str(tensor.device) for tensor in tensors}))
                raise RuntimeError(f"{self.kernel.__name__}: all tensors have to be on one device, got {devices}")
            self._remember(kind, self._through_triton(pointers))
            return
        if tensors is not pointers:
            addresses = _grouped(addresses, pointers)
        run, function, metadata = compiled
        run(
            *self._grid, triton.get_current_stream(device), function, metadata, None, None, None, *addresses,
            *self._rest,
        )  # fmt: skip

    def _remember(self, kind: tuple, compiled: Any) -> None:
        """Keeps how a launch through Triton was compiled."""
        run, function = getattr(compiled, "run", None), getattr(compiled, "function", None)
        if run is None or function is None or not _looks_at_addresses_only(driver.active.get_current_target()):
            return
        if len(self._compiled) >= KINDS:
            self._compiled.clear()
        self._compiled[kind] = (run, function, compiled.packed_metadata)

    def _through_triton(self, pointers: tuple) -> Any:
        """What Triton compiled for the launch; None where it ran on another device than the current one."""
        first = pointers[0][0] if type(pointers[0]) is tuple else pointers[0]
        if first.is_cuda and first.get_device() != driver.active.get_current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current device, wherever the tensors are
                return self(*pointers)
        return self.kernel[self.grid](*pointers, **self.arguments)


def _grouped(addresses: list[int], pointers: tuple) -> list:
    """The addresses in tuples where the pointers are."""
    grouped: list = []
    start = 0
    for pointer in pointers:
        if type(pointer) is tuple:
            end = start + len(pointer)
            grouped.append(tuple(addresses[start:end]))
            start = end
        else:
            grouped.append(addresses[start])
            start += 1
    return grouped


def _is_watched(kernel: JITFunction) -> bool:
    """Whether a launch has to go through Triton because of who is told of it, or of what is to be compiled into it."""
    settings = knobs.runtime
    try:
        return bool(
            settings.launch_enter_hook.calls
            or settings.launch_exit_hook.calls
            or settings.debug
            or kernel.pre_run_hooks
        )
    except AttributeError:  # hooks of another kind than Triton 3.6's and 3.9's
        return True


@functools.cache
def _looks_at_addresses_only(target: Any) -> bool:
    """Whether Triton tells pointers of this kind of GPU apart by dtype and address alone. On AMD it looks at the size
    of what they point into as well, which says whether offsets fit into 32 bits."""
    return getattr(make_backend(target), "supports_native_tensor_specialization", False)


#: The end of `JITFunction.run`, which `Launch` repeats.
_EXPECTED = (
    "launch_metadata=kernel.launch_metadata(grid,stream,*bound_args.values())"
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
    "returnkernel"
)


@functools.cache
def _launches_as_expected() -> bool:
    """Whether this Triton launches a compiled kernel as the ones that this file was written for (3.6, 3.9)."""
    try:
        source = inspect.getsource(JITFunction.run)
    except (OSError, TypeError):
        return False
    return "".join(source.split()).endswith(_EXPECTED)
