"""PTX as a list of blocks of instructions. PTX ISA: docs.nvidia.com/cuda/parallel-thread-execution."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import Any

#: Bytes of a register by the letters and digits that its kind ends in.
WIDTH = {"8": 1, "16": 2, "32": 4, "64": 8}
#: Where threads may wait for others.
WAITS = ("bar", "barrier", "mbarrier")


@dataclass
class Instruction:
    """``@%p1 ld.global.b32 %r1, [%rd1+4];``"""

    text: str
    name: tuple[str, ...]  # ("ld", "global", "b32")
    operands: list  # strings, or lists of strings where they are in braces
    guard: str | None = None
    negated: bool = False
    source: str = ""  # "tiles.py:35", of what it was compiled from

    @property
    def registers(self) -> list[str]:
        return re.findall(r"%\w+", self.text)


@dataclass
class Block:
    """Instructions that are run one after the other; only the last one may be a branch, only the first one a wait."""

    instructions: list[Instruction] = field(default_factory=list)
    steps: list = field(default_factory=list)  # what runs them
    able: Any = None  # which of the threads at the first one need not wait for others, where it is a wait


@dataclass
class Program:
    """One kernel."""

    name: str
    blocks: list[Block]
    labels: dict[str, int]  # number of the block that a label stands before
    parameters: dict[str, tuple[int, int]]  # where they lie among all arguments' bytes: start, end
    pointers: list[int]  # places of the arguments that point into global memory
    kinds: dict[str, int]  # bytes of the registers whose names start so

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """Bytes of each register."""
        names = {name for block in self.blocks for one in block.instructions for name in one.registers}
        kinds = {name: name.rstrip("0123456789") for name in names}
        return {name: self.kinds[kind] for name, kind in kinds.items() if kind in self.kinds}


def parse(text: str) -> Program:
    """The kernel of a PTX module, which has to be the only one."""
    name = re.search(r"\.visible \.entry (\w+)", text)
    if name is None:
        raise ValueError("no kernel in this PTX")
    head, _, rest = text[name.end() :].partition("{")
    parameters, pointers, end = {}, [], 0
    declared = re.findall(r"\.param\s+\.(\w+)([^,)]*?)\s(\w+)(?:\[(\d+)\])?\s*(?=[,)])", head)
    for i, (kind, attributes, parameter, length) in enumerate(declared):
        size = WIDTH[kind[1:]]
        start = -(-end // size) * size
        end = start + size * int(length or 1)
        parameters[parameter] = start, end
        if ".ptr" in attributes:
            pointers.append(i)
    kinds = {name: WIDTH[bits] for bits, name in re.findall(r"\.reg \.b(\d+)\s+(%\w+)<", rest)}
    blocks, labels, source = [Block()], {}, ""
    depth, inner, jumps = 0, {}, []  # braces within the kernel's own; labels in them, seen only there; who goes to one
    for line in rest.splitlines():
        line, _, comment = (part.strip() for part in line.partition("//"))
        if line.startswith(".loc"):
            source = ":".join(comment.split(":")[:2])
        if line in ("{", "}"):
            for jump in jumps:
                jump.operands[0] = inner.get(jump.operands[0], jump.operands[0])
            depth, inner, jumps = depth + (1 if line == "{" else -1), {}, []
            if depth < 0:
                break
        if label := re.match(r"([$\w]+):$", line):
            if blocks[-1].instructions:
                blocks.append(Block())
            if depth:
                inner[label[1]] = f"{label[1]} {len(blocks)}"
            labels[inner.get(label[1], label[1])] = len(blocks) - 1
            continue
        for statement in _statements(line):
            if statement.startswith("."):
                continue
            instruction = _instruction(statement, source)
            if instruction.name[0] in WAITS and instruction.guard is None and blocks[-1].instructions:
                blocks.append(Block())
            blocks[-1].instructions.append(instruction)
            if instruction.name[0] == "bra":
                jumps.append(instruction)
            if instruction.name[0] in ("bra", "ret", "exit"):
                blocks.append(Block())
    return Program(name[1], blocks, labels, parameters, pointers, kinds)


def _statements(line: str) -> list[str]:
    """Instructions of a line: inline assembly may have several, in braces of their own."""
    line = line.strip()
    if line.startswith("{"):
        line = line[1:]
    return [one.strip() for one in line.split(";") if one.strip() not in ("", "}")]


def _instruction(text: str, source: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if found is None:
        raise ValueError(f"no instruction of PTX: {text!r}")
    negated, guard, name, operands = found.groups()
    parts = tuple(name.replace("::", "__").split("."))
    return Instruction(text, parts, _operands(operands), guard, bool(negated), source)


def _operands(text: str) -> list:
    operands: list = []
    for one in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        one = one.strip()
        operands.append([part.strip() for part in one[1:-1].split(",")] if one.startswith("{") else one)
    return operands
