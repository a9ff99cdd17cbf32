"""How libraries that test `isinstance(model, peft.PeftModel)` recognise objects of peftfast, without anything being
imported, changed or put in order for it.

`isinstance(x, cls)` looks at `type(x)` and then at `x.__class__` (`unittest.mock` passes for other classes so).
Objects of classes that derive from `HasCounterpart` answer the second question with a class derived from their own and
from PEFT's of the same name. It is built when somebody asks, and only if the real `peft` is loaded by then, which
whoever asks must have done; so the order of imports does not matter, and without `peft` nothing happens at all.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from peftfast.interop.alias import take_if_vacant

_object_class = object.__dict__["__class__"]

#: (own class, PEFT's classes) -> the class derived from both
_derived: dict[tuple[type, ...], type] = {}
_origin: dict[type, type] = {}


class HasCounterpart:
    """Mixin of the classes that PEFT has too."""

    def counterparts(self) -> tuple[str, ...]:
        """Dotted names below `peft` of the classes that this object may pass for, in the order of derivation."""
        return ()

    def _get_class(self) -> type:
        return _class_for(self)

    def _set_class(self, cls: type) -> None:
        # FSDP2 and parametrizations derive a class from `module.__class__` and assign it: keep PEFT's code out of it
        _object_class.__set__(self, _without_counterparts(cls))

    __class__ = property(_get_class, _set_class)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the default would store `type(self)` and insist that it is `self.__class__`
        cls = type(self)
        getstate = getattr(cls, "__getstate__", None)
        return _new, (cls,), self.__dict__ if getstate is None else getstate(self)


def _new(cls: type) -> Any:
    take_if_vacant()  # a model that comes by pickle may be the first that this process has of peftfast
    return cls.__new__(cls)


def real_peft() -> types.ModuleType | None:
    """The `peft` package that is loaded now; None if none is, or if peftfast itself serves that name."""
    module = sys.modules.get("peft")
    return None if module is None or getattr(module, "_served_by_peftfast", False) else module


def _class_for(instance: HasCounterpart) -> type:
    cls = type(instance)
    peft = real_peft()
    if peft is None:
        return cls
    found = [c for c in map(_find, instance.counterparts()) if c is not None]
    made = _derived.get((cls, *found))
    if made is not None:  # the usual answer, many times in every walk of a model
        return made
    theirs = tuple(c for c in found if not any(c in d.__mro__[1:] for d in found))  # without bases of others
    if not theirs:
        return cls
    key = (cls, *theirs)
    made = _derived.get(key)
    if made is None:
        if issubclass(cls, theirs):
            return cls
        made = types.new_class(cls.__name__, key)
        made.__module__, made.__qualname__ = cls.__module__, cls.__qualname__
        _derived[key], _origin[made] = made, cls
    return made


def _find(name: str) -> type | None:
    """A class of the loaded `peft` by dotted name; None while its module is not loaded: nobody can ask for it then."""
    path, _, attribute = f"peft.{name}".rpartition(".")
    found = getattr(sys.modules.get(path), attribute, None)
    return found if isinstance(found, type) else None


def _without_counterparts(cls: type) -> type:
    if cls in _origin:
        return _origin[cls]
    bases = tuple(_origin.get(base, base) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, {}, lambda namespace: namespace.update(body))
