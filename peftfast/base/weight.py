"""A frozen base weight, whatever its storage. The only thing an adapter ever learns about a layer's weight."""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from peftfast.base.offload import device_of
from peftfast.rules import Rule
from peftfast.watch import Place
from peftfast_kernels.decode import Operand

_HUGE_PAGE = 1 << 21
_SLOW = 1_000_000  # ns to be given a huge page and fill it; 0.2 ms are usual, and 0.5 to 1 for as much in small ones
_MEANWHILE = 100  # copies in small pages until a huge one is asked for again
_small = 0  # how many of these are to come


@functools.lru_cache(maxsize=1024)
def comes_from(cls: type, library: str, *names: str) -> bool:
    """Whether a class is, or derives from, one of a library's with one of these names, or with any. Asked by name, so
    that the library is not imported for it."""
    return any((not names or c.__name__ in names) and c.__module__.partition(".")[0] == library for c in cls.__mro__)


class UsualWeight:
    """What is so of most formats; a format of which it is not says so.

    Attributes:
        name: of the module inside its model, for messages; empty until somebody knows it.
        quantization: key of `QUANTIZERS` ("nf4"); None where the weight is stored as it is computed with.
        transposed: the module keeps W [N, K] as [K, N].
        merge_dtype: in which W is summed with what is merged into it.
        fusable_modules: kinds of module besides `nn.Linear` whose forward is the product with W, and no more.
        cuts_gradients: the module may multiply in a way that has no derivative.
        known: W can be read; False: the module alone can multiply by it.
        draws: W can be rounded to stochastically, by `assign_stochastic`.
        foreign_linear: the modules that it claims are linear layers, though none of torch's.
    """

    name: str = ""
    quantization: str | None = None
    transposed: bool = False
    merge_dtype: torch.dtype = torch.float32
    fusable_modules: tuple[type[nn.Module], ...] = ()
    cuts_gradients: bool = False
    known: bool = True
    draws: bool = False
    foreign_linear: bool = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def operand(self, x: Tensor, autocast: torch.dtype | None) -> Operand | None:
        return None  # only the module multiplies by W

    def lasting(self, w: Operand) -> list[Place] | None:
        return None

    def seen(self) -> Tensor:
        return self.dense(torch.float32)

    def as_matrix(self, stored: Tensor) -> Tensor:
        return stored.t() if self.transposed else stored.reshape(self.shape)

    def as_stored(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return (weight.t() if self.transposed else weight).reshape(shape)


class BaseWeight(Protocol):
    """The weight of one module as a matrix W [N, K]: N output features, K input features (an embedding: N tokens of
    K features; a convolution: N output channels, K input channels times kernel). Never trained; written only by
    `assign` and `restore`. Attributes: see `UsualWeight`."""

    module: nn.Module
    name: str
    quantization: str | None
    transposed: bool
    merge_dtype: torch.dtype
    fusable_modules: tuple[type[nn.Module], ...]
    cuts_gradients: bool
    known: bool
    draws: bool
    foreign_linear: bool

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        """Whether this format stores `module`'s weight. Of several, the one registered last is used."""
        ...

    def __init__(self, module: nn.Module) -> None: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        ...

    @property
    def compute_dtype(self) -> torch.dtype:
        """The floating dtype the module computes in; new adapters take it unless they are kept in fp32."""
        ...

    @property
    def device(self) -> torch.device: ...

    def operand(self, x: Tensor, autocast: torch.dtype | None) -> Operand | None:
        """W for a fused product with `x`, in the dtype in which the module would multiply it, result included, under
        autocast to `autocast`; None if the module casts on the way or would raise, both of which are left to it, or if
        only it may multiply by W."""
        ...

    def lasting(self, w: Operand) -> list[Place] | None:
        """What `operand` made `w` of: as long as all of it stays, w does. None: it has to be asked every time."""
        ...

    def readable(self) -> Operand:
        """W for reading in pieces, whoever may multiply by it."""
        ...

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """A fresh dequantised copy [N, K]."""
        ...

    def seen(self) -> Tensor:
        """W [N, K] to look at: the numbers themselves, not a copy, where they are stored as such; else in fp32."""
        ...

    def as_matrix(self, stored: Tensor) -> Tensor:
        """What lies as the module's Parameter does, as a matrix [N, K]; a view where there is one."""
        ...

    def as_stored(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """`weight` [N, K] as the module's Parameter, of this shape, lies; a view where there is one."""
        ...

    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        """Store `weight` [N, K] back, every element as one of the two values around it that the format has, with the
        scales that are there; which one is drawn, so that the expected value is exact."""
        ...

    def assign(self, weight: Tensor) -> None:
        """Store `weight` [N, K] back, rounded once to the nearest, requantised if need be, on the same device."""
        ...

    def snapshot(self, host: bool = False) -> Any:
        """A copy of the stored bytes, for an exact unmerge; with `host`, in host memory."""
        ...

    def restore(self, snapshot: Any) -> None:
        """Put the bytes of a `snapshot` back; exact in every bit."""
        ...


def kept_copy(tensor: Tensor, host: bool) -> Tensor:
    """A copy beside the tensor, or in host memory (pinned, where that makes the way back faster)."""
    if not host or tensor.device.type == "cpu":
        return _copy(tensor.detach())
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())


def _copy(tensor: Tensor) -> Tensor:
    """`tensor.clone()`; of a large one in memory that Linux gives in pages of 2 MiB. To be given new memory in those of
    4 KiB takes several times as long as to fill it, and to be given the large ones longer still where the system has to
    make room for each first: a page costs milliseconds then, and those of 4 KiB are taken for a while."""
    global _small
    advice, huge = getattr(mmap, "MADV_HUGEPAGE", None), tensor.nbytes & -_HUGE_PAGE
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    if advice is None or not huge or not plain:
        return tensor.clone()
    if _small:
        _small -= 1
        return tensor.clone()
    start = time.thread_time_ns()
    try:
        # whole pages, so that it begins with one; where the tensor ends, small ones save memory
        memory = mmap.mmap(-1, -(-tensor.nbytes & -_HUGE_PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(advice, 0, huge)
    except OSError:  # a system without such pages
        return tensor.clone()
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)
    if time.thread_time_ns() - start > _SLOW * (huge // _HUGE_PAGE):
        _small = _MEANWHILE
    return copy


def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """A tensor as a Parameter that is not trained; what is one already as it is."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)


F = TypeVar("F", bound=type)

FORMATS: list[type[BaseWeight]] = []


def register_format(cls: F) -> F:
    """Class decorator: one format, one file, one registration. Later registrations are asked first, so the general
    format registers before the special ones."""
    FORMATS.insert(0, cls)
    return cls


class Quantizer(NamedTuple):
    """How a dense weight becomes a module that stores it quantised.

    Attributes:
        module: (weight [N, K], bias [N] or None, **options) -> a frozen linear module on the weight's device.
        config: (**options) -> keyword arguments of transformers' `BitsAndBytesConfig` that mean the same, so that
            models quantised here are saved and reloaded by transformers.
        options: the rules of both's options, by name.
    """

    module: Callable[..., nn.Module]
    config: Callable[..., Mapping[str, Any]]
    options: Mapping[str, Rule]


QUANTIZERS: dict[str, Quantizer] = {}


def quantizer(name: str) -> Quantizer:
    """The quantiser of a format. Raises ValueError naming the known ones."""
    if name not in list(QUANTIZERS):  # where anything may be looked for
        raise ValueError(f"Unknown quantisation {name!r}; one of {', '.join(map(repr, QUANTIZERS))}")
    return QUANTIZERS[name]


def quantise_and_back(weight: Tensor, name: str, **options: Any) -> Tensor:
    """`weight` [N, K] as the format `name` would keep it, in fp32."""
    return base_weight(quantizer(name).module(weight, None, **options)).dense(torch.float32)


def is_foreign_linear(module: nn.Module) -> bool:
    """Whether a format knows this as a linear layer of another library, which need not derive from torch's."""
    return any(fmt.foreign_linear and fmt.claims(module) for fmt in FORMATS)


def base_weight(module: nn.Module) -> BaseWeight:
    """The module's weight behind its protocol.

    Raises:
        TypeError: nobody claims it; names the known formats.
    """
    for fmt in FORMATS:
        if fmt.claims(module):
            return fmt(module)
    weight = getattr(module, "weight", None)
    stored = "no weight" if weight is None else f"a weight of type {type(weight).__name__} and dtype {weight.dtype}"
    raise TypeError(
        f"No storage format knows the weight of {type(module).__name__}, which has {stored}. "
        f"Known formats: {', '.join(f.__name__ for f in FORMATS)}"
    )
