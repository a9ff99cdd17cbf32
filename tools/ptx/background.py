"""What runs beside the threads that ask for it: copies into shared memory, and Hopper's matrix products.

A GPU may do both at any time until somebody waits for them. Here they take place when they are waited for, so that
what is read before is wrong; or, if ``eager``, when they are asked for, so that what was still being read is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Copy(NamedTuple):
    """``cp.async``: bytes from global memory, or zeros."""

    to: np.ndarray
    source: np.ndarray
    lanes: np.ndarray
    given: np.ndarray  # bytes that are read; those up to `size` become 0
    size: int
    instruction: Any

    def of(self, lanes: np.ndarray) -> Copy:
        """Those of these threads."""
        now = lanes[self.lanes]
        return self._replace(to=self.to[now], source=self.source[now], lanes=self.lanes[now], given=self.given[now])


class Copies:
    """Copies by groups, of which each thread waits for all but its last few."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.asked: list[Copy] = []
        self.groups: list[tuple[np.ndarray, list[Copy]]] = []  # threads for which it is under way

    def ask(self, copy: Copy) -> None:
        if self.machine.eager:
            self.machine.copy(copy)
        else:
            self.asked.append(copy)

    def commit(self, lanes: np.ndarray | None) -> None:
        self.groups.append((np.ones(self.machine.lanes, bool) if lanes is None else lanes, self.asked))
        self.asked = []

    def wait(self, left: int, lanes: np.ndarray | None) -> None:
        """Until at most ``left`` groups of these threads are under way."""
        later = np.zeros(self.machine.lanes, np.int64)  # groups of each thread that came after
        finished = []
        for under_way, copies in reversed(self.groups):
            done = under_way & (later >= left)
            finished.append((done if lanes is None else done & lanes, copies))
            later += under_way
        for done, copies in reversed(finished):
            for copy in copies if done.any() else ():
                self.machine.copy(copy.of(done))
        still = [(group[0] & ~done, group[1]) for group, (done, _) in zip(self.groups, reversed(finished), strict=True)]
        self.groups = [group for group in still if group[0].any()]


class Product(NamedTuple):
    """``wgmma``: what computes it, and the registers that it writes."""

    compute: Callable[[], None]
    registers: Sequence[str]
    instruction: Any


class Products:
    """Matrix products by groups."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.groups: list[list[Product]] = [[]]  # the last one is not committed
        self.registers: set[str] = set()  # written by those under way

    def ask(self, product: Product) -> None:
        if self.machine.eager:
            product.compute()
        else:
            self.groups[-1].append(product)
            self.registers.update(product.registers)

    def commit(self) -> None:
        self.groups.append([])

    def wait(self, left: int) -> None:
        """Until at most ``left`` committed groups are under way."""
        while len(self.groups) - 1 > left:
            for product in self.groups.pop(0):
                self.machine.at(product.instruction, product.compute)
        self.registers = {name for group in self.groups for product in group for name in product.registers}

    def read(self, register: str) -> None:
        """A register that is read ends what writes it, as the assembler would have it."""
        if register in self.registers:
            self.commit()
            self.wait(0)
