"""Blackwell's tensor memory: 128 lanes of 512 columns of 4 bytes. A program's warp w reaches the 32 lanes from
32 (w % 4) on, its matrix products reach all.

Faults: columns that are not allocated, or not freed at the end; numbers that nobody wrote; a warp that loads what a
matrix product writes, or stores where one reads or writes, and neither waited for the product's mbarrier nor met a warp
that did at a barrier; a product at columns at which another warp was since the last barrier, or whose loads and stores
nobody waited for; two warps at one column since the last barrier, one of them storing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.background import Groups

COLUMNS = 512
HALF = 16  # of a warp's lanes: where there are products of 64 rows, each half is somebody's


def halves(rows: slice, columns: slice) -> list[slice]:
    """Where it is noted what happens in these of a warp's lanes: columns of the upper ones stand behind the lower's."""
    return [
        slice(columns.start + COLUMNS * half, columns.stop + COLUMNS * half)
        for half in range(rows.start // HALF, -(-rows.stop // HALF))
    ]


class Moves(Groups):
    """Loads, or stores: also who was where since the last barrier, and what nobody waited for."""

    def __init__(self, machine: Any, warps: int) -> None:
        super().__init__(machine)
        # who: a bit a warp
        self.when, self.who = (np.zeros((machine.count, 4, 2 * COLUMNS), np.int64) for _ in range(2))
        self.open = np.zeros((machine.count, warps, 2 * COLUMNS), np.int16)

    def by_others(self, at: tuple, epoch: np.ndarray, warp: np.ndarray) -> bool:
        return bool(((self.when[at] == epoch) & ((self.who[at] & ~(1 << warp)) != 0)).any())

    def visit(self, at: tuple, epoch: np.ndarray, warp: np.ndarray) -> None:
        self.who[at] = np.where(self.when[at] == epoch, self.who[at], 0) | 1 << warp
        self.when[at] = epoch


class TensorMemory:
    """Of all programs that run together, whose warps are counted through."""

    def __init__(self, machine: Any) -> None:
        self.machine, self.warps, count = machine, machine.threads // 32, machine.count
        self.numbers = np.zeros((count, 4, 32, COLUMNS), np.uint32)
        self.known = np.zeros(self.numbers.shape, bool)
        self.first = np.full((count, COLUMNS), -1)  # of the columns that were allocated together
        self.loads, self.stores = Moves(machine, self.warps), Moves(machine, self.warps)
        self.epoch = np.ones(count, np.int64)
        self.products = 0  # that were asked for, and so the number of the last one
        # of the last product
        self.results, self.operands = (np.zeros((count, 2 * COLUMNS), np.int64) for _ in range(2))
        self.seen = np.zeros((count, self.warps), np.int64)  # of how many products a warp knows that they are done
        self.done: dict[int, np.ndarray] = {}  # how many were, when somebody last arrived at an mbarrier

    def read(self, where: tuple) -> np.ndarray:
        if not self.known[where].all():
            raise self.machine.fault("tensor memory is read that nobody wrote")
        return self.numbers[where]

    def write(self, where: tuple, values: np.ndarray) -> None:
        self.numbers[where], self.known[where] = values, True

    # ---- rooms -----------------------------------------------------------------------------------------------
    def allocate(self, warps: np.ndarray, columns: int) -> int:
        """The first of so many columns; not the first of all if there is a choice, as beside another program."""
        programs = warps // self.warps
        for first in range(COLUMNS - columns, -1, -columns):
            if (self.first[programs, first : first + columns] < 0).all():
                self.first[programs, first : first + columns] = first
                return first
        raise self.machine.fault(f"waits for {columns} columns of tensor memory for ever")

    def free(self, warps: np.ndarray, columns: slice) -> None:
        programs, warp = np.divmod(warps, self.warps)
        size = columns.stop - columns.start
        if ((self.first[programs] == columns.start).sum(1) != size).any():
            raise self.machine.fault(f"{size} columns of tensor memory were not allocated at {columns.start}")
        for part in halves(slice(0, 2 * HALF), columns):
            self._waited_for(programs, warp, part, True)
            self._moved(programs, warp, part, True)
        self.first[programs, columns], self.known[programs, :, :, columns] = -1, False

    def end(self) -> None:
        if (self.first >= 0).any():
            raise self.machine.fault("ends without freeing tensor memory")

    # ---- who may be where ------------------------------------------------------------------------------------
    def _allocated(self, programs: np.ndarray, columns: slice) -> None:
        if columns.stop > COLUMNS or (self.first[programs, columns] < 0).any():
            raise self.machine.fault(f"columns {columns.start} to {columns.stop} of tensor memory are not allocated")

    def _waited_for(self, programs: np.ndarray, warp: np.ndarray, columns: slice, stores: bool) -> None:
        known = self.seen[programs, warp][:, None]
        for used in (self.results, self.operands) if stores else (self.results,):
            if (used[programs, columns] > known).any():
                raise self.machine.fault("tensor memory of a matrix product that this warp did not wait for")

    def _disturbing(self, stores: bool) -> tuple[Moves, ...]:
        return (self.stores, self.loads) if stores else (self.stores,)

    def _alone(
        self, programs: np.ndarray, warp: np.ndarray, quarters: np.ndarray, columns: slice, stores: bool
    ) -> tuple[tuple, np.ndarray, np.ndarray]:
        """Where these warps may be, since no other was there since the last barrier; the number of that; the warps."""
        visit = (programs[:, None], quarters, columns), self.epoch[programs, None, None], warp[:, None, None]
        if any(moves.by_others(*visit) for moves in self._disturbing(stores)):
            raise self.machine.fault("tensor memory at which another warp was since the last barrier")
        return visit

    def _moved(self, programs: np.ndarray, warp: np.ndarray, columns: slice, stores: bool) -> None:
        """All that was in these columns, in whatever lanes."""
        self._alone(programs, warp, np.arange(4), columns, stores)
        if any(moves.open[programs, :, columns].any() for moves in self._disturbing(stores)):
            raise self.machine.fault("tensor memory of a load or store that nobody waited for")

    def move(self, warps: np.ndarray, rows: slice, columns: slice, stores: bool) -> None:
        """Each of these warps is about to load, or store, in these of its lanes."""
        programs, warp = np.divmod(warps, self.warps)
        self._allocated(programs, columns)
        moves = self.stores if stores else self.loads
        for part in halves(rows, columns):
            self._waited_for(programs, warp, part, stores)
            moves.visit(*self._alone(programs, warp, warp[:, None] % 4, part, stores))
            moves.open[programs, warp, part] += 1

    def moved(self, warps: np.ndarray, rows: slice, columns: slice, stores: bool) -> None:
        """They have, and whoever wanted to wait for it has."""
        programs, warp = np.divmod(warps, self.warps)
        for part in halves(rows, columns):
            (self.stores if stores else self.loads).open[programs, warp, part] -= 1

    def multiply(self, warps: np.ndarray, rows: slice, columns: slice, stores: bool) -> None:
        """Product number `products`, which these warps ask for, is about to read or write here."""
        programs, warp = np.divmod(warps, self.warps)
        self._allocated(programs, columns)
        for part in halves(rows, columns):
            self._moved(programs, warp, part, stores)
            (self.results if stores else self.operands)[programs, part] = self.products

    def barrier(self, lanes: np.ndarray | None) -> None:
        here = slice(None) if lanes is None else lanes[:: self.machine.threads]
        self.epoch[here] += 1
        self.seen[here] = self.seen[here].max(1, keepdims=True)

    def arrive(self, at: np.ndarray, programs: np.ndarray, products: int) -> None:
        """So many products are done, and the mbarriers at these addresses say so."""
        for one in np.unique(at):
            done = self.done.setdefault(int(one), np.zeros(self.machine.count, np.int64))
            done[programs[at == one]] = products

    def wait(self, at: np.ndarray, lanes: np.ndarray) -> None:
        """These threads waited for the mbarriers at these addresses."""
        for one in np.unique(at):
            if int(one) in self.done:
                programs, warp = np.divmod(np.unique(lanes[at == one] // 32), self.warps)
                self.seen[programs, warp] = np.maximum(self.seen[programs, warp], self.done[int(one)][programs])
