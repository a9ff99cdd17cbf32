"""Errors and warnings, and how a message names what is wrong, its value and the alternatives."""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable


class PeftError(Exception):
    """Base class of the errors that only this library raises."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """An adapter config matched no module of the model."""


class MissingTaskTypeError(PeftError, ValueError, KeyError):
    """A config that needs a task type has none; a KeyError as well, which is what PEFT raises."""

    __str__ = Exception.__str__


class NoSuchAdapterError(PeftError, ValueError, KeyError):
    """An adapter that is not there; a KeyError as well, which is what PEFT raises where it looks for its config."""

    __str__ = Exception.__str__


class AdapterLoadError(PeftError, RuntimeError):
    """Adapter weights that cannot be right for this model; nothing was changed."""


class PeftWarning(UserWarning):
    """Base class of this library's warnings."""


class AdapterMismatchWarning(PeftWarning):
    """Something about an adapter does not fit and was let pass, as PEFT lets it pass; `strict=True` refuses it."""


#: Whose frames may lie between a caller and a warning: this library, and what calls it for him.
_IN_BETWEEN = ("peftfast", "torch", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, naming the line outside of this library that led here, however deep this is."""
    import torch  # the command line shows its help without

    level = 2
    if not torch.compiler.is_compiling():  # which cannot look at frames, and breaks its graph for the warning alone
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _IN_BETWEEN:
            frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)  # noqa: TID251


def close_matches(value: object, known: Iterable[str], limit: int = 3) -> str:
    """`" Did you mean 'q_proj'?"`, or an empty string if nothing in `known` is near `value`, or it is known itself."""
    names = [str(k) for k in known]
    written = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), written, n=limit, cutoff=0.6)
    if not near or str(value) in names:
        return ""
    return " Did you mean " + " or ".join(repr(written[n]) for n in near) + "?"


def check_present(name: object, present: Collection[str], said: str = "not found") -> None:
    """TypeError if `name`, which is to mean one adapter, is no string; NoSuchAdapterError if it is of none of those
    `present`; PEFT, after which it is `said`, has several."""
    if not isinstance(name, str):
        raise TypeError(f"An adapter is named by a string, got {name!r} of type {type(name).__name__}")
    if name not in present:
        present = sorted(present)
        raise NoSuchAdapterError(f"Adapter {name} {said}.{close_matches(name, present)} Adapters present: {present}")


def check_path(value: object, what: str) -> None:
    """TypeError if `value`, which is to say where `what` is, is neither a string nor a path. Python takes numbers for
    open files."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{what} is named by a string or a path, got {value!r} of type {type(value).__name__}")


def enumerate_some(names: Iterable[str]) -> str:
    """A readable list that stays readable when there are thousands: the first eight names and how many follow."""
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def every_name(names: Iterable[str]) -> str:
    """All names, grouped where they are many."""
    names = list(names)
    if len(names) <= 20:
        return ", ".join(repr(n) for n in names)
    return f"{', '.join(map(repr, grouped(names)))} ({len(names)} names)"


def grouped(names: Iterable[str]) -> list[str]:
    """Names without the differences in their numbers, which become sets as in `layers.{0-31}.q_proj.lora_A.weight`:
    thousands stay readable, and none is left out."""
    groups: dict[str, list[set[int]]] = {}
    for name in names:
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)]
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name.replace("{", "{{").replace("}", "}}"))
        sets = groups.setdefault(pattern, [set() for _ in numbers])
        for known, number in zip(sets, numbers, strict=True):
            known.add(number)
    return [p.format(*("{" + _ranges(s) + "}" for s in sets)) for p, sets in groups.items()]


def _ranges(numbers: Iterable[int]) -> str:
    """`"0-3,7"` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
