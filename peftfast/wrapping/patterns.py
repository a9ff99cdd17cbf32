"""`rank_pattern` and `alpha_pattern`: values for modules by their names, read and written."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from peftfast.keys import ends_of


def pattern_value(pattern: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first entry of a `rank_pattern` or `alpha_pattern` whose key matches the module name `key`."""
    if not pattern:
        return default
    names = tuple(pattern)
    places = patterns_of(names).matching(key)
    return pattern[names[min(places)]] if places else default


def pattern_of(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` that gives every module its value, in whatever order a file has it; without
    those that have the default."""
    ends = Counter(end for name in values for end in ends_of(name))
    pattern, exact = {}, {}
    for name, value in values.items():
        if value != default:
            front = "^" if ends[name] > 1 else ""  # or it would match the longer names as well
            exact[front + re.escape(name)] = value
            pattern[front + name if _PLAIN.fullmatch(name) else front + re.escape(name)] = value
    # dots of names match any letter, which hardly ever makes a difference
    right = all(pattern_value(pattern, name, default) == value for name, value in values.items())
    return pattern if right else exact


#: Names that mean themselves, but for dots, which in a regex are any letter.
_PLAIN = re.compile(r"[\w.-]+")

#: How a key of a pattern is compared with a module's name.
END = r"(.*\.)?({})$"


class Patterns:
    """The keys of a `rank_pattern` or `alpha_pattern`, regexes for the ends of modules' names. There may be one for
    every module, so those that are plain names are looked up: tried one by one, they take time by the square."""

    def __init__(self, names: Iterable[str]) -> None:
        self.regexes: list[tuple[int, re.Pattern[str]]] = []  # with their places among the names
        #: (length, where dots are from the end, whether it is all of a module's name) -> name -> its place
        self.shapes: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        for place, name in enumerate(names):
            plain = name.removeprefix("^")
            if _PLAIN.fullmatch(plain):
                dots = tuple(i - len(plain) for i, letter in enumerate(plain) if letter == ".")
                self.shapes.setdefault((len(plain), dots, plain != name), {})[plain] = place
            else:
                self.regexes.append((place, re.compile(END.format(name))))

    def matching(self, key: str) -> list[int]:
        """The places of all that match this name."""
        found = [place for place, regex in self.regexes if regex.match(key)]
        for (size, dots, whole), places in self.shapes.items():
            if len(key) == size or (not whole and key[-size - 1 : -size] == "."):
                end = list(key[-size:])
                for dot in dots:
                    end[dot] = "."
                place = places.get("".join(end))
                if place is not None:
                    found.append(place)
        return found


#: Made once for all modules; by `re` itself, which remembers 512, every one would be compiled for every module.
patterns_of = functools.lru_cache(maxsize=32)(Patterns)
