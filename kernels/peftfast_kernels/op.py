"""One numeric operation = its meaning, its plain-torch form, its Triton form, and the points it is tested and timed at.

An :class:`Op` has three faces. ``reference`` defines the meaning (fp32, or fp64 where an input is fp64; never fast and
never rounded to the output dtype). ``eager`` is the best plain-torch path. ``launch`` is Triton. Which of the last two
runs is decided in :meth:`Op.__call__` and nowhere else, from the device, from ``accepts`` and from ``dispatch.py``.

Triton is imported when a launcher is first needed: launchers live in the sibling modules ``*_kernels.py``, named by
string in ``@op``. So ``import peftfast_kernels`` needs neither a GPU nor Triton and does not pay for their import.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
BACKEND_VARIABLE = "PEFTFAST_BACKEND"

_forced_backend: str | None = None  # None: the environment variable has not been read yet


class Cost(NamedTuple):
    """Work of one call, so that a bench prints a share of the roofline instead of bare milliseconds."""

    flops: float
    bytes: float


class Case(NamedTuple):
    """One point at which an op is tested and timed; ``make(device)`` gives its keyword arguments."""

    id: str
    make: Callable[[str], dict[str, Any]]


def set_backend(name: str | None) -> None:
    """Forces every op onto one of ``BACKENDS``; ``None`` returns to what the environment variable says.

    Raises ``ValueError`` for an unknown name.
    """
    global _forced_backend
    _forced_backend = None if name is None else _checked_backend(name, "set_backend")


def get_backend() -> str:
    """The backend in force: ``"auto"``, ``"torch"`` or ``"triton"``; set by ``PEFTFAST_BACKEND`` or `set_backend`."""
    global _forced_backend
    if _forced_backend is None:
        _forced_backend = _checked_backend(os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE)
    return _forced_backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces the backend inside a ``with`` block."""
    global _forced_backend
    before = _forced_backend
    set_backend(name)
    try:
        yield
    finally:
        _forced_backend = before


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; one of {', '.join(map(repr, BACKENDS))}")
    return name


def has_triton() -> bool:
    """Whether Triton can be imported; looks without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, their only way on CPU tensors. Read once, as Triton does."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _accepts_everything(*_: Any, **__: Any) -> bool:
    return True


def _first_device(*args: Any, **kwargs: Any) -> torch.device:
    first = args[0] if args else next(iter(kwargs.values()))
    return (first[0] if isinstance(first, list) else first).device


@dataclass(frozen=True, eq=False)
class Op:
    """A registered operation; calling it runs ``launch`` where Triton wins and ``eager`` everywhere else."""

    name: str
    reference: Callable[..., Any]  # torch, fp32/fp64, unrounded: defines the semantics
    eager: Callable[..., Any]  # torch, native dtype
    module: str  # sibling module that holds the launcher, under the op's own name
    cases: Callable[[], Iterable[Case]]  # tests and benches iterate the same ones
    cost: Callable[..., Cost]  # of one call with the same arguments
    fake: Callable[..., Any] | None  # empty outputs of the right shape and dtype; None: compilers see the plain path
    accepts: Callable[..., bool] = _accepts_everything  # False: shapes or dtypes the kernel declines or loses on
    device_of: Callable[..., torch.device] = _first_device
    parameters: tuple[inspect.Parameter, ...] = ()
    __doc__: str | None = None
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def launch(self) -> Callable[..., Any]:
        """The Triton launcher. Raises ``RuntimeError`` where Triton is not installed."""
        if "launch" not in self._cache:
            if not has_triton():
                raise RuntimeError(f"{self.name}: the Triton path was asked for, but triton is not installed")
            kernels = importlib.import_module(f"{__package__}.{self.module}")
            self._cache["launch"] = getattr(kernels, self.name)
        return self._cache["launch"]

    def runs_triton(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a call with these arguments runs Triton. Raises ``RuntimeError`` if it was forced and cannot."""
        first = args[0] if args else None
        if type(first) in _TENSORS:  # asking a device for its type takes the host longer
            device, on_cpu = first.device, first.is_cpu
        else:
            device = self.device_of(*args, **kwargs)
            on_cpu = device.type == "cpu"
        backend = _forced_backend or get_backend()
        if backend == "torch" or on_cpu and backend == "auto":
            return False
        if on_cpu and not is_interpreting():
            raise RuntimeError(
                f"{self.name}: {BACKEND_VARIABLE}=triton on CPU tensors needs TRITON_INTERPRET=1 set before the "
                f"process starts; use {BACKEND_VARIABLE}=auto or torch otherwise"
            )
        forced = backend == "triton"
        if not (forced or has_triton_gpu(device)) or _in_double(args) or kwargs and _in_double(kwargs.values()):
            return False
        if self.accepts is not _accepts_everything and not self.accepts(*args, **kwargs):
            return False
        return not self.loses(device, ((*args, *kwargs.values()),))

    def loses(self, device: torch.device, calls: Iterable[tuple]) -> bool:
        """Whether plain torch was measured to be faster on this GPU for one of these calls, given by their arguments;
        Triton that is forced never loses."""
        return _loses is not None and _forced_backend != "triton" and _loses(self.name, device, calls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else None
        if type(first) in _TENSORS and first.is_cpu and _forced_backend == "auto":
            # what `runs_triton` would say, sooner
            return self.eager(*args, **kwargs)
        if not self.runs_triton(*args, **kwargs):
            return self.eager(*args, **kwargs)
        if torch.compiler.is_compiling():
            return (self.eager if self.fake is None else self.opaque)(*args, **kwargs)
        return self.launch(*args, **kwargs)

    def opaque(self, *args: Any, **kwargs: Any) -> Any:
        """The same call through ``torch.ops.peftfast.<name>``, which the compiler does not look into."""
        if kwargs:
            names = [parameter.name for parameter in self.parameters]
            args = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
        return getattr(torch.ops.peftfast, self.name)(*_flatten(self.parameters, args))


_loses: Callable[[str, torch.device, Iterable[tuple]], bool] | None = None


def register_dispatch(loses: Callable[[str, torch.device, Iterable[tuple]], bool]) -> None:
    """Tells ops which calls were measured to be faster in plain torch; dispatch.py does, op.py stays a leaf."""
    global _loses
    _loses = loses


_usable: dict[int | None, bool] = {}  # by GPU


def has_triton_gpu(device: torch.device) -> bool:
    """Whether Triton kernels run on this device, and use its matrix units."""
    if device.type != "cuda":  # ROCm devices call themselves cuda as well
        return False
    if torch.compiler.is_compiling():  # a graph would depend on what is remembered
        return _compiles_for(device)
    usable = _usable.get(device.index)
    if usable is None:
        usable = _usable[device.index] = _compiles_for(device) and (is_interpreting() or _has_driver())
    return usable


def _compiles_for(device: torch.device) -> bool:
    """Whether there is a Triton that makes matrix instructions for this GPU: before sm_80 it makes none, and kernels
    spill."""
    if not has_triton():
        return False
    return is_interpreting() or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


# What torch.compiler.assume_constant_result does, without importing the compiler; torch 2.11's cannot follow the search
# for a package.
_compiles_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _has_driver() -> bool:
    """Whether Triton can talk to the GPU, for which it compiles a few lines of C, and is one that kernels are launched
    with; says so once where not."""
    try:
        importlib.import_module("peftfast_kernels.launch").driver.active.get_current_device()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        message = f"peftfast: Triton does not work here, so plain torch computes everything ({reason})"
        warnings.warn(message, stacklevel=2)  # noqa: TID251
        return False
    return True


_TENSORS = (Tensor, torch.nn.Parameter)


def _in_double(args: Iterable[Any]) -> bool:
    """Whether a tensor among these is fp64, which kernels would compute in fp32."""
    for value in args:
        kind = type(value)
        if kind in _TENSORS or kind is _operand_type:
            if value.dtype is torch.float64:
                return True
        elif kind is list and _in_double(value):
            return True
    return False


OPS: dict[str, Op] = {}

# Library.define + impl costs about 2 us per call on the host; torch.library.custom_op costs 10.
_library = torch.library.Library("peftfast", "DEF")


def op(
    *,
    reference: Callable[..., Any],
    module: str,
    cases: Callable[[], Iterable[Case]],
    cost: Callable[..., Cost],
    fake: Callable[..., Any] | None,
    accepts: Callable[..., bool] = _accepts_everything,
    device_of: Callable[..., torch.device] = _first_device,
) -> Callable[[Callable[..., Any]], Op]:
    """Decorates the eager path: registers it in ``OPS`` and, where it has a fake, as the opaque operator
    ``torch.ops.peftfast.<name>``."""

    def register(eager: Callable[..., Any]) -> Op:
        name = eager.__name__
        if name in OPS:
            raise ValueError(f"op {name!r} is registered twice")
        signature = inspect.signature(eager)
        made = Op(
            name=name,
            reference=reference,
            eager=eager,
            module=module,
            cases=cases,
            cost=cost,
            fake=fake,
            accepts=accepts,
            device_of=device_of,
            parameters=tuple(signature.parameters.values()),
            __doc__=eager.__doc__,
        )
        if fake is not None:
            _register_opaque(made, signature)
        OPS[name] = made
        return made

    return register


# -- torch.library: an Operand has no schema type, so it crosses as its fields ----------------------------------------

_OPERAND_FIELDS: dict[str, type] = {}  # filled by decode.py through `register_operand`; op.py stays a leaf
_operand_type: Any = None


def register_operand(cls: Any, fields: dict[str, type]) -> None:
    """Tells the schema generator how a NamedTuple argument type is flattened into schema types."""
    global _operand_type
    _operand_type = cls
    _OPERAND_FIELDS.update(fields)


def _flatten(parameters: tuple[inspect.Parameter, ...], args: tuple[Any, ...]) -> list[Any]:
    flat: list[Any] = []
    for parameter, value in zip(parameters, args, strict=False):
        if parameter.annotation is _operand_type:
            flat.extend(getattr(value, name) for name in _OPERAND_FIELDS)
        else:
            flat.append(value)
    return flat


def _register_opaque(made: Op, signature: inspect.Signature) -> None:
    flat: list[inspect.Parameter] = []
    for parameter in made.parameters:
        if parameter.annotation is _operand_type and _operand_type is not None:
            flat += [
                inspect.Parameter(f"{parameter.name}_{name}", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in _OPERAND_FIELDS.items()
            ]
        else:
            flat.append(parameter)

    def unflatten(values: tuple[Any, ...]) -> list[Any]:
        stream = iter(values)
        args: list[Any] = []
        for parameter in made.parameters:
            if parameter.annotation is _operand_type and _operand_type is not None:
                fields = {name: next(stream) for name in _OPERAND_FIELDS}
                fields["shape"] = tuple(fields["shape"])
                args.append(_operand_type(**fields))
            else:
                args.append(next(stream, parameter.default))
        return args

    def impl(*values: Any) -> Any:
        args = unflatten(values)
        return (made.launch if made.runs_triton(*args) else made.eager)(*args)

    def fake(*values: Any) -> Any:
        return made.fake(*unflatten(values))

    def schema_carrier(*_: Any) -> Any: ...

    schema_carrier.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    schema = torch.library.infer_schema(schema_carrier, mutates_args=())
    _library.define(f"{made.name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(made.name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftfast::{made.name}", fake, lib=_library)


# -- small helpers that every op file needs ---------------------------------------------------------------------------


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where any tensor is fp64, fp32 otherwise: the dtype in which a reference computes."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def row_chunks(rows: int, cols: int, elements: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of rows that hold at most ``elements`` elements each (at least one row), or 64 times as many on a GPU; one
    slice under a compiler."""
    # A traced program would unroll the loop, and hold for one number of rows; inductor fuses the element-wise chain.
    if torch.compiler.is_compiling():
        return iter((slice(0, rows),))
    if device is not None and device.type != "cpu":  # a chunk is some launches, and 128 MiB of scratch are not missed
        elements <<= 6
    step = max(1, elements // max(cols, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def transposed(matrix: Tensor) -> Tensor:
    """``matrix.t()``; for a long-lived matrix whose owner keeps that view as its attribute ``transposed``, that one."""
    view = None if torch.compiler.is_compiling() else getattr(matrix, "transposed", None)
    return matrix.t() if view is None else view


def lasting(made: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on a device, to be kept. On a GPU it is made in a thread of its own: whoever collects
    what a CUDA graph uses (torch.compile's "reduce-overhead") does so by thread, and would count it in. It is written
    there too, which the host waits for: its memory is that of the thread's stream."""
    if device.type != "cuda":
        return made.to(device)
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(made.to, device).result()


_zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def zero_like(x: Tensor) -> Tensor:
    """A 0-d zero of x's dtype and device, to be broadcast by ``addmm(..., beta=0)``; cached, never written."""
    if torch.compiler.is_compiling() or type(x) is not Tensor and not isinstance(x, torch.nn.Parameter):
        return x.new_zeros(())
    key = (x.dtype, x.device)
    zero = _zeros.get(key)
    if zero is None:
        zero = _zeros[key] = lasting(torch.zeros((), dtype=x.dtype, device="cpu"), x.device)
    return zero
