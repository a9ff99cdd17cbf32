"""Runs a PTX kernel on the host: every thread of several programs at once, each register a NumPy array over them.

What would be an error on a GPU, or a race, is a `Fault` with the instruction that made it: see `memory` and
`background`; also a barrier that not every thread of a program reaches, a part of a warp at an instruction for all of
it, a register that nobody wrote. An instruction that is not known here is a `NotImplementedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ptx.background import Copies, Copy, Groups
from ptx.instructions import compiled, gate
from ptx.memory import UNSIGNED, GlobalMemory, SharedMemory
from ptx.program import Instruction, Program
from ptx.tensor_memory import TensorMemory
from ptx.traffic import Traffic

BATCH = 1 << 14  # threads that are run together
UNWRITTEN = 0x7FFF7FFF7FFF7FFF  # NaN in every type


class Fault(RuntimeError):
    """What a GPU would not do, or not always."""


def run(
    program: Program, arguments: Sequence[bytes], grid: tuple[int, int, int], threads: int, shared: int,
    ranges: Iterable[tuple[int, int]] | None = None, *, eager: bool = False, traffic: Traffic | None = None,
) -> None:  # fmt: skip
    """Launches a kernel.

    arguments: the bytes of each parameter, in order. threads, shared: of a program; bytes of shared memory.
    ranges: (start, end) of the global memory that it may use; None: all. eager: see `background`.
    traffic: counts accesses to memory.
    """
    if threads % 32:
        raise Fault(f"{program.name}: {threads} threads are no whole warps")
    for block in program.blocks:
        if block.instructions and not block.steps:
            block.steps, block.able = [compiled(one) for one in block.instructions], gate(block.instructions[0])
    total, together = grid[0] * grid[1] * grid[2], max(1, BATCH // threads)
    with np.errstate(all="ignore"):
        for first in range(0, total, together):
            programs = np.arange(first, min(first + together, total))
            Multiprocessor(program, arguments, grid, programs, threads, shared, ranges, eager, traffic).run()


class Multiprocessor:
    """Some of a launch's programs, run together. ``lanes`` [threads] of an instruction are those that it is for; None:
    all of them."""

    def __init__(
        self, program: Program, arguments: Sequence[bytes], grid: tuple[int, int, int], programs: np.ndarray,
        threads: int, shared: int, ranges: Iterable[tuple[int, int]] | None, eager: bool, traffic: Traffic | None,
    ) -> None:  # fmt: skip
        self.program, self.threads, self.eager = program, threads, eager
        self.parameters = np.zeros(-(-max(end for _, end in program.parameters.values()) // 8) * 8, np.uint8)
        for (start, end), given in zip(program.parameters.values(), arguments, strict=True):
            self.parameters[start:end] = np.frombuffer(given, np.uint8)
        self.count, self.lanes = len(programs), len(programs) * threads
        self.instruction: Instruction | None = None
        self.memory = GlobalMemory(ranges, self.fault)
        self.shared = SharedMemory(self.count, threads, shared, self.fault)
        self.traffic, self.copies, self.products = traffic, Copies(self), Groups(self)
        self.awaited: dict[str, Groups] = {}  # registers that work under way is to write
        self.tensor: TensorMemory | None = None
        thread = np.tile(np.arange(threads, dtype=np.uint32), self.count)
        self.registers: dict[str, np.ndarray] = {"%tid.x": thread, "%laneid": thread % 32}
        self.registers["%tid.y"] = self.registers["%tid.z"] = np.zeros_like(thread)
        places = np.unravel_index(np.repeat(programs, threads), grid, order="F")
        for axis, place, size in zip("xyz", places, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = place.astype(np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full_like(thread, size)

    # ---- running ---------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Threads that are furthest behind go first, so that those that parted meet again; but those that wait for
        others."""
        waiting = {0: np.ones(self.lanes, bool)}
        while waiting:
            number, active = self._next(waiting)
            for target, lanes in self._run_block(number, active):
                if lanes.any():
                    waiting[target] = waiting[target] | lanes if target in waiting else lanes
        if any(self.products.groups):
            raise self.fault("ends while matrix products are under way")
        if self.tensor is not None:
            self.tensor.end()

    def _next(self, waiting: dict[int, np.ndarray]) -> tuple[int, np.ndarray]:
        """Takes threads that can go on from those that wait: the block that they are at, and which they are."""
        for number in sorted(waiting):
            block, active = self.program.blocks[number], waiting[number]
            if block.able is None:
                return number, waiting.pop(number)
            self.instruction = block.instructions[0]
            able = block.able(self, active)
            self.instruction = None
            if able.any():
                waiting[number] = active & ~able
                if able is active or not waiting[number].any():
                    del waiting[number]
                return number, able
        self.instruction = self.program.blocks[min(waiting)].instructions[0]
        raise self.fault("threads wait for others that never come")

    def _run_block(self, number: int, active: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Which blocks come next, for which threads."""
        block = self.program.blocks[number]
        everyone = active.all()
        for instruction, step in zip(block.instructions, block.steps, strict=True):
            lanes = None if everyone else active
            if instruction.guard is not None:
                chosen = active & (self.registers[instruction.guard] ^ instruction.negated)
                lanes = None if chosen.all() else chosen
            if instruction.name[0] == "bra":
                target = self.program.labels[instruction.operands[0]]
                taken = active if lanes is None else lanes
                return [(target, taken), (number + 1, active & ~taken)]
            if instruction.name[0] in ("ret", "exit"):
                return [(number + 1, active & ~(active if lanes is None else lanes))]
            self.at(instruction, step, self, lanes)
        return [(number + 1, active)]

    def at(self, instruction: Instruction | None, step: Callable[..., None], *arguments: Any) -> None:
        """Does this, of which `fault` will say that this instruction did it."""
        before, self.instruction = self.instruction, instruction
        try:
            step(*arguments)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise self.fault(f"{type(error).__name__}: {error}") from error
        self.instruction = before

    def fault(self, message: str) -> Fault:
        where = self.instruction and f"\n    {self.instruction.text}    ({self.instruction.source})"
        return Fault(f"{self.program.name}: {message}{where or ''}")

    # ---- registers -------------------------------------------------------------------------------------------
    def read(self, name: str, dtype: Any = None, part: bool = False) -> np.ndarray:
        """A register of all threads, as numbers of this type; of its own bits without one. part: it becomes a part of a
        larger one, so that nobody may have written it, if nobody reads that part."""
        if name in self.awaited:
            self.awaited[name].finish()
        found = self.registers.get(name)
        if found is None and part:
            return np.full(self.lanes, UNWRITTEN, np.uint64).astype(dtype)
        if found is None:
            raise self.fault(f"{name} is read before it is written")
        if dtype is None or found.dtype == dtype:
            return found
        size = np.dtype(dtype).itemsize
        if size > found.itemsize:
            raise self.fault(f"{name} has {found.itemsize} bytes, not {size}")
        return (found if size == found.itemsize else found.astype(UNSIGNED[size])).view(dtype)

    def write(self, name: str, value: Any, lanes: np.ndarray | None) -> None:
        """Of these threads; what is narrower than the register is extended, by its sign if its type has one."""
        if name == "_":
            return
        value = np.broadcast_to(value, self.lanes)
        if value.dtype != bool:
            width = self.program.widths.get(name, value.itemsize)
            if value.itemsize < width and value.dtype.kind in "iu":
                value = value.astype(f"{value.dtype.kind}{width}")
            value = np.ascontiguousarray(value).view(UNSIGNED[value.itemsize])
        if lanes is not None:
            old = self.registers.get(name)
            if old is None:
                old = value.dtype.type(UNWRITTEN >> (64 - 8 * value.itemsize))
            value = np.where(lanes, value, old)
        self.registers[name] = value

    # ---- memory ----------------------------------------------------------------------------------------------
    def load_parameter(self, address: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        at = address.astype(np.int64) // size
        return [self.parameters.view(UNSIGNED[size])[at + i] for i in range(count)]

    def load_global(self, address: np.ndarray, lanes: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        self._count(self.traffic and self.traffic.global_, address, lanes, size * count)
        return self.memory.load(address, size, count)

    def store_global(self, address: np.ndarray, lanes: np.ndarray, size: int, values: Sequence[np.ndarray]) -> None:
        self._count(self.traffic and self.traffic.global_, address, lanes, size * len(values))
        self.memory.store(address, size, values)

    def load_shared(self, address: np.ndarray, lanes: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        self._count(self.traffic and self.traffic.shared, address, lanes, size * count)
        return self.shared.load(address.astype(np.int64), lanes, size, count)

    def store_shared(self, address: np.ndarray, lanes: np.ndarray, size: int, values: Sequence[np.ndarray]) -> None:
        self._count(self.traffic and self.traffic.shared, address, lanes, size * len(values))
        self.shared.store(address.astype(np.int64), lanes, size, values)

    def _count(self, counter: Any, address: np.ndarray, lanes: np.ndarray, size: int) -> None:
        if counter is not None:
            first = lanes < self.threads  # of the first program
            counter(self, address[first].astype(np.int64), lanes[first], size)

    def copy(self, copy: Copy) -> None:
        self.at(copy.instruction, self._copy, copy)

    def _copy(self, copy: Copy) -> None:
        full = copy.given == copy.size
        if not (full | (copy.given == 0)).all():
            raise NotImplementedError(f"a copy of a part of its bytes: {copy.instruction.text}")
        values = [np.zeros(len(full), np.uint32) for _ in range(copy.size // 4)]
        read = self.load_global(copy.source[full], copy.lanes[full], 4, copy.size // 4)
        for value, found in zip(values, read, strict=True):
            value[full] = found
        self.store_shared(copy.to, copy.lanes, 4, values)

    def barrier(self, lanes: np.ndarray | None) -> None:
        if lanes is not None:
            arrived = lanes.reshape(self.count, -1)
            if (arrived.any(1) != arrived.all(1)).any():
                raise self.fault("a part of the threads of a program at a barrier")
        self.shared.barrier(lanes)
        if self.tensor is not None:
            self.tensor.barrier(lanes)
