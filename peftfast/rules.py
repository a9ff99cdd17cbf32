"""What a config field may hold: small rules that check a value, say what they expect, and describe themselves as JSON
schema."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """

    expects: str
    typed: Callable[[Any], bool]
    valid: Callable[[Any], bool] = lambda value: True
    schema: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    def enforce(self, value: Any, name: str) -> None:
        if not self.typed(value):
            raise TypeError(f"{name} must be {self.expects}, got {value!r} of type {type(value).__name__}")
        if not self.valid(value):
            raise ValueError(f"{name} must be {self.expects}, got {value!r}.{close_matches(value, self.choices)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def boolean() -> Rule:
    return Rule("True or False", lambda v: isinstance(v, bool), schema={"type": "boolean"})


def text() -> Rule:
    return Rule("a string", lambda v: isinstance(v, str), schema={"type": "string"})


def integer(minimum: int | None = None) -> Rule:
    expects = "an integer" if minimum is None else f"an integer of at least {minimum}"
    schema = {"type": "integer"} if minimum is None else {"type": "integer", "minimum": minimum}
    return Rule(expects, _is_integer, lambda v: minimum is None or v >= minimum, schema)


def number(minimum: float = -math.inf, maximum: float = math.inf) -> Rule:
    """A finite real number in `[minimum, maximum]`."""
    bounds = "" if (minimum, maximum) == (-math.inf, math.inf) else f" in [{minimum:g}, {maximum:g}]"
    schema: dict[str, Any] = {"type": "number"}
    if minimum > -math.inf:
        schema["minimum"] = minimum
    if maximum < math.inf:
        schema["maximum"] = maximum
    return Rule(f"a finite number{bounds}", _is_number, lambda v: math.isfinite(v) and minimum <= v <= maximum, schema)


def positive() -> Rule:
    """A finite real number above 0."""
    return Rule(
        "a finite number above 0",
        _is_number,
        lambda v: math.isfinite(v) and v > 0,
        {"type": "number", "exclusiveMinimum": 0},
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
    )


def either(*rules: Rule) -> Rule:
    return Rule(
        " or ".join(r.expects for r in rules),
        lambda v: any(r.typed(v) for r in rules),
        lambda v: any(r.typed(v) and r.valid(v) for r in rules),
        {"anyOf": [r.schema for r in rules]},
        tuple(c for r in rules for c in r.choices),
    )


def sequence(of: Rule) -> Rule:
    """A list, tuple or set."""
    return Rule(
        f"a list in which each element is {of.expects}",
        lambda v: isinstance(v, (list, tuple, set, frozenset)) and all(of.typed(e) for e in v),
        lambda v: all(of.valid(e) for e in v),
        {"type": "array", "items": of.schema},
    )


def pair(of: Rule) -> Rule:
    """A list or tuple of two."""
    return Rule(
        f"a pair in which each is {of.expects}",
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(of.typed(e) for e in v),
        lambda v: all(of.valid(e) for e in v),
        {"type": "array", "items": of.schema, "minItems": 2, "maxItems": 2},
    )


def table(values: Rule | None = None) -> Rule:
    """A dict with string keys."""
    if values is None:
        return Rule("a dict with string keys", lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v),
                    schema={"type": "object"})  # fmt: skip
    return Rule(
        f"a dict from strings to values that are {values.expects}",
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and values.typed(e) for k, e in v.items()),
        lambda v: all(values.valid(e) for e in v.values()),
        {"type": "object", "additionalProperties": values.schema},
    )


def instance(*classes: type) -> Rule:
    names = " or ".join(c.__name__ for c in classes)
    return Rule(f"a {names}", lambda v: isinstance(v, classes), schema={"type": "object"})


def only(value: Any, why: str) -> Rule:
    """A field that PEFT has and this library cannot honour: anything but its default is refused, never ignored."""
    return Rule(f"{value!r} ({why})", lambda v: True, lambda v: v == value or not v, {"const": value})
