"""Blackwell's ``tcgen05``: loads and stores of tensor memory, and matrix products whose results lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ptx import mbarriers
from ptx.background import Work
from ptx.matrices import PER_REGISTER, lent, threads_of, unpacked, whole_warps, write
from ptx.operands import address, lanes_of, source
from ptx.tensor_memory import HALF, TensorMemory

Step = Callable[[Any, Any], None]

#: Pieces in which a warp moves its numbers: threads, how many lanes, and whether its columns are the second ones.
SHAPES = {"32x32b": ((slice(0, 32), 32, 0),), "16x32bx2": ((slice(0, 16), 16, 0), (slice(16, 32), 16, 1))}
#: Types of A and B by their numbers in a product's descriptor.
TYPES = {"kind__f16": {0: "f16", 1: "bf16"}, "kind__tf32": {2: "tf32"}}


def tcgen05(instruction: Any) -> Step:
    kind = instruction.name[1]
    if "cta_group__2" in instruction.name or kind not in MAKERS:
        raise NotImplementedError(instruction.text)
    step = MAKERS[kind](instruction)
    return lambda machine, lanes: step(machine, lanes) if lanes is None or lanes.any() else None


def _tensor(machine: Any) -> TensorMemory:
    if machine.tensor is None:
        raise machine.fault("tensor memory is not allocated")
    return machine.tensor


def _alloc(instruction: Any) -> Step:
    at, columns = address(instruction.operands[0]), int(instruction.operands[1], 0)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        machine.tensor = machine.tensor or TensorMemory(machine)
        first = np.full(len(warps), machine.tensor.allocate(warps, columns), np.uint32)
        machine.store_shared(at(machine)[warps * 32], warps * 32, 4, [first])

    return step


def _dealloc(instruction: Any) -> Step:
    at, columns = source(instruction.operands[0], np.uint32), int(instruction.operands[1], 0)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        for some, _, first in _places(machine, at(machine)[warps * 32]):
            _tensor(machine).free(warps[some], slice(first, first + columns))

    return step


def _places(machine: Any, addresses: np.ndarray, rows: int = 2 * HALF) -> Iterator[tuple[np.ndarray, int, int]]:
    """Which of these addresses of so many lanes, counted from where a warp's begin, are the same; their first lane and
    column."""
    for one in np.unique(addresses):
        lane, column = divmod(int(one), 1 << 16)
        if lane not in (0, HALF) or lane + rows > 2 * HALF:
            raise machine.fault("lanes of tensor memory that are out of reach")
        yield np.flatnonzero(addresses == one), lane, column


# ---- loads and stores --------------------------------------------------------------------------------------------
def _pieces(
    machine: Any, warps: np.ndarray, addresses: np.ndarray, shape: tuple, size: int, apart: int
) -> Iterator[tuple[tuple, tuple]]:
    """Which of these warps, and threads of each, are at which part of tensor memory."""
    programs, warp = np.divmod(warps, machine.threads // 32)
    for group in np.unique(warp // 4):  # of warps at different lanes
        mine = np.flatnonzero(warp // 4 == group)
        for some, lane, column in _places(machine, addresses[mine] - (warp[mine] % 4 * 32 << 16), shape[0][1]):
            some = mine[some]
            for threads, rows, second in shape:
                first = column + second * apart
                lanes = slice(lane, lane + rows)
                yield (some, threads), (programs[some], warp[some] % 4, lanes, slice(first, first + size))


def _move(instruction: Any) -> Step:
    stores = instruction.name[1] == "st"
    if len(instruction.name) != 7 or instruction.name[4] not in SHAPES:
        raise NotImplementedError(instruction.text)
    shape, size = SHAPES[instruction.name[4]], int(instruction.name[5][1:])
    operands = list(instruction.operands)
    registers = operands.pop(-1 if stores else 0)
    get, apart = address(operands[0]), int(operands[1], 0) if len(operands) > 1 else 0

    def step(machine: Any, lanes: Any) -> None:
        tensor, warps = _tensor(machine), whole_warps(machine, lanes)
        threads = threads_of(warps)
        addresses = get(machine)[threads].reshape(-1, 32).astype(np.int64)
        if (addresses != addresses[:, :1]).any():
            raise machine.fault("an address of tensor memory that is not the same in all of a warp")
        pieces = list(_pieces(machine, warps, addresses[:, 0], shape, size, apart))
        for (some, _), (*_, rows, columns) in pieces:
            tensor.move(warps[some], rows, columns, stores)
        values = np.zeros((len(warps), 32, size), np.uint32)
        if stores:
            values[:] = np.stack([machine.read(one, np.uint32)[threads] for one in registers], 1).reshape(values.shape)

        def do() -> None:
            for of_whom, where in pieces:
                if stores:
                    tensor.write(where, values[of_whom])
                else:
                    values[of_whom] = tensor.read(where)
                tensor.moved(warps[of_whom[0]], *where[-2:], stores)
            for i, register in enumerate(() if stores else registers):
                write(machine, register, threads, values[:, :, i].ravel(), lanes)

        moves = tensor.stores if stores else tensor.loads
        moves.ask(Work(do, () if stores else registers, machine.instruction))

    return step


def _wait(instruction: Any) -> Step:
    stores = instruction.name[1] == "wait__st"

    def step(machine: Any, lanes: Any) -> None:
        tensor = _tensor(machine)
        (tensor.stores if stores else tensor.loads).finish()

    return step


# ---- products ----------------------------------------------------------------------------------------------------
def _shape(descriptor: int, types: dict[int, str], text: str) -> tuple[int, int, str, list[int]]:
    """M, N, the type of A and B, and which of them have k as their slower place. PTX ISA, "Instruction descriptor"."""

    def field(start: int, bits: int) -> int:
        return descriptor >> start & (1 << bits) - 1

    m, n, kinds = field(24, 5) * 16, field(17, 6) * 8, {types.get(field(at, 3)) for at in (7, 10)}
    plain = field(4, 2) == 1 and not descriptor & 0xE080604F and m in (64, 128) and n and n % (m // 8) == 0
    if not plain or len(kinds) > 1 or None in kinds:
        raise NotImplementedError(f"descriptor {descriptor:#x} of {text}")
    return m, n, kinds.pop(), [field(15, 1), field(16, 1)]


def _mma(instruction: Any) -> Step:
    if len(instruction.name) != 4 or len(instruction.operands) != 5 or instruction.name[3] not in TYPES:
        raise NotImplementedError(instruction.text)
    d, a, b, shape, keep = instruction.operands
    from_tensor = a.startswith("[")
    at_d, at_a, at_b = address(d), address(a) if from_tensor else source(a, np.uint64), source(b, np.uint64)
    get_shape, get_keep = source(shape, np.uint32), source(keep, np.bool_)

    def step(machine: Any, lanes: Any) -> None:
        tensor, chosen = _tensor(machine), lanes_of(machine, lanes)
        programs, warps = chosen // machine.threads, chosen // 32
        if (np.diff(programs) == 0).any():
            raise machine.fault("more than one thread of a program asks for a matrix product")

        def own(get: Any) -> np.ndarray:
            return np.broadcast_to(get(machine), machine.lanes)[chosen]

        shapes = np.unique(own(get_shape))
        if len(shapes) > 1:
            raise NotImplementedError(f"other shapes in other programs: {instruction.text}")
        m, n, kind, turned = _shape(int(shapes[0]), TYPES[instruction.name[3]], instruction.text)
        k, adds = 8 * PER_REGISTER[kind], own(get_keep)
        tensor.products += 1

        def tensor_part(get: Any, columns: int, stores: bool) -> list[tuple[Any, tuple]]:
            """Which programs' matrices lie at one place, and where."""
            parts = []
            for some, lane, column in _places(machine, own(get), m // 4):
                place = slice(lane, lane + m // 4), slice(column, column + columns)
                tensor.multiply(warps[some], *place, stores)
                everywhere = len(some) == machine.count
                where = slice(None) if everywhere else programs[some], slice(None), *place
                parts.append((slice(None) if everywhere else some, where))
            return parts

        def shared_part(get: Any, rows: int, turned: int) -> Callable[[], np.ndarray]:
            descriptors = own(get)
            if (descriptors >> np.uint64(46) & np.uint64(0x8047) != 1).any():
                raise NotImplementedError(f"descriptors of matrices: {instruction.text}")
            return lent(machine, descriptors, chosen, rows, k, kind, turned, True)

        results = tensor_part(at_d, n, True)
        left = tensor_part(at_a, 8, False) if from_tensor else shared_part(at_a, m, turned[0])
        right = shared_part(at_b, n, turned[1])

        def do() -> None:
            if from_tensor:
                raw = np.empty((len(chosen), 4, m // 4, 8), np.uint32)
                for some, where in left:
                    raw[some] = tensor.read(where)
                x = unpacked(raw, kind).reshape(-1, m, k)
            else:
                x = left()
            product = np.matmul(x, right().transpose(0, 2, 1)).reshape(-1, 4, m // 4, n)
            for some, where in results:
                value, adding = product[some], adds[some]
                if adding.all():
                    value = value + tensor.read(where).view(np.float32)
                elif adding.any():
                    raise NotImplementedError(f"adds in some programs only: {instruction.text}")
                tensor.write(where, value.view(np.uint32))

        machine.products.ask(Work(do, (), machine.instruction))

    return step


def _commit(instruction: Any) -> Step:
    if instruction.name[3] != "mbarrier__arrive__one" or "multicast__cluster" in instruction.name:
        raise NotImplementedError(instruction.text)
    get = address(instruction.operands[0])

    def step(machine: Any, lanes: Any) -> None:
        tensor, chosen = _tensor(machine), lanes_of(machine, lanes)
        at, products = get(machine)[chosen].astype(np.int64), tensor.products

        def do() -> None:
            mbarriers.arrive(machine, at, chosen)
            tensor.arrive(at, chosen // machine.threads, products)

        machine.products.ask(Work(do, (), machine.instruction))
        machine.products.commit()

    return step


def _relinquish(instruction: Any) -> Step:
    return lambda machine, lanes: None


MAKERS: dict[str, Callable[[Any], Step]] = {
    "alloc": _alloc, "relinquish_alloc_permit": _relinquish, "dealloc": _dealloc,
    "ld": _move, "st": _move, "wait__ld": _wait, "wait__st": _wait, "mma": _mma, "commit": _commit,
}  # fmt: skip
