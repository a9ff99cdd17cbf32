"""What a config field may hold: small rules that check a value, say what they expect, and describe themselves as JSON
schema."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peftfast.errors import close_matches


@dataclass(frozen=True)
class Rule:
    """One kind of value.

    Attributes:
        expects: what an error message says is expected, as a noun phrase.
        typed: whether a value has the right type (else TypeError).
        valid: whether a value of the right type is in range (else ValueError).
        schema: the same as a JSON schema fragment.
        choices: for did-you-mean.
        tidy: what means the same as a value of a kind that is accepted and not kept, as OmegaConf's lists.
    """

    expects: str
    typed: Callable[[Any], bool]
    valid: Callable[[Any], bool] = lambda value: True
    schema: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    tidy: Callable[[Any], Any] = lambda value: value

    def enforce(self, value: Any, name: str) -> Any:
        """The value as it is kept; TypeError or ValueError if it is not what the rule expects."""
        kept = self.tidy(value)
        if not self.typed(kept):
            raise TypeError(f"{name} must be {self.expects}, got {value!r} of type {type(value).__name__}")
        if not self.valid(kept):
            raise ValueError(f"{name} must be {self.expects}, got {value!r}.{close_matches(value, self.choices)}")
        return kept


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _own_number(value: Any) -> Any:
    """Numbers of other libraries (numpy's, of a search for settings), which no file could hold, as Python's own."""
    if _is_integer(value):
        return int(value)
    return float(value) if _is_number(value) and not isinstance(value, float) else value


def boolean() -> Rule:
    """True or False, numpy's too; 1, 0 and None, which files of other libraries have, mean the same."""

    def tidy(value: Any) -> Any:
        own = getattr(value, "dtype", None) == "bool" and value.shape == ()
        return bool(value) if own or value is None or (_is_integer(value) and value in (0, 1)) else value

    return Rule("True or False", lambda v: isinstance(v, bool), schema={"type": ["boolean", "null"]}, tidy=tidy)


def none_as(value: Any, rule: Rule) -> Rule:
    """`rule`, where None means `value`."""
    schema = {"anyOf": [{"type": "null"}, rule.schema]}
    return dataclasses.replace(rule, schema=schema, tidy=lambda v: value if v is None else rule.tidy(v))


def text() -> Rule:
    return Rule("a string", lambda v: isinstance(v, str), schema={"type": "string"})


def integer(minimum: int | None = None) -> Rule:
    expects = "an integer" if minimum is None else f"an integer of at least {minimum}"
    schema = {"type": "integer"} if minimum is None else {"type": "integer", "minimum": minimum}
    return Rule(expects, _is_integer, lambda v: minimum is None or v >= minimum, schema, tidy=_own_number)


def number(minimum: float = -math.inf, maximum: float = math.inf) -> Rule:
    """A finite real number in `[minimum, maximum]`."""
    bounds = "" if (minimum, maximum) == (-math.inf, math.inf) else f" in [{minimum:g}, {maximum:g}]"
    schema: dict[str, Any] = {"type": "number"}
    if minimum > -math.inf:
        schema["minimum"] = minimum
    if maximum < math.inf:
        schema["maximum"] = maximum
    return Rule(
        f"a finite number{bounds}",
        _is_number,
        lambda v: math.isfinite(v) and minimum <= v <= maximum,
        schema,
        tidy=_own_number,
    )


def positive() -> Rule:
    """A finite real number above 0."""
    return Rule(
        "a finite number above 0",
        _is_number,
        lambda v: math.isfinite(v) and v > 0,
        {"type": "number", "exclusiveMinimum": 0},
        tidy=_own_number,
    )


def torch_dtype(*, floating: bool = False) -> Rule:
    """A `torch.dtype`, or its name, as files have it."""

    def tidy(value: Any) -> Any:
        named = getattr(torch, value, None) if isinstance(value, str) else None
        return named if isinstance(named, torch.dtype) else value

    return Rule(
        f"a {'floating-point ' if floating else ''}torch.dtype or its name, as torch.bfloat16 or 'bfloat16'",
        lambda v: isinstance(v, torch.dtype),
        lambda v: v.is_floating_point or not floating,
        {"type": "string"},
        tidy=tidy,
    )


def one_of(*choices: Any, patterns: Iterable[str] = ()) -> Rule:
    """One of some constants, or a string that fully matches one of `patterns`."""
    shown = ", ".join(repr(c) for c in (*choices, *patterns))
    kinds = tuple({type(c) for c in choices} | ({str} if patterns else set()))
    patterns = tuple(re.compile(p) for p in patterns)

    def valid(value: Any) -> bool:
        return any(value == c and type(value) is type(c) for c in choices) or (
            isinstance(value, str) and any(p.fullmatch(value) for p in patterns)
        )

    schema = {"anyOf": [{"enum": list(choices)}] + [{"type": "string", "pattern": f"^{p.pattern}$"} for p in patterns]}
    names = tuple(c for c in choices if isinstance(c, str))
    return Rule(f"one of {shown}", lambda v: isinstance(v, kinds), valid, schema, names)


def optional(rule: Rule) -> Rule:
    return Rule(
        f"None or {rule.expects}",
        lambda v: v is None or rule.typed(v),
        lambda v: v is None or rule.valid(v),
        {"anyOf": [{"type": "null"}, rule.schema]},
        rule.choices,
        lambda v: v if v is None else rule.tidy(v),
    )


def either(*rules: Rule) -> Rule:
    return Rule(
        " or ".join(r.expects for r in rules),
        lambda v: any(r.typed(v) for r in rules),
        lambda v: any(r.typed(v) and r.valid(v) for r in rules),
        {"anyOf": [r.schema for r in rules]},
        tuple(c for r in rules for c in r.choices),
        lambda v: functools.reduce(lambda kept, r: r.tidy(kept), rules, v),
    )


def sequence(of: Rule, distinct: bool = False) -> Rule:
    """A list, tuple or set; of other collections, as `dict.keys()`, a list is made."""

    def tidy(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
            return value
        kept = [of.tidy(e) for e in value]
        same = isinstance(value, (list, tuple, set, frozenset)) and all(map(operator.is_, kept, value))
        return value if same else kept

    return Rule(
        f"a list in which each element is {of.expects}{' and is named once' if distinct else ''}",
        lambda v: isinstance(v, (list, tuple, set, frozenset)) and all(of.typed(e) for e in v),
        lambda v: all(of.valid(e) for e in v) and not (distinct and len(set(v)) < len(v)),
        {"type": "array", "items": of.schema} | ({"uniqueItems": True} if distinct else {}),
        tidy=tidy,
    )


def pair(of: Rule) -> Rule:
    """A list or tuple of two."""
    return Rule(
        f"a pair in which each is {of.expects}",
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(of.typed(e) for e in v),
        lambda v: all(of.valid(e) for e in v),
        {"type": "array", "items": of.schema, "minItems": 2, "maxItems": 2},
        tidy=sequence(of).tidy,
    )


def table(values: Rule | None = None) -> Rule:
    """A dict with string keys; of other mappings a dict is made."""

    def tidy(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        kept = {k: e if values is None else values.tidy(e) for k, e in value.items()}
        same = isinstance(value, dict) and all(map(operator.is_, kept.values(), value.values()))
        return value if same else kept

    if values is None:
        return Rule("a dict with string keys", lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v),
                    schema={"type": "object"}, tidy=tidy)  # fmt: skip
    return Rule(
        f"a dict from strings to values that are {values.expects}",
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and values.typed(e) for k, e in v.items()),
        lambda v: all(values.valid(e) for e in v.values()),
        {"type": "object", "additionalProperties": values.schema},
        tidy=tidy,
    )


def instance(*classes: type) -> Rule:
    names = " or ".join(c.__name__ for c in classes)
    return Rule(f"a {names}", lambda v: isinstance(v, classes), schema={"type": "object"})


def only(value: Any, why: str) -> Rule:
    """A field that PEFT has and this library cannot honour: anything but its default is refused, never ignored."""
    return Rule(f"{value!r} ({why})", lambda v: True, lambda v: v == value or not v, {"const": value})
