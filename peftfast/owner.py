"""The way back from a part to what it is part of. Were it an ordinary reference, the two would keep each other, and a
model whose last user has gone would keep its memory until Python looks for cycles, which is long after the next one
wants it."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Owner(Generic[T]):
    """Called, it gives what it was made of; None once that is gone. A copy or pickle of the whole has parts that know
    the new whole."""

    __slots__ = ("_whole",)

    def __init__(self, whole: T) -> None:
        self._whole = weakref.ref(whole)  # itself, because compilers follow no class that derives from it

    def __call__(self) -> T:
        return self._whole()

    def __reduce__(self) -> tuple:
        return Owner, (self(),)
