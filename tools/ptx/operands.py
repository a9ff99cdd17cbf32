"""Operands of PTX instructions: registers, numbers, addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

TYPES = {
    "s8": np.int8, "u8": np.uint8, "b8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64, "u64": np.uint64,
    "b64": np.uint64, "f64": np.float64, "f16": np.float16, "pred": np.bool_,
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip


def immediate(text: str, dtype: Any) -> Any:
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        value: Any = np.array(int(found[1], 16), np.uint32).view(np.float32)
        return value[()] if dtype in (None, np.float32) else value.view(np.uint32).view(dtype)[()]
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        value = np.array(int(found[1], 16), np.uint64)
        return value.view(np.float64 if dtype is None else dtype)[()]
    number = int(text.rstrip("U"), 0)
    if dtype is np.bool_:
        return np.bool_(number != 0)
    dtype = np.dtype(dtype or np.int64)
    if dtype.kind == "f":
        return np.array(number % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]
    return np.array(number % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)[()]


def source(text: str, dtype: Any, part: bool = False) -> Callable[[Any], Any]:
    """Reads an operand: a register, a number, or the start of shared memory. part: of a larger one."""
    if text.startswith("!"):
        inner = source(text[1:], dtype)
        return lambda machine: ~inner(machine)
    if text.startswith("%"):
        return lambda machine: machine.read(text, dtype, part)
    if text.startswith("global_smem"):
        offset = int(text.partition("+")[2] or 0)
        value = np.array(offset, dtype or np.uint32)[()]
        return lambda machine: value
    if re.match(r"[A-Za-z]", text):  # where a parameter lies
        return lambda machine: np.uint64(machine.program.parameters[text][0])
    value = immediate(text, dtype)
    return lambda machine: value


def address(text: str) -> Callable[[Any], np.ndarray]:
    """``[%rd1+16]`` as unsigned 64-bit numbers, one a thread."""
    inner = text.strip("[] ")
    found = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", inner)
    if found is None:
        raise NotImplementedError(f"address {text}")
    name, offset = found[1], int(found[2] or "0", 0)
    get = source(name, None)

    def read(machine: Any) -> np.ndarray:
        base = get(machine)
        if np.ndim(base) == 0:
            base = np.full(machine.lanes, base, np.uint64)
        return (
            (base.astype(np.int64) + offset).view(np.uint64)
            if base.itemsize == 8
            else (base.astype(np.int64) + offset).astype(np.uint64)
        )

    return read


def lanes_of(machine: Any, lanes: Any) -> np.ndarray:
    return np.arange(machine.lanes) if lanes is None else np.flatnonzero(lanes)
