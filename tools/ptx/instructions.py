"""What each PTX instruction does to a `Multiprocessor`. `compiled` makes one function of an instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import matrices, mbarriers, tcgen05
from ptx.background import Copy
from ptx.operands import TYPES, address, lanes_of, source
from ptx.program import WIDTH, Instruction

Step = Callable[[Any, Any], None]

WIDER = {np.int32: np.int64, np.uint32: np.uint64, np.int16: np.int32, np.uint16: np.uint32}


def compiled(instruction: Instruction) -> Step:
    """``step(machine, lanes)``: for these threads, all of them where that is None."""
    kind = instruction.name[0]
    if kind in ("bra", "ret", "exit"):
        return _nothing
    if kind not in MAKERS:
        raise NotImplementedError(f"PTX instruction {'.'.join(instruction.name)}: {instruction.text}")
    return MAKERS[kind](instruction)


def gate(instruction: Instruction) -> Callable[[Any, np.ndarray], np.ndarray] | None:
    """``able(machine, lanes)``: which of these threads need not wait for others here, where one may have to."""
    if instruction.guard is not None:
        return None
    if instruction.name[:2] == ("mbarrier", "try_wait"):
        return mbarriers.completed(instruction)
    return _arrived if instruction.name[0] in ("bar", "barrier") and instruction.name[1] != "warp" else None


def _arrived(machine: Any, lanes: np.ndarray) -> np.ndarray:
    whole = lanes.reshape(machine.count, -1).all(1)
    return lanes if whole.all() else np.repeat(whole, machine.threads)


def _nothing(machine: Any, lanes: Any) -> None:
    pass


def _types(instruction: Instruction) -> list[str]:
    if found := [part for part in instruction.name if part in TYPES]:
        return found
    raise NotImplementedError(f"PTX instruction of a type that is not known: {instruction.text}")


def _type(instruction: Instruction) -> str:
    return _types(instruction)[-1]


# ---- arithmetic --------------------------------------------------------------------------------------------------
def rounded_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.asarray(x, np.float32).view(np.uint32)
    up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(np.asarray(x)), np.uint16(0x7FFF), ((bits + up) >> 16).astype(np.uint16))


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x, np.uint32) << 16).view(np.float32)


#: The numbers in registers of these types. NumPy has no bf16: it is computed in fp32, and rounded.
NUMBERS = {"bf16": np.uint16, "bf16x2": np.uint16, "f16x2": np.float16, "f32x2": np.float32}


def _by_number(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Of whole registers, what the function makes of each number in them."""
    of_registers = TYPES[kind]

    def apply(*registers: Any) -> np.ndarray:
        numbers = [np.atleast_1d(one)[:, None].view(NUMBERS[kind]) for one in registers]
        if kind.startswith("bf16"):
            value = rounded_bf16(function(*[from_bf16(one) for one in numbers]))
        else:
            value = function(*numbers)
        return np.ascontiguousarray(value).view(of_registers)[:, 0]

    return apply


def elementwise(function: Callable[..., Any]) -> Callable[[Instruction], Step]:
    def make(instruction: Instruction) -> Step:
        kind, *narrower = _types(instruction)
        compute, dtype = _by_number(function, kind) if kind in NUMBERS else function, TYPES[kind]
        to, *rest = instruction.operands
        sources = [source(one, dtype) for one in rest]
        if narrower:  # "add.f32.bf16": of all but the last operand
            sources[:-1] = [_widened(one, narrower[0]) for one in rest[:-1]]

        def step(machine: Any, lanes: Any) -> None:
            value = compute(*[get(machine) for get in sources])
            machine.write(to, np.asarray(value).astype(dtype, copy=False), lanes)

        return step

    return make


def _widened(text: str, kind: str) -> Callable[[Any], Any]:
    """An operand of 16 bits in fp32."""
    get = source(text, TYPES[kind])
    return lambda machine: from_bf16(get(machine)) if kind == "bf16" else get(machine).astype(np.float32)


def _fma(a: Any, b: Any, c: Any) -> Any:
    return (a.astype(np.float64) * b + c).astype(a.dtype)  # exact but for one rounding more


def _multiply(instruction: Instruction) -> Step:
    """``mul`` and ``mad``: ``lo``, ``hi``, ``wide``, or of floats."""
    mode = next((part for part in instruction.name if part in ("lo", "hi", "wide")), None)
    plus = instruction.name[0] == "mad"
    if mode is None:
        return elementwise(_fma if plus else np.multiply)(instruction)
    dtype = TYPES[_type(instruction)]
    to, left, right, *third = instruction.operands
    result = WIDER[dtype] if mode == "wide" else dtype
    a, b = source(left, dtype), source(right, dtype)
    c = source(third[0], result) if third else None

    def step(machine: Any, lanes: Any) -> None:
        x, y = a(machine), b(machine)
        if mode == "lo":
            value = x * y
        elif mode == "wide":
            value = np.asarray(x).astype(result) * np.asarray(y).astype(result)
        elif np.dtype(dtype).itemsize == 4:
            value = ((np.asarray(x).astype(WIDER[dtype]) * np.asarray(y).astype(WIDER[dtype])) >> 32).astype(dtype)
        else:
            value = np.array([int(p) * int(q) >> 64 for p, q in zip(*np.broadcast_arrays(x, y), strict=True)]).astype(
                dtype
            )
        if c is not None:
            value = value + c(machine)
        machine.write(to, np.asarray(value).astype(result, copy=False), lanes)

    return step


def _toward_zero(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, -1, np.sign(a) * np.sign(safe) * (np.abs(a) // np.abs(safe)))


def _remainder(a: Any, b: Any) -> Any:
    return np.fmod(a, np.where(b == 0, 1, b))


def _shift(instruction: Instruction) -> Step:
    dtype = np.dtype(TYPES[_type(instruction)])
    to, value, by = instruction.operands
    get, amount = source(value, dtype.type), source(by, np.uint32)
    bits = 8 * dtype.itemsize
    left = instruction.name[0] == "shl"

    def step(machine: Any, lanes: Any) -> None:
        x, n = get(machine), np.asarray(amount(machine)).astype(np.int64)
        too_far = n >= bits
        n = np.minimum(n, bits - 1).astype(dtype)
        shifted = np.left_shift(x, n) if left else np.right_shift(x, n)
        if dtype.kind == "u" or left:
            shifted = np.where(too_far, np.zeros((), dtype), shifted)
        machine.write(to, np.asarray(shifted).astype(dtype, copy=False), lanes)

    return step


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "equ": lambda a, b: ~(a != b) | np.isnan(a) | np.isnan(b), "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _setp(instruction: Instruction) -> Step:
    name = instruction.name
    compare = COMPARE[name[1]]
    kind = _type(instruction)
    dtype = TYPES[kind]
    to, left, right, *more = instruction.operands
    a, b = source(left, dtype), source(right, dtype)
    if kind in ("bf16x2", "f16x2"):
        return _setp_of_pairs(compare, kind, to, a, b)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(name[2])
    c = source(more[0], np.bool_) if more else None

    def step(machine: Any, lanes: Any) -> None:
        x, y = a(machine), b(machine)
        if kind == "bf16":
            x, y = from_bf16(x), from_bf16(y)
        # numpy's equal with NaN is False, not_equal True: the unordered forms are the ones above
        found = compare(x, y)
        if name[1] == "ne" and np.dtype(dtype).kind == "f":
            found = found & ~np.isnan(x) & ~np.isnan(y)
        if c is not None:
            found = combine(found, c(machine))
        machine.write(to, np.asarray(found, bool), lanes)

    return step


def _setp_of_pairs(compare: Callable[[Any, Any], Any], kind: str, to: str, a: Any, b: Any) -> Step:
    """Two comparisons of 16-bit numbers in one: of the lower halves and of the upper ones."""
    widen = from_bf16 if kind == "bf16x2" else lambda half: half.view(np.float16).astype(np.float32)

    def step(machine: Any, lanes: Any) -> None:
        x, y = np.asarray(a(machine)), np.asarray(b(machine))
        for name, shift in zip(to.split("|"), (0, 16), strict=True):
            halves = [widen((one >> np.uint32(shift)).astype(np.uint16)) for one in (x, y)]
            machine.write(name, np.asarray(compare(*halves), bool), lanes)

    return step


def _selp(instruction: Instruction) -> Step:
    dtype = TYPES[_type(instruction)]
    to, left, right, chosen = instruction.operands
    a, b, c = source(left, dtype), source(right, dtype), source(chosen, np.bool_)
    return lambda machine, lanes: machine.write(
        to, np.where(c(machine), a(machine), b(machine)).astype(dtype, copy=False), lanes
    )


def _mov(instruction: Instruction) -> Step:
    to, given = instruction.operands
    dtype = np.dtype(TYPES[_type(instruction)])
    if isinstance(given, list):  # into one
        part = 8 * dtype.itemsize // len(given)
        sources = [source(one, TYPES[f"u{part}"], part=True) for one in given]

        def gather(machine: Any, lanes: Any) -> None:
            value = np.zeros((), dtype)
            for i, get in enumerate(sources):
                value = value | np.left_shift(np.asarray(get(machine)).astype(dtype), dtype.type(part * i))
            machine.write(to, value, lanes)

        return gather
    if isinstance(to, list):
        part = 8 * dtype.itemsize // len(to)
        get = source(given, dtype.type)

        def scatter(machine: Any, lanes: Any) -> None:
            value = get(machine)
            for i, name in enumerate(to):
                machine.write(name, np.right_shift(value, dtype.type(part * i)).astype(f"u{part // 8}"), lanes)

        return scatter
    get = source(given, dtype.type)
    return lambda machine, lanes: machine.write(to, get(machine), lanes)


def _convert(instruction: Instruction) -> Step:
    name = instruction.name
    types = [part for part in name[1:] if part in TYPES or part == "tf32"]
    target, origin = types[0], types[-1]
    to, *given = instruction.operands
    if target in ("bf16x2", "f16x2"):
        high, low = (source(one, np.float32) for one in given)

        def both(machine: Any, lanes: Any) -> None:
            if target == "bf16x2":
                h, lo = rounded_bf16(high(machine)), rounded_bf16(low(machine))
            else:
                h, lo = (np.asarray(get(machine)).astype(np.float16).view(np.uint16) for get in (high, low))
            machine.write(to, lo.astype(np.uint32) | h.astype(np.uint32) << 16, lanes)

        return both
    get = source(given[0], TYPES[origin])

    def step(machine: Any, lanes: Any) -> None:
        value = np.asarray(get(machine))
        if origin == "bf16":
            value = from_bf16(value)
        if target == "tf32":
            bits = value.view(np.uint32)
            result = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        elif target == "bf16":
            result = rounded_bf16(value)
        elif value.dtype.kind == "f" and np.dtype(TYPES[target]).kind in "iu":
            form = next((part for part in name if part in ("rni", "rzi", "rmi", "rpi")), "rzi")
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[form](value)
            limits = np.iinfo(TYPES[target])
            result = np.nan_to_num(np.clip(whole.astype(np.float64), limits.min, limits.max)).astype(TYPES[target])
        elif value.dtype.kind == "f" and any(part in name for part in ("rni", "rzi", "rmi", "rpi")):
            form = next(part for part in name if part in ("rni", "rzi", "rmi", "rpi"))
            result = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[form](value)
        else:
            result = value.astype(TYPES[target])
        machine.write(to, result, lanes)

    return step


def _bfe(instruction: Instruction) -> Step:
    dtype = TYPES[_type(instruction)]
    to, value, start, length = instruction.operands
    get, at, n = source(value, dtype), source(start, np.uint32), source(length, np.uint32)
    signed = np.dtype(dtype).kind == "i"

    def step(machine: Any, lanes: Any) -> None:
        wide = np.asarray(get(machine)).astype(np.int64)
        if not signed:
            wide = wide & 0xFFFFFFFF
        first = np.asarray(at(machine)).astype(np.int64) & 0xFF
        count = np.asarray(n(machine)).astype(np.int64) & 0xFF
        field = (wide >> np.minimum(first, 63)) & ((np.int64(1) << count) - 1)
        if signed:
            sign = np.int64(1) << np.maximum(count - 1, 0)
            field = (field ^ sign) - sign
        machine.write(to, field.astype(dtype), lanes)

    return step


def _prmt(instruction: Instruction) -> Step:
    if instruction.name[-1] != "b32":
        raise NotImplementedError(instruction.text)
    to, *given = instruction.operands
    a, b, c = (source(one, np.uint32) for one in given)

    def step(machine: Any, lanes: Any) -> None:
        low, high = np.asarray(a(machine), np.uint64), np.asarray(b(machine), np.uint64)
        eight, selector = low | high << np.uint64(32), np.asarray(c(machine), np.uint32)
        value = np.zeros((), np.uint32)
        for i in range(4):
            chosen = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (eight >> (np.uint64(8) * (chosen & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
            byte = np.where(chosen & 8, np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
            value = value | (byte.astype(np.uint32) << np.uint32(8 * i))
        machine.write(to, value, lanes)

    return step


def _lop3(instruction: Instruction) -> Step:
    to, *given, table = instruction.operands
    sources = [source(one, np.uint32) for one in given]
    truth = int(table, 0)

    def step(machine: Any, lanes: Any) -> None:
        a, b, c = (np.asarray(get(machine)) for get in sources)
        value = np.zeros((), np.uint32)
        for i in range(8):
            if truth >> i & 1:
                value = value | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        machine.write(to, value, lanes)

    return step


def _shf(instruction: Instruction) -> Step:
    """Of ``hi:lo`` shifted by ``c`` (wrapping): the upper half when to the left, the lower when to the right."""
    to, low, high, by = instruction.operands
    a, b, c = (source(one, np.uint32) for one in (low, high, by))
    left = "l" in instruction.name

    def step(machine: Any, lanes: Any) -> None:
        n = np.asarray(c(machine)).astype(np.uint64)
        n = n & np.uint64(31) if "wrap" in instruction.name else np.minimum(n, np.uint64(32))
        both = np.asarray(a(machine), np.uint64) | np.asarray(b(machine), np.uint64) << np.uint64(32)
        value = (both << n) >> np.uint64(32) if left else both >> n
        machine.write(to, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), lanes)

    return step


def _logic(function: Any) -> Callable[[Instruction], Step]:
    return elementwise(function)


# ---- warps -------------------------------------------------------------------------------------------------------
def _shfl(instruction: Instruction) -> Step:
    mode = instruction.name[2]
    to, value, by, clamp, _ = instruction.operands
    get, amount, bound = source(value, np.uint32), source(by, np.uint32), source(clamp, np.uint32)
    to, _, valid = to.partition("|")

    def step(machine: Any, lanes: Any) -> None:
        x = np.broadcast_to(get(machine), machine.lanes)
        lane = np.arange(machine.lanes) % 32
        n = np.asarray(amount(machine)).astype(np.int64) & 31
        c = np.asarray(bound(machine)).astype(np.int64)
        segment = (c >> 8) & 31
        most = (lane & segment) | (c & 31 & ~segment)
        least = lane & segment
        if mode == "bfly":
            from_, inside = lane ^ n, (lane ^ n) <= most
        elif mode == "idx":
            from_ = least | (n & ~segment)
            inside = from_ <= most
        elif mode == "up":
            from_, inside = lane - n, (lane - n) >= most
        else:
            from_, inside = lane + n, (lane + n) <= most
        from_ = np.where(inside, from_, lane)
        machine.write(to, x[np.arange(machine.lanes) // 32 * 32 + from_], lanes)
        if valid:
            machine.write(valid, np.broadcast_to(inside, machine.lanes), lanes)

    return step


def _redux(instruction: Instruction) -> Step:
    """One number of all threads of a warp that take part."""
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[instruction.name[2]]  # fmt: skip
    to, value, _ = instruction.operands
    get = source(value, TYPES[_type(instruction)])

    def step(machine: Any, lanes: Any) -> None:
        matrices.whole_warps(machine, lanes)
        values = np.broadcast_to(get(machine), machine.lanes).reshape(-1, 32)
        machine.write(to, np.repeat(function.reduce(values, 1), 32), lanes)

    return step


def _elect(instruction: Instruction) -> Step:
    """Its first thread of a warp's."""
    number, _, chosen = instruction.operands[0].partition("|")
    if int(instruction.operands[1], 0) != -1:
        raise NotImplementedError(instruction.text)

    def step(machine: Any, lanes: Any) -> None:
        warps = (np.ones(machine.lanes, bool) if lanes is None else lanes).reshape(-1, 32)
        first = np.repeat(warps.argmax(1), 32)
        machine.write(number, first.astype(np.uint32), lanes)
        machine.write(chosen, np.arange(machine.lanes) % 32 == first, lanes)

    return step


# ---- memory ------------------------------------------------------------------------------------------------------
def _vector(instruction: Instruction) -> int:
    return next((int(part[1:]) for part in instruction.name if re.fullmatch(r"v\d", part)), 1)


def _load(instruction: Instruction) -> Step:
    kind = _type(instruction)
    size, width = WIDTH[re.sub(r"\D", "", kind)], _vector(instruction)
    to = instruction.operands[0] if isinstance(instruction.operands[0], list) else [instruction.operands[0]]
    final = np.dtype(TYPES[kind])
    at = address(instruction.operands[1])
    shared = any(part.startswith("shared") for part in instruction.name)

    def step(machine: Any, lanes: Any) -> None:
        chosen = lanes_of(machine, lanes)
        where = at(machine)[chosen]
        if "param" in instruction.name:
            values = machine.load_parameter(where, size, width)
        elif shared:
            values = machine.load_shared(where, chosen, size, width)
        else:
            values = machine.load_global(where, chosen, size, width)
        for register, value in zip(to, values, strict=True):
            whole = np.zeros(machine.lanes, final)
            whole[chosen] = value.view(final)
            machine.write(register, whole, lanes)

    return step


def _store(instruction: Instruction) -> Step:
    kind = _type(instruction)
    size = WIDTH[re.sub(r"\D", "", kind)]
    given = instruction.operands[1]
    dtype = TYPES[f"u{8 * size}"]
    sources = [
        source(one, None if one.startswith("%") else dtype) for one in (given if isinstance(given, list) else [given])
    ]
    at = address(instruction.operands[0])
    shared = any(part.startswith("shared") for part in instruction.name)

    def step(machine: Any, lanes: Any) -> None:
        chosen = lanes_of(machine, lanes)
        values = [np.broadcast_to(get(machine), machine.lanes)[chosen].astype(dtype) for get in sources]
        where = at(machine)[chosen]
        if shared:
            machine.store_shared(where, chosen, size, values)
        else:
            machine.store_global(where, chosen, size, values)

    return step


def _cp(instruction: Instruction) -> Step:
    name = instruction.name
    if name[:2] != ("cp", "async") or "bulk" in name:
        raise NotImplementedError(instruction.text)
    if "commit_group" in name:
        return lambda machine, lanes: machine.copies.commit(lanes)
    if "wait_group" in name or "wait_all" in name:
        left = int(instruction.operands[0], 0) if instruction.operands else 0
        return lambda machine, lanes: machine.copies.wait(left, lanes)
    to, origin = address(instruction.operands[0]), address(instruction.operands[1])
    size = int(instruction.operands[2], 0)
    given = source(instruction.operands[3], np.uint32) if len(instruction.operands) > 3 else None

    def step(machine: Any, lanes: Any) -> None:
        chosen = lanes_of(machine, lanes)
        bytes_ = np.full(machine.lanes, size) if given is None else np.broadcast_to(given(machine), machine.lanes)
        asked = Copy(to(machine)[chosen], origin(machine)[chosen], chosen, bytes_[chosen], size, instruction)
        machine.copies.ask(asked)

    return step


def _barrier(instruction: Instruction) -> Step:
    if instruction.name[1] == "warp":
        return _nothing
    if len(instruction.operands) > 1:
        raise NotImplementedError(instruction.text)
    return lambda machine, lanes: machine.barrier(lanes)


def _fence(instruction: Instruction) -> Step:
    if instruction.name[1:3] == ("proxy", "async"):
        return lambda machine, lanes: machine.shared.fence(lanes)
    return _nothing


def _absolute(x: Any) -> Any:
    return np.abs(x)


def _extreme(of_numbers: Any, of_all: Any) -> Callable[[Instruction], Step]:
    """``min`` and ``max``: NaN is passed over but where the instruction says otherwise."""
    return lambda instruction: elementwise(of_all if "NaN" in instruction.name else of_numbers)(instruction)


MAKERS: dict[str, Callable[[Instruction], Step]] = {
    "add": elementwise(np.add), "sub": elementwise(np.subtract), "fma": elementwise(_fma),
    "mul": _multiply, "mad": _multiply,
    "div": elementwise(_toward_zero), "rem": elementwise(_remainder),
    "min": _extreme(np.fmin, np.minimum), "max": _extreme(np.fmax, np.maximum),
    "abs": elementwise(_absolute), "neg": elementwise(np.negative),
    "ex2": elementwise(np.exp2), "lg2": elementwise(np.log2), "sqrt": elementwise(np.sqrt),
    "rsqrt": elementwise(lambda x: 1 / np.sqrt(x)), "rcp": elementwise(lambda x: 1 / x),
    "and": elementwise(np.bitwise_and), "or": elementwise(np.bitwise_or), "xor": elementwise(np.bitwise_xor),
    "not": elementwise(np.invert), "shl": _shift, "shr": _shift, "bfe": _bfe, "prmt": _prmt, "lop3": _lop3, "shf": _shf,
    "setp": _setp, "selp": _selp, "mov": _mov, "cvt": _convert, "shfl": _shfl, "redux": _redux, "elect": _elect,
    "ld": _load, "st": _store, "cp": _cp, "bar": _barrier, "barrier": _barrier,
    "ldmatrix": matrices.ldmatrix, "stmatrix": matrices.stmatrix, "mma": matrices.mma, "wgmma": matrices.wgmma,
    "tcgen05": tcgen05.tcgen05, "mbarrier": mbarriers.mbarrier,
    "fence": _fence, "membar": lambda instruction: _nothing,
    "cvta": _mov,
}  # fmt: skip
