"""Global and shared memory, as a kernel's threads see them.

Faults: an access outside of what the kernel was given, or whose address is no multiple of its size; two warps at one
byte of shared memory between two barriers, one of them writing something else than what is there; a matrix product that
reads what was written there after the last fence, or what changes before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ORIGIN = 1 << 16  # global memory is seen from here on; nothing lies below it
SEVERAL = -2  # more than one warp


class _Everywhere:
    """All of the process's memory, as an array of numbers of so many bytes."""

    def __init__(self, size: int) -> None:
        shape = ((1 << 47) // size,)
        self.__array_interface__ = {"data": (ORIGIN, False), "shape": shape, "typestr": f"<u{size}", "version": 3}


EVERYWHERE = {size: np.asarray(_Everywhere(size)) for size in UNSIGNED}


class GlobalMemory:
    """The process's memory. ``ranges``: (start, end) of what a kernel was given; None: all of it."""

    def __init__(self, ranges: Iterable[tuple[int, int]] | None, fault: Callable[[str], Exception]) -> None:
        self.fault = fault
        self.ranges = None if ranges is None else np.array(sorted(ranges), np.uint64).reshape(-1, 2)

    def load(self, address: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """``count`` numbers of ``size`` bytes from each address on."""
        self._check(address, size * count)
        at = ((address - np.uint64(ORIGIN)) // np.uint64(size)).astype(np.int64)
        return [EVERYWHERE[size][at + i] for i in range(count)]

    def store(self, address: np.ndarray, size: int, values: Sequence[np.ndarray]) -> None:
        self._check(address, size * len(values))
        at = ((address - np.uint64(ORIGIN)) // np.uint64(size)).astype(np.int64)
        for i, value in enumerate(values):
            EVERYWHERE[size][at + i] = value

    def _check(self, address: np.ndarray, size: int) -> None:
        if address.size == 0:
            return
        if (address % np.uint64(size)).any():
            raise self.fault(f"an address in global memory is no multiple of {size}")
        if self.ranges is None:
            return
        if len(self.ranges) == 0:
            raise self.fault(f"{size} bytes of global memory: it was given none")
        found = np.maximum(np.searchsorted(self.ranges[:, 0], address, side="right") - 1, 0)
        start, end = self.ranges[found].T
        outside = (address < start) | (address + np.uint64(size) > end)
        if outside.any():
            where, start, end = (int(one[outside][0]) for one in (address, start, end))
            raise self.fault(f"{size} bytes at {where - start} of a tensor of {end - start} bytes")


class SharedMemory:
    """Of ``programs`` programs of ``threads`` threads, ``size`` bytes each; starts as NaN."""

    def __init__(self, programs: int, threads: int, size: int, fault: Callable[[str], Exception]) -> None:
        self.threads, self.size, self.fault = threads, size, fault
        self.pitch = -(-max(size, 1) // 1024) * 1024
        self.bytes = np.full(programs * self.pitch, 0xFF, np.uint8)
        self.views = {width: self.bytes.view(UNSIGNED[width]) for width in UNSIGNED}
        self.races = [_Races(self, program) for program in sorted({0, programs - 1})]

    def load(self, address: np.ndarray, lanes: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """``count`` numbers of ``size`` bytes from each address on, in the programs of these threads."""
        at = self.places(address, lanes, size * count) // size
        for watched in self.races:
            watched.read(address, lanes, size * count)
        return [self.views[size][at + i] for i in range(count)]

    def lend(self, address: np.ndarray, lanes: np.ndarray, known: bool) -> Callable[[], np.ndarray]:
        """Of 16 bytes from each address on, which a matrix product may read for these threads from now on: what gives
        them, as two numbers each, at its end, when they must be what they are now. known: not only these threads know
        of the end before the next barrier."""
        at = self.places(address, lanes, 16) // 16
        for watched in self.races:
            if known:
                watched.read(address, lanes, 16, lent=True)
            watched.check_fence(address, lanes)
        pieces = self.bytes.view(np.uint64).reshape(-1, 2)
        before = pieces[at]

        def now() -> np.ndarray:
            if not known:
                for watched in self.races:
                    watched.read(address, lanes, 16)
            found = pieces[at]
            if not np.array_equal(found, before):
                raise self.fault("shared memory changes while a matrix product may read it")
            return found

        return now

    def store(self, address: np.ndarray, lanes: np.ndarray, size: int, values: Sequence[np.ndarray]) -> None:
        at = self.places(address, lanes, size * len(values)) // size
        bytes_ = np.stack(values, 1).view(np.uint8)
        for watched in self.races:
            watched.write(address, lanes, bytes_)
        for i, value in enumerate(values):
            self.views[size][at + i] = value
        for watched in self.races:
            watched.written(address, lanes, bytes_)

    def places(self, address: np.ndarray, lanes: np.ndarray, size: int) -> np.ndarray:
        """In `bytes`."""
        if address.size and ((address % size).any() or address.min() < 0 or address.max() + size > self.size):
            raise self.fault(f"{size} bytes at {address.min()} to {address.max()} of {self.size} bytes shared")
        return address + lanes // self.threads * self.pitch

    def barrier(self, lanes: np.ndarray | None) -> None:
        for watched in self.races:
            if lanes is None or lanes[watched.first]:
                watched.epoch += 1

    def fence(self, lanes: np.ndarray | None) -> None:
        """What these threads wrote can be read by others than threads."""
        for watched in self.races:
            if lanes is None or lanes[watched.first : watched.first + self.threads].any():
                watched.fence += 1


class _Races:
    """Who was at each byte of one program's shared memory since its last barrier."""

    def __init__(self, memory: SharedMemory, program: int) -> None:
        self.memory, self.first, self.epoch = memory, program * memory.threads, 0
        self.bytes = memory.bytes[program * memory.pitch :][: memory.pitch]
        self.written_in, self.writer, self.read_in, self.reader = (np.full(memory.pitch, -1) for _ in range(4))
        self.fence, self.written_after = 0, np.full(memory.pitch // 16, -1)  # which fence 16 bytes were written after

    def _own(self, address: np.ndarray, lanes: np.ndarray, size: int) -> Iterator[Any]:
        """Of the accesses of this program: which they are, every byte, and the warp that is at it."""
        mine = (lanes >= self.first) & (lanes < self.first + self.memory.threads)
        if mine.any():
            at = (address[mine][:, None] + np.arange(size)).ravel()
            yield mine, at, np.repeat((lanes[mine] - self.first) // 32, size)

    def _by_others(self, when: np.ndarray, who: np.ndarray, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        return (when[at] == self.epoch) & (who[at] != warps)

    def read(self, address: np.ndarray, lanes: np.ndarray, size: int, lent: bool = False) -> None:
        for _, at, warps in self._own(address, lanes, size):
            if self._by_others(self.written_in, self.writer, at, warps).any():
                raise self.memory.fault("reads shared memory that another warp wrote since the last barrier")
            if lent:
                continue
            several = self._by_others(self.read_in, self.reader, at, warps)
            self.read_in[at], self.reader[at] = self.epoch, warps
            self.reader[at[several | (self.reader[at] != warps)]] = SEVERAL

    def check_fence(self, address: np.ndarray, lanes: np.ndarray) -> None:
        for _, at, _ in self._own(address, lanes, 1):
            if (self.written_after[at // 16] == self.fence).any():
                raise self.memory.fault("a matrix product reads what was written to shared memory after the last fence")

    def write(self, address: np.ndarray, lanes: np.ndarray, bytes_: np.ndarray) -> None:
        """``bytes_`` [accesses, bytes] are about to be written. Warps may write what others wrote."""
        for mine, at, warps in self._own(address, lanes, bytes_.shape[1]):
            if self._by_others(self.read_in, self.reader, at, warps).any():
                raise self.memory.fault("writes shared memory that another warp read since the last barrier")
            again = self._by_others(self.written_in, self.writer, at, warps)
            if (self.bytes[at] != bytes_[mine].ravel())[again].any():
                raise self.memory.fault("writes shared memory that another warp wrote since the last barrier")
            self.written_in[at], self.writer[at] = self.epoch, warps
            self.written_after[address[mine] // 16] = self.fence

    def written(self, address: np.ndarray, lanes: np.ndarray, bytes_: np.ndarray) -> None:
        for mine, at, warps in self._own(address, lanes, bytes_.shape[1]):
            if ((self.writer[at] != warps) & (self.bytes[at] != bytes_[mine].ravel())).any():
                raise self.memory.fault("two warps write other values to the same shared memory")
