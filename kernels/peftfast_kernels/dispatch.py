"""Which path an op takes on a GPU: measured tables where there are any, and the rules below where there are none.

A table is a file ``tables/<chip>.json``, written by ``tools/tune.py`` on that chip and shipped here, or in the folder
that ``PEFTFAST_TABLES`` names: per op, storage format, dtype and dropout the points at which both paths were timed. A
call takes the choice of the nearest point, by the ratios of its sizes; a chip without a table takes that of its nearest
relative. Nothing is timed while a user's program runs.

Choices: ``"triton"``; ``"torch"`` (cuBLAS, the big product added to the small one); ``"split"``, the small product and
its mask in one Triton pass, and torch's big one added to it.

Without a table the skinny ops (one dimension is the rank), which are bound by memory, run in Triton. A big product is
fused up to the number of rows in `FUSED_ROWS`. 0 means never: an unspecialised Triton product has to reach about 0.95
of cuBLAS before saving a pass over y pays, and no measurement shows that yet. With few rows and a 4-bit weight it is
fused by prediction, not by measurement: half a byte a weight is read where the other way moves four and a half, which
by the kernel's instructions a weight (`tools/aot.py`) and its cycles of shared memory (`tools/emulate.py --traffic`),
the more of the two, is 2 to 3.7 times as fast on an H100, and is one launch, or two, instead of three. With more than
128 rows the products take as long as what is saved.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfast_kernels.configs import chip_of
from peftfast_kernels.decode import Operand
from peftfast_kernels.op import get_backend, register_dispatch

TABLES = Path(os.environ.get("PEFTFAST_TABLES") or Path(__file__).parent / "tables")
REMEMBERED = 4096  # calls of which a table remembers the choice
CHOICES = ("triton", "torch", "split")

# op -> format -> largest number of rows M that the fused kernel takes where nothing was measured
FUSED_ROWS: dict[str, dict[str, int]] = {
    "lora_gemm": {"dense": 0, "dense_t": 0, "nf4": 128, "fp4": 128, "int8": 0},
    "lora_gemm_t": {"dense": 0, "dense_t": 0, "nf4": 128, "fp4": 128, "int8": 0},
    "lora_add": {"dense": 0},
}

#: chip -> multiply-adds of a linear's product up to which the host takes longer to ask for it than the GPU to do it,
#: forward and backward, where nothing was measured: predictions, from the chips' peaks and a host of 2025
HOST_BOUND = {"sm_90": 1 << 32, "sm_100": 1 << 32, "sm_103": 1 << 32}
HOST_BOUND_ELSEWHERE = 1 << 31


class Point(NamedTuple):
    """A call as the tables know it: everything that decides which path is faster, and nothing else."""

    format: str  # of the stored weight; "dense" for ops that take none
    dtype: str  # of the activations, with "+wide" where the factors are fp32 beside them
    drop: bool
    sizes: tuple[int, ...]  # shapes of the matrix arguments, one after another


class Entry(NamedTuple):
    """One measured point."""

    point: Point
    choice: str


class Table:
    """The measurements of one chip."""

    def __init__(self, chip: str, entries: dict[str, Sequence[Entry]], host_bound: int | None = None) -> None:
        self.chip, self.entries, self.host_bound = chip, entries, host_bound
        self._choices: dict[tuple, str | None] = {}

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Raises ``ValueError`` for a choice that does not exist."""
        data = json.loads(path.read_text())
        entries: dict[str, list[Entry]] = {}
        for row in data["entries"]:
            if row["choice"] not in CHOICES:
                raise ValueError(f"{path}: unknown choice {row['choice']!r}; one of {', '.join(map(repr, CHOICES))}")
            point = Point(row["format"], row["dtype"], row["drop"], tuple(row["sizes"]))
            entries.setdefault(row["op"], []).append(Entry(point, row["choice"]))
        return cls(data["chip"], entries, data.get("host_bound"))

    def choice(self, op: str, point: Point) -> str | None:
        """The choice of the nearest measured point, None where the op was not measured for such operands at all."""
        entries = [e for e in self.entries.get(op, ()) if len(e.point.sizes) == len(point.sizes)]
        for twin in _twins(point):
            alike = [entry for entry in entries if entry.point[:3] == twin[:3]]
            if alike:
                return min(alike, key=lambda entry: _distance(entry.point.sizes, point.sizes)).choice
        return None

    def choice_of(self, op: str, args: Sequence[Any]) -> str | None:
        """The choice for a call with these arguments."""
        key = (op, *_looks(args))
        if key not in self._choices:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            self._choices[key] = self.choice(op, point_of(args))
        return self._choices[key]


def _looks(args: Sequence[Any]) -> list:
    """All of a call that its point depends on; making that takes the host longer."""
    looks: list = []
    for value in args:
        if type(value) is list:
            looks += _looks(value)
        elif isinstance(value, Tensor):
            looks += (value.shape, value.dtype)
        elif type(value) is Operand:
            looks += (value.format, tuple(value.shape))
    return looks


_TWINS = {"bfloat16": "float16", "float16": "bfloat16", "nf4": "fp4", "fp4": "nf4"}


def _twins(point: Point) -> Iterator[Point]:
    """A point, and those that cost the same: half-precision formats are alike, and so are 4-bit ones."""
    kind, plus, rest = point.dtype.partition("+")
    for format in dict.fromkeys((point.format, _TWINS.get(point.format, point.format))):
        for dtype in dict.fromkeys((kind, _TWINS.get(kind, kind))):
            yield point._replace(format=format, dtype=dtype + plus + rest)


def _distance(one: Sequence[int], other: Sequence[int]) -> float:
    return sum(math.log2(max(a, 1) / max(b, 1)) ** 2 for a, b in zip(one, other, strict=True))


def point_of(args: Sequence[Any]) -> Point:
    """The point of a call with these positional arguments."""
    format, sizes, dtypes, drop = "dense", [], [], False
    for value in [one for arg in args for one in (arg if isinstance(arg, list) else (arg,))]:
        if isinstance(value, Tensor):
            if value.dim() == 2:
                sizes += value.shape
                dtypes.append(value.dtype)
            elif value.dim() == 0:  # the seed
                drop = True
        elif isinstance(value, Operand):
            format = value.format
            sizes += value.shape
    dtype = str(dtypes[0])[6:] if dtypes else ""
    wide = any(d.itemsize > dtypes[0].itemsize for d in dtypes[1:])
    return Point(format, dtype + "+wide" * wide, drop, tuple(sizes))


@cache
def table_of(chip: str) -> Table | None:
    """The table of a chip, or of the nearest chip of its family that has one; None where there is none."""
    paths = {path.stem: path for path in TABLES.glob("*.json")}
    if chip in paths:
        return Table.read(paths[chip])
    family = re.match(r"[a-z]*", chip).group()
    number = _number(chip)
    relatives = [name for name in paths if re.match(r"[a-z]*", name).group() == family and _number(name) is not None]
    if number is None or not relatives:
        return None
    return Table.read(paths[min(relatives, key=lambda name: abs(_number(name) - number))])


def _number(chip: str) -> int | None:
    digits = re.search(r"([0-9a-f]+)$", chip)
    try:
        return int(digits.group(1), 16) if digits else None
    except ValueError:
        return None


def measured(op: str, device: torch.device, args: Sequence[Any]) -> str | None:
    """What the table of this device says about this call."""
    if torch.compiler.is_compiling():  # sizes may be symbols there, and reading a file is nothing to trace
        return None
    table = table_of(chip_of(device))
    return None if table is None else table.choice_of(op, args)


@cache
def host_bound_products(index: int) -> int:
    """Multiply-adds of a product up to which the host takes longer than this GPU; as measured, or as predicted."""
    chip = chip_of(torch.device("cuda", index))
    table = table_of(chip)
    if table is not None and table.chip == chip and table.host_bound is not None:  # a relative may be much slower
        return table.host_bound
    return HOST_BOUND.get(chip, HOST_BOUND_ELSEWHERE)


def fuses(op: str, *args: Any) -> bool:
    """Whether a big product with these arguments takes its fused Triton kernel; always where Triton is forced."""
    if get_backend() == "triton":
        return True
    choice = measured(op, args[0].device, args)
    if choice is not None:
        return choice == "triton"
    format = "dense"
    for value in args:
        if type(value) is Operand:
            format = value.format
            break
    # fp32 products take ten times the instructions a decoded weight
    return args[0].dtype.itemsize == 2 and args[0].shape[0] <= FUSED_ROWS[op].get(format, 0)


def fuses_together(op: str, args: Sequence[Any], member: str, members: Sequence[Sequence[Any]]) -> bool:
    """Whether siblings' big products take one fused kernel: as measured for the group, otherwise where each of the
    `members`, the arguments of the op for one linear, would."""
    if get_backend() != "triton":
        choice = measured(op, members[0][0].device, args)
        if choice is not None:
            return choice == "triton"
    return all(fuses(member, *own) for own in members)


def loses(op: str, device: torch.device, calls: Iterable[Sequence[Any]]) -> bool:
    """Whether plain torch was measured to be the faster path on a GPU for one of these calls."""
    if torch.compiler.is_compiling() or table_of(chip_of(device)) is None:
        return False
    return any(measured(op, device, args) == "torch" for args in calls)


register_dispatch(loses)
