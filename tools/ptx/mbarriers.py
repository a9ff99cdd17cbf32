"""Barriers in shared memory, ``mbarrier``: threads wait until so many arrivals complete a phase.

Here the only ones that arrive are Blackwell's matrix products, when they are done (`tcgen05`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.operands import address, lanes_of, source

Step = Callable[[Any, Any], None]
VALID = 0x6D62  # what marks one: its first 16 bits; then how many arrivals complete a phase, how many it still needs,
# and how many phases were completed


def mbarrier(instruction: Any) -> Step:
    kind = instruction.name[1]
    if kind == "try_wait":
        return _try_wait(instruction)
    at = address(instruction.operands[0])
    count = source(instruction.operands[1], np.uint16) if kind == "init" else None
    if kind not in ("init", "inval"):
        raise NotImplementedError(instruction.text)

    def step(machine: Any, lanes: Any) -> None:
        chosen = lanes_of(machine, lanes)
        if count is None:
            words = [np.full(len(chosen), 0xFFFF, np.uint16)] * 4
        else:
            expected = np.broadcast_to(count(machine), machine.lanes)[chosen]
            words = [np.full_like(expected, VALID), expected, expected, np.zeros_like(expected)]
        machine.shared.store(at(machine)[chosen].astype(np.int64), chosen, 2, words)

    return step


def arrive(machine: Any, at: np.ndarray, lanes: np.ndarray) -> None:
    """On the mbarriers at these addresses, of these threads' programs; not by the threads themselves."""
    words, first = machine.shared.views[2], machine.shared.places(at, lanes, 8) // 2
    valid, expected, left, phase = (words[first + i] for i in range(4))
    if (valid != VALID).any():
        raise machine.fault("no mbarrier is where it arrives")
    done = left == 1
    words[first + 2], words[first + 3] = np.where(done, expected, left - 1), phase + done


def _operands(instruction: Any) -> tuple[Callable[[Any], np.ndarray], Callable[[Any], Any]]:
    if "parity" not in instruction.name:
        raise NotImplementedError(instruction.text)
    return address(instruction.operands[1]), source(instruction.operands[2], np.uint32)


def completed(instruction: Any) -> Callable[[Any, np.ndarray], np.ndarray]:
    """``able(machine, lanes)``: the threads whose phase is complete. What they wait for takes place now."""
    at, parity = _operands(instruction)

    def able(machine: Any, lanes: np.ndarray) -> np.ndarray:
        chosen = np.flatnonzero(lanes)
        where, wanted = at(machine)[chosen].astype(np.int64), np.broadcast_to(parity(machine), machine.lanes)[chosen]
        while True:
            valid, _, _, phase = machine.shared.load(where, chosen, 2, 4)
            if (valid != VALID).any():
                raise machine.fault("no mbarrier is where it waits")
            done = phase % 2 != wanted
            if done.all() or not machine.products.wait_for_one():
                break
        able = np.zeros_like(lanes)
        able[chosen[done]] = True
        return able

    return able


def _try_wait(instruction: Any) -> Step:
    at, _ = _operands(instruction)
    to = instruction.operands[0]

    def step(machine: Any, lanes: Any) -> None:
        chosen = lanes_of(machine, lanes)
        if machine.tensor is not None:
            machine.tensor.wait(at(machine)[chosen].astype(np.int64), chosen)
        machine.write(to, np.ones(machine.lanes, bool), lanes)

    return step
