"""What modules do with the modules inside them: call them, or read their weights, past whatever is adapted there."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

from torch import nn

from peftfast.layers.walk import at

#: what is asked of a weight without using its values
_DESCRIPTIONS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "requires_grad", "data_ptr"}
#: called by these only where the model is quantised, and read otherwise; by those of transformers 5.0 in any case
_READ_UNLESS_QUANTIZED = {("JambaMambaMixer", "dt_proj"), ("FalconMambaMixer", "dt_proj")}


def read_by_parent(model: nn.Module, name: str) -> bool:
    """`never_calls` of the module `name` of `model`."""
    parent, _, leaf = name.rpartition(".")
    return never_calls(at(model, parent), leaf)


def needs_dense(model: nn.Module, name: str) -> bool:
    """Whether the module `name` of `model` has a parent that fails with a packed weight: it reads the weight instead of
    calling the module, or casts to the weight's dtype (LongT5's `wo`) and does not ask whether the model is quantised.
    """
    parent, _, leaf = name.rpartition(".")
    cls = type(at(model, parent))
    return _only_reads(cls, leaf) or _casts_to_dtype(cls, leaf)


def never_calls(parent: nn.Module, leaf: str) -> bool:
    """Whether a module reads the weight of its child `leaf` and never calls it."""
    if isinstance(parent, nn.MultiheadAttention):
        return leaf == "out_proj"
    asks = any((cls.__name__, leaf) in _READ_UNLESS_QUANTIZED for cls in type(parent).__mro__)
    return _only_reads(type(parent), leaf, asks and not hasattr(getattr(parent, "config", None), "_is_quantized"))


@lru_cache(maxsize=1024)
def _only_reads(cls: type[nn.Module], leaf: str, unless_quantized: bool = False) -> bool:
    """Whether the class uses the weight of its child `leaf` when it is called, and no method of it calls the child or
    passes it on. What others do to it does not count: diffusers' attention is read where its projections are fused,
    and called by the processor that it passes itself to. `unless_quantized`: nor do methods that ask whether it is."""
    reads = False
    for when_called, path, code in _mentions(cls, leaf):
        if unless_quantized and "_is_quantized" in code.co_consts:
            reads = True
            continue
        if path[0] is None:
            return False
        reads |= when_called and path[0] == "weight" and not _DESCRIPTIONS.intersection(path[1:])
    return reads


@lru_cache(maxsize=1024)
def _casts_to_dtype(cls: type[nn.Module], leaf: str) -> bool:
    asks = any("_is_quantized" in code.co_consts for codes in _methods(cls).values() for code in codes)
    return not asks and any(called and path == ["weight", "dtype"] for called, path, _ in _mentions(cls, leaf))


def _mentions(cls: type[nn.Module], leaf: str) -> Iterator[tuple[bool, list[str | None], CodeType]]:
    """Where methods say `self.leaf`: whether they run when the module is called, the next two attributes, and their
    code. Nothing where none of those that run says "weight" as well, or hands the child to a method that reads its
    weight."""
    methods = _methods(cls)
    called, reached = ["forward"], {"forward"}
    while called:
        names = {name for code in methods.get(called.pop(), ()) for name in code.co_names}
        called += (new := names & methods.keys() - reached)
        reached |= new
    codes = {name: [c for c in codes if leaf in c.co_names] for name, codes in methods.items()}
    readers = {c for several in codes.values() for c in several if _calls_readers(c, methods)}
    if not any("weight" in c.co_names or c in readers for name in reached for c in codes.get(name, ())):
        return
    for name, code in ((name, code) for name, several in codes.items() for code in several):
        for path in _uses(code, "self"):
            if path[:1] == [leaf]:
                handed_on = path[1:2] == [None] and code in readers
                yield name in reached, ["weight"] if handed_on else path[1:], code


def _calls_readers(code: CodeType, methods: dict[str, list[CodeType]]) -> bool:
    """Whether all methods that some code names read the weight of an argument, and do nothing else with that."""
    named = [methods[name] for name in code.co_names if name in methods]
    return bool(named) and all(any(map(_reads_argument, several)) for several in named)


def _reads_argument(code: CodeType) -> bool:
    if "weight" not in code.co_names:
        return False
    uses = [list(_uses(code, argument)) for argument in code.co_varnames[1 : code.co_argcount]]
    return any(
        found and all(path[:1] == ["weight"] and not _DESCRIPTIONS.intersection(path[1:]) for path in found)
        for found in uses
    )


def _uses(code: CodeType, variable: str) -> Iterator[list[str | None]]:
    """What follows a variable wherever it is named: up to three attributes, None for anything else."""
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        *before, last = _loaded(step)
        if variable in before:
            yield [None]
        if variable == last:
            yield [s.argval if s.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for s in steps[i + 1 : i + 4]]


def _methods(cls: type[nn.Module]) -> dict[str, list[CodeType]]:
    """The code of a class's methods by name, of those it inherits and of what is defined inside them."""
    found: dict[str, list[CodeType]] = defaultdict(list)
    for base in cls.__mro__:
        if base.__module__.startswith("torch."):
            continue
        for name, member in vars(base).items():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            inside = [code] if code is not None and name != "__init__" else []
            while inside:
                found[name].append(code := inside.pop())
                inside += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


def _loaded(step: dis.Instruction) -> tuple[str | None, ...]:
    """The variables that an instruction loads, one or two."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return (None,)
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
