"""Modules that others read the weights of instead of calling them, so that an adapter there has no effect."""

from __future__ import annotations

import dis
import inspect
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from types import CodeType

import torch
from torch import nn

from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.sites import parts_of
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.parameters import Targets, full_names

#: what is asked of a weight without using its values
_DESCRIPTIONS = {"dtype", "device", "shape", "size", "dim", "ndim", "is_meta", "requires_grad", "data_ptr"}
#: called by these only where the model is quantised, and read otherwise
_READ_UNLESS_QUANTIZED = {("JambaMambaMixer", "dt_proj"), ("FalconMambaMixer", "dt_proj")}


def say_read_by_parents(inventory: Inventory, keys: Iterable[str], parameters: Targets) -> None:
    """Warn of modules, and Parameters of modules, that their parents read the weights of instead of calling them."""
    unused, in_evaluation = defaultdict(list), []
    for key in (*keys, *parameters):
        parent, _, leaf = key.rpartition(".")
        kind = inventory.base_module(parent) if parent in inventory.names else inventory.model
        if key not in parameters and _never_calls(kind, leaf):
            unused[type(kind), leaf].append(key)
        elif isinstance(kind, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            if key in parameters:
                in_evaluation += full_names({key: parameters[key]})
            elif not parts_of(inventory.base_module(key)):  # what is read of an attention has the adapters in it
                in_evaluation.append(key)
    for (parent_class, leaf), read in unused.items():
        torchs = "torch.nn." if parent_class.__module__.startswith("torch.") else ""
        warn(
            f"{enumerate_some(read)}: {torchs}{parent_class.__name__} reads the weight of its {leaf} and never calls "
            f"it, so an adapter there is neither used nor trained. Leave it out (exclude_modules=[{leaf!r}]).",
            PeftWarning,
        )
    if in_evaluation:
        warn(
            f"{enumerate_some(in_evaluation)}: in evaluation without gradients torch.nn.TransformerEncoderLayer reads "
            "these weights itself, past any adapter. Merge before evaluating, or switch that off: "
            "torch.backends.mha.set_fastpath_enabled(False).",
            PeftWarning,
        )


def _never_calls(parent: nn.Module, leaf: str) -> bool:
    if isinstance(parent, nn.MultiheadAttention):
        return leaf == "out_proj"
    if any((cls.__name__, leaf) in _READ_UNLESS_QUANTIZED for cls in type(parent).__mro__):
        return not hasattr(getattr(parent, "config", None), "_is_quantized")
    return _only_reads(type(parent), leaf)


@lru_cache(maxsize=1024)
def _only_reads(cls: type[nn.Module], leaf: str) -> bool:
    """Whether the class uses the weight of its child `leaf` when it is called, and no method of it calls the child or
    passes it on. What others do to it does not count: diffusers' attention is read where its projections are fused,
    and called by the processor that it passes itself to."""
    methods = _methods(cls)
    called, reached = ["forward"], {"forward"}
    while called:
        names = {name for code in methods.get(called.pop(), ()) for name in code.co_names}
        called += (new := names & methods.keys() - reached)
        reached |= new
    codes = {name: [c for c in codes if leaf in c.co_names] for name, codes in methods.items()}
    if not any("weight" in code.co_names for name in reached for code in codes.get(name, ())):
        return False
    reads = False
    for name, code in ((name, code) for name, several in codes.items() for code in several):
        steps = list(dis.get_instructions(code))
        for i, step in enumerate(steps):
            path = [s.argval if s.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for s in steps[i + 1 : i + 4]]
            if not _loads_self(step) or path[:1] != [leaf]:
                continue
            if path[1:2] in ([], [None]):
                return False
            reads |= name in reached and path[1] == "weight" and not _DESCRIPTIONS.intersection(path[2:])
    return reads


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


def _loads_self(step: dis.Instruction) -> bool:
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return False
    return (step.argval[-1] if isinstance(step.argval, tuple) else step.argval) == "self"  # one or two variables
