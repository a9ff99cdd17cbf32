"""What runs beside the threads that ask for it: copies into shared memory, Hopper's and Blackwell's matrix products,
loads and stores of tensor memory.

A GPU may do these at any time until somebody waits for them. Here they take place when they are waited for, so that
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


class Work(NamedTuple):
    """A matrix product, or what else is done by groups: how, the registers that it writes, and what asked for it."""

    do: Callable[[], None]
    registers: Sequence[str]
    instruction: Any


class Groups:
    """Work by groups, done in the order in which it was asked for."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.groups: list[list[Work]] = [[]]  # the last one is not committed

    def ask(self, work: Work) -> None:
        if self.machine.eager:
            work.do()
        else:
            self.groups[-1].append(work)
            self.machine.awaited.update(dict.fromkeys(work.registers, self))

    def commit(self) -> None:
        self.groups.append([])

    def wait(self, left: int) -> None:
        """Until at most ``left`` committed groups are under way."""
        done: set[str] = set()
        while len(self.groups) - 1 > left:
            for work in self.groups.pop(0):
                self.machine.at(work.instruction, work.do)
                done.update(work.registers)
        for register in done.difference(*(work.registers for group in self.groups for work in group)):
            self.machine.awaited.pop(register, None)

    def wait_for_one(self) -> bool:
        """For the oldest of the committed groups, if there is one."""
        found = len(self.groups) > 1
        self.wait(max(len(self.groups) - 2, 0))
        return found

    def finish(self) -> None:
        """A register that is read ends what writes it, as the assembler would have it."""
        self.commit()
        self.wait(0)
