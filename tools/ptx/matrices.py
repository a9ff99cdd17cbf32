"""Matrices in PTX: ``ldmatrix``, ``stmatrix``, ``mma`` of a warp, and Hopper's ``wgmma`` of four."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.background import Work
from ptx.operands import address, source

Step = Callable[[Any, Any], None]
LANE = np.arange(32)
GROUP, WITHIN = LANE // 4, LANE % 4


def whole_warps(machine: Any, lanes: Any) -> np.ndarray:
    """Numbers of the warps that take part, all of whose threads have to."""
    if lanes is None:
        return np.arange(machine.lanes // 32)
    warps = lanes.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise machine.fault("a part of a warp at a matrix instruction")
    return np.flatnonzero(warps.any(1))


def threads_of(warps: np.ndarray) -> np.ndarray:
    return (warps[:, None] * 32 + LANE).ravel()


def write(machine: Any, register: str, threads: np.ndarray, values: np.ndarray, lanes: Any) -> None:
    """One number of each of these threads."""
    whole = np.zeros(machine.lanes, values.dtype)
    whole[threads] = values
    machine.write(register, whole, lanes)


def _matrix_addresses(machine: Any, get: Any, warps: np.ndarray, number: int) -> np.ndarray:
    """Of matrix ``number``: where each of its eight rows starts, which threads 8 n to 8 n + 7 say. [warps, 8]"""
    return get(machine).reshape(-1, 32)[warps][:, 8 * number : 8 * number + 8].astype(np.int64)


def _operands(instruction: Any, memory: int) -> tuple[bool, list[str], Callable[[Any], np.ndarray]]:
    """Whether matrices are transposed, the registers, and the addresses, which are this operand."""
    registers = instruction.operands[1 - memory]
    registers = registers if isinstance(registers, list) else [registers]
    return "trans" in instruction.name, registers, address(instruction.operands[memory])


def ldmatrix(instruction: Any) -> Step:
    transposed, to, get = _operands(instruction, 1)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        threads = threads_of(warps)
        for number, register in enumerate(to):
            rows = _matrix_addresses(machine, get, warps, number)
            first = np.repeat(warps * 32, 8)
            words = machine.load_shared(rows.ravel(), first, 4, 4)  # 16 bytes a row
            values = np.stack(words, 1).view(np.uint16).reshape(-1, 8, 8)
            values = values.transpose(0, 2, 1) if transposed else values
            # a thread's register: row lane / 4, columns 2 (lane % 4) and the next
            pair = np.ascontiguousarray(values.reshape(-1, 32, 2)).view(np.uint32).ravel()
            write(machine, register, threads, pair, lanes)

    return step


def stmatrix(instruction: Any) -> Step:
    transposed, given, get = _operands(instruction, 0)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        threads = threads_of(warps)
        for number, register in enumerate(given):
            rows = _matrix_addresses(machine, get, warps, number)
            values = np.ascontiguousarray(machine.read(register, np.uint32)[threads]).view(np.uint16).reshape(-1, 8, 8)
            values = values.transpose(0, 2, 1) if transposed else values
            words = np.ascontiguousarray(values).reshape(-1, 8).view(np.uint32)
            machine.store_shared(rows.ravel(), np.repeat(warps * 32, 8), 4, list(words.T))

    return step


# ---- numbers -----------------------------------------------------------------------------------------------------
def unpacked(values: np.ndarray, kind: str) -> np.ndarray:
    """Registers [..., n] as numbers [..., n * how many are in one], in fp32."""
    if kind == "bf16":
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return values.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (values & np.uint32(0xFFFFE000)).view(np.float32)
    raise NotImplementedError(f"matrices of {kind}")


PER_REGISTER = {"bf16": 2, "f16": 2, "tf32": 1}


def _places(kind: str, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (or column, for B) and k of each number of a thread's fragment: [32, numbers]."""
    each = PER_REGISTER[kind]
    outer, inner = [], []
    span = 4 * each  # k of one register of the four threads
    for step in range(k // span):
        for block in range(rows // 8):
            for e in range(each):
                outer.append(GROUP + 8 * block)
                inner.append(step * span + WITHIN * each + e)
    return np.stack(outer, 1), np.stack(inner, 1)


def _fragment(machine: Any, registers: list[str], threads: np.ndarray, kind: str) -> np.ndarray:
    """What each thread has of a matrix: [warps, 32, numbers]."""
    raw = np.stack([machine.read(register, np.uint32)[threads] for register in registers], 1)
    return unpacked(raw, kind).reshape(len(threads) // 32, 32, -1)


def mma(instruction: Any) -> Step:
    shape = re.fullmatch(
        r"m(\d+)n(\d+)k(\d+)", next(part for part in instruction.name if part.startswith("m") and part != "mma")
    )
    assert shape is not None
    m, n, k = (int(one) for one in shape.groups())
    result, left, right, added = instruction.name[-4:]
    if result != "f32" or added != "f32" or left not in PER_REGISTER or right not in PER_REGISTER:
        raise NotImplementedError(instruction.text)
    to, a, b, c = instruction.operands
    rows_a, k_a = _places(left, m, k)
    cols_b, k_b = _places(right, n, k)
    rows_c = np.stack([GROUP + 8 * (i // 2) for i in range(m // 4)], 1)
    cols_c = np.stack([2 * WITHIN + i % 2 for i in range(m // 4)], 1)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        threads = threads_of(warps)

        x, y = np.zeros((len(warps), m, k), np.float32), np.zeros((len(warps), n, k), np.float32)
        x[:, rows_a, k_a] = _fragment(machine, a, threads, left)
        y[:, cols_b, k_b] = _fragment(machine, b, threads, right)
        product = np.matmul(x, y.transpose(0, 2, 1))[:, rows_c, cols_c].reshape(len(threads), -1)
        out = product + np.stack([machine.read(one, np.float32)[threads] for one in c], 1)
        for i, register in enumerate(to):
            write(machine, register, threads, out[:, i], lanes)

    return step


# ---- wgmma -------------------------------------------------------------------------------------------------------
def _described(descriptors: np.ndarray, slow: int, fast: int) -> np.ndarray:
    """Where the matrices of these descriptors lie in shared memory, by pieces of 16 of their ``fast`` bytes:
    [descriptors, slow, pieces]. PTX ISA, "Asynchronous warpgroup level matrix shared memory layout"."""

    def field(start: int, bits: int) -> np.ndarray:
        return ((descriptors >> np.uint64(start)) & np.uint64((1 << bits) - 1)).astype(np.int64)

    start = field(0, 14) * 16
    layouts = np.stack([field(16, 14) * 16, field(32, 14) * 16, field(49, 3), field(62, 2)])
    if (layouts != layouts[:, :1]).any():
        raise NotImplementedError("descriptors of other layouts in other programs or warpgroups")
    leading, stride, base, swizzle = (int(one) for one in layouts[:, 0])
    span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row of the layout's atom, of which there are 8
    if base:
        raise NotImplementedError("a descriptor with a base offset")
    row, along = np.arange(slow)[:, None], np.arange(0, fast, 16)
    places = start[:, None, None] + (row // 8) * stride + (row % 8) * span + (along // span) * leading + along % span
    return places ^ (((places >> 7) & {0: 0, 1: 7, 2: 3, 3: 1}[swizzle]) << 4)


def lent(
    machine: Any, descriptors: np.ndarray, lanes: np.ndarray, rows: int, k: int, kind: str, turned: int, known: bool
) -> Callable[[], np.ndarray]:
    """Of matrices that a product reads in shared memory for these threads: what gives them at its end, in fp32
    [descriptors, rows, k]. turned: whether k is the slower place. known: see `SharedMemory.lend`."""
    slow, fast = (k, rows) if turned else (rows, k)
    places = _described(descriptors, slow, fast * 4 // PER_REGISTER[kind])
    pieces = machine.shared.lend(places.ravel(), np.repeat(lanes, places[0].size), known)

    def matrices() -> np.ndarray:
        found = unpacked(pieces().view(np.uint32), kind).reshape(-1, slow, fast)
        return found.transpose(0, 2, 1) if turned else found

    return matrices


def wgmma(instruction: Any) -> Step:
    if "fence" in instruction.name:
        return lambda machine, lanes: None
    if "commit_group" in instruction.name:
        return lambda machine, lanes: machine.products.commit()
    if "wait_group" in instruction.name:
        left = int(instruction.operands[0], 0)
        return lambda machine, lanes: machine.products.wait(left)
    shape = next(one for one in (re.fullmatch(r"m64n(\d+)k(\d+)", part) for part in instruction.name) if one)
    n, k = int(shape[1]), int(shape[2])
    result, kind, right = instruction.name[-3:]
    if result != "f32" or kind != right or kind not in PER_REGISTER:
        raise NotImplementedError(instruction.text)
    to, a, b, scale, *flags = instruction.operands
    signs = [int(flag) for flag in flags[:2]]
    turned = [int(flag) for flag in flags[2:]]
    if isinstance(a, list):
        turned = [0, *turned]
    turned += [0] * (2 - len(turned))
    keep = source(scale, np.bool_)
    at_b = source(b, np.uint64)
    at_a = None if isinstance(a, list) else source(a, np.uint64)
    rows_a, k_a = _places(kind, 16, k)

    def step(machine: Any, lanes: Any) -> None:
        warps = whole_warps(machine, lanes)
        if not np.array_equal(warps, (warps[::4, None] // 4 * 4 + np.arange(4)).ravel()):
            raise machine.fault("wgmma of a part of a warpgroup")
        warps = warps.reshape(-1, 4)
        threads, first = threads_of(warps.ravel()), warps[:, 0] * 32

        def uniform(get: Any) -> np.ndarray:
            values = np.broadcast_to(get(machine), machine.lanes)[threads].reshape(len(warps), -1)
            if (values != values[:, :1]).any():
                raise machine.fault("a descriptor or flag that is not the same in all of a warpgroup")
            return values[:, 0]

        adds = uniform(keep)
        fragment = None
        if at_a is None:
            fragment = _fragment(machine, a, threads, kind).reshape(len(warps), 4, 32, -1)

        left = None if at_a is None else lent(machine, uniform(at_a), first, 64, k, kind, turned[0], False)
        right = lent(machine, uniform(at_b), first, n, k, kind, turned[1], False)

        def compute() -> None:
            y = right()
            if left is not None:
                x = left()
            else:
                x = np.zeros((len(warps), 4, 16, k), np.float32)
                x[:, :, rows_a, k_a] = fragment
                x = x.reshape(len(warps), 64, k)
            product = np.matmul(x * signs[0], (y * signs[1]).transpose(0, 2, 1)).reshape(-1, 4, 16, n)
            out = (
                product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(len(threads), n // 2)
            )
            accumulates = np.repeat(adds, 128)
            for i, register in enumerate(to):
                old = machine.registers.get(register)
                before = np.zeros(len(threads), np.float32) if old is None else old.view(np.float32)[threads]
                write(machine, register, threads, np.where(accumulates, before + out[:, i], out[:, i]), lanes)

        machine.products.ask(Work(compute, to, machine.instruction))

    return step
