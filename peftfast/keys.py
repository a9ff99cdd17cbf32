"""Names of modules and tensors: in the base model, in a PeftModel's state dict, in files and in configs."""

from __future__ import annotations

import re
from itertools import accumulate

#: In front of a module's name in the base model.
PREFIX = "base_model.model."

#: What FSDP, torch.compile and torch's checkpoint_wrapper call the module that they stand around.
WRAPPED = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})

_WRAPPERS = re.compile(rf"(^|\.)({'|'.join(sorted(WRAPPED))}|module(?=\.base_model))\.")


def in_base(key: str) -> str:
    """The name inside the base model, which a bare base model's own state dict has."""
    return key.removeprefix(PREFIX)


def strip_wrappers(name: str) -> str:
    """A parameter's name without what wrappers of modules put into it."""
    while True:
        shorter = _WRAPPERS.sub(r"\1", name)
        if shorter == name:
            return name
        name = shorter


def ends_of(name: str) -> list[str]:
    """The name and what is behind each of its dots: by any of these a config means the module."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def starts_of(name: str) -> list[str]:
    """What is before each of the name's dots, the modules that it is in from the outermost on, and the name."""
    return list(accumulate(name.split("."), "{}.{}".format))
