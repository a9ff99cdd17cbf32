"""What a kernel's accesses to memory cost a GPU: counted for one program, by the line of its source.

Shared memory has 32 banks of 4 bytes: a warp's access takes as many cycles as words it asks of one bank, in two steps
for 8 bytes a thread and in four for 16. Global memory comes in sectors of 32 bytes. Each is counted beside the least
that the same bytes would take.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np


class Traffic:
    """Of all launches of a process."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def shared(self, machine: Any, address: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """``address`` [n] of these threads, ``size`` bytes each; eight rows of 16 bytes for a matrix."""
        if not len(address):
            return
        group = 32 // max(size // 4, 1)  # threads that are served together
        steps = np.arange(len(lanes)) // group if len(np.unique(lanes)) < len(lanes) else lanes // group
        words = address[:, None] // 4 + np.arange(max(size // 4, 1))
        keys = np.unique(np.stack([np.repeat(steps, words.shape[1]), words.ravel() % 32, words.ravel()], 1), axis=0)
        banks, words_asked = np.unique(keys[:, 0] * 32 + keys[:, 1], return_counts=True)
        taken = [int(words_asked[banks // 32 == step].max()) for step in np.unique(banks // 32)]
        self._add(machine, "shared", sum(taken), len(taken))

    def global_(self, machine: Any, address: np.ndarray, lanes: np.ndarray, size: int) -> None:
        if not len(address):
            return
        sectors, least = 0, 0
        for warp in np.unique(lanes // 32):
            one = address[lanes // 32 == warp]
            bytes_ = np.unique(one)
            sectors += len(np.unique(np.concatenate([one // 32, (one + size - 1) // 32])))
            least += -(-len(bytes_) * size // 32)
        self._add(machine, "global", sectors, least)

    def _add(self, machine: Any, memory: str, counted: int, least: int) -> None:
        instruction = machine.instruction
        key = (machine.program.name, memory, f"{instruction.source} {'.'.join(instruction.name[:4])}")
        for i, number in enumerate((1, counted, least)):
            self.counts[key][i] += number

    def table(self) -> str:
        rows = [f"{'kernel':28} {'memory':7} {'accesses':>9} {'counted':>9} {'least':>9}  where"]
        totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        for (kernel, memory, _), counts in self.counts.items():
            for i, number in enumerate(counts):
                totals[kernel, memory][i] += number
        for (kernel, memory), total in sorted(totals.items()):
            rows.append(f"{kernel:28} {memory:7} {total[0]:9} {total[1]:9} {total[2]:9}")
            for (_, _, where), (n, counted, least) in sorted(
                (item for item in self.counts.items() if item[0][:2] == (kernel, memory)),
                key=lambda item: item[1][2] - item[1][1],
            )[:6]:
                if counted > 1.05 * least:
                    rows.append(f"{'':28} {'':7} {n:9} {counted:9} {least:9}  {where}")
        return "\n".join(rows)
