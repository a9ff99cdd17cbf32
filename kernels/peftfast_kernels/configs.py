"""Tile sizes as data: op -> chip -> Tile. Pure Python, so that a launcher, the tests and tools/aot.py read one table.

A chip is named as compilers name it (``sm_90``, ``gfx942``). A chip that is not listed takes the nearest older one of
its family; the shared-memory limits that force smaller tiles on some chips are in `SHARED_MEMORY`.
"""

from functools import cache
from typing import NamedTuple

import torch

from peftfast_kernels.op import is_interpreting


class Tile(NamedTuple):
    """Block sizes of one kernel on one chip: rows, output columns, contraction, rank; then warps and stages."""

    BM: int
    BN: int
    BK: int
    warps: int = 4
    stages: int = 3


# Bytes of shared memory one program may use (the driver checks it at load time only, so AOT checks it against this).
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}

# The interpreter runs tiles that are small enough for odd test shapes to need several of them in every direction.
_INTERPRETER = "interpreter"

TILES: dict[str, dict[str, Tile]] = {
    # t = drop(x) aᵀ, p = s dy b: at most BM rows a program, or BN where x is masked, which takes longer than to read
    # factors again; BK of the contraction (see `depth`)
    "lora_down": {
        _INTERPRETER: Tile(32, 32, 32),
        "sm_80": Tile(128, 64, 128, 4, 4),
        "sm_86": Tile(64, 64, 64, 4, 3),
        "sm_90": Tile(128, 64, 128, 4, 4),
        "sm_100": Tile(128, 64, 128, 4, 5),
        "sm_120": Tile(64, 64, 64, 4, 3),
        "gfx942": Tile(64, 64, 64, 4, 2),
    },
    # y = x Wᵀ + s t bᵀ and its transpose: BM rows, BN output columns, BK of the contraction
    "lora_gemm": {
        _INTERPRETER: Tile(32, 32, 32),
        "sm_80": Tile(128, 128, 32, 4, 4),
        "sm_86": Tile(128, 128, 32, 4, 3),
        "sm_90": Tile(128, 256, 64, 8, 3),
        "sm_100": Tile(128, 256, 64, 8, 3),
        "sm_120": Tile(128, 128, 32, 4, 3),
        "gfx942": Tile(128, 128, 32, 8, 2),
    },
    # the same for fp32 activations, whose tiles take twice the room
    "lora_gemm_fp32": {
        _INTERPRETER: Tile(32, 32, 32),
        "sm_80": Tile(64, 64, 32, 4, 3),
        "gfx942": Tile(64, 64, 16, 4, 2),
    },
    # decode in the main loop: few rows, so that the decode of a weight tile is not repeated often
    "lora_gemm_decode": {
        _INTERPRETER: Tile(32, 32, 32),
        "sm_80": Tile(64, 128, 64, 4, 3),
        "sm_86": Tile(64, 128, 64, 4, 2),
        "sm_90": Tile(64, 128, 64, 4, 3),
        "sm_120": Tile(64, 128, 64, 4, 2),
        "gfx942": Tile(64, 64, 64, 4, 1),
    },
    # y + s t bᵀ, masked or not: BM rows, BN columns, BK of the rank at a time
    "expand": {
        _INTERPRETER: Tile(32, 32, 32),
        "sm_80": Tile(64, 128, 64, 4, 2),
        "sm_86": Tile(64, 64, 32, 4, 2),
        "sm_90": Tile(64, 128, 64, 4, 2),
        "sm_120": Tile(64, 64, 32, 4, 2),
        "gfx942": Tile(64, 64, 32, 4, 1),
    },
    # db = s dyᵀ t and da = pᵀ drop(x): at most BN columns a program, BK rows at a time (see `depth`)
    "lora_grad": {
        _INTERPRETER: Tile(16, 32, 32),
        "sm_80": Tile(16, 128, 64, 4, 4),
        "sm_86": Tile(16, 64, 64, 4, 3),
        "sm_90": Tile(16, 128, 64, 4, 5),
        "sm_100": Tile(16, 128, 64, 4, 5),
        "sm_120": Tile(16, 64, 64, 4, 3),
        "gfx942": Tile(16, 64, 64, 4, 2),
    },
    # per-row adapters: BM sorted rows, BN columns, BK of the contraction
    "routed": {
        _INTERPRETER: Tile(16, 32, 32),
        "sm_80": Tile(32, 128, 64, 4, 2),
        "sm_86": Tile(32, 64, 64, 4, 2),
        "sm_90": Tile(32, 128, 64, 4, 3),
        "sm_120": Tile(32, 64, 64, 4, 2),
        "gfx942": Tile(32, 64, 32, 4, 1),
    },
    # element-wise kernels over an [M, N] grid
    "elementwise": {
        _INTERPRETER: Tile(16, 64, 0),
        "sm_80": Tile(16, 256, 0, 4, 1),
        "gfx942": Tile(16, 256, 0, 4, 1),
    },
    # sums of what several programs have of one product: BM rows, BN columns
    "sum": {
        _INTERPRETER: Tile(16, 32, 0),
        "sm_80": Tile(16, 64, 0, 4, 1),
        "gfx942": Tile(16, 64, 0, 4, 1),
    },
    # norms: up to BM rows, BK of the contraction
    "row_norm": {
        _INTERPRETER: Tile(32, 0, 32),
        "sm_80": Tile(128, 0, 64, 4, 2),
        "gfx942": Tile(32, 0, 64, 4, 1),
    },
    # standalone dequantisation: BM rows of BN weights
    "dequantize": {
        _INTERPRETER: Tile(16, 64, 0),
        "sm_80": Tile(32, 256, 0, 4, 1),
        "gfx942": Tile(16, 256, 0, 4, 1),
    },
}

# "lora_gemm_decode" for more rows than its own tile has, forward and transposed, on the chips whose matrix instructions
# take 128 rows at once: a decoded weight serves twice the rows for 3 to 12 % more instructions. Elsewhere such a tile
# takes as many as two of the lower ones.
TALL_DECODE: dict[str, tuple[Tile, Tile]] = {
    _INTERPRETER: (Tile(64, 32, 64), Tile(64, 32, 32)),
    "sm_90": (Tile(128, 64, 128, 4, 2), Tile(128, 64, 128, 4, 2)),
    "sm_100": (Tile(128, 64, 128, 4, 3), Tile(128, 64, 128, 4, 3)),
    "sm_103": (Tile(128, 64, 128, 4, 3), Tile(128, 64, 128, 4, 3)),
}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover the size. Triton's own takes the host microseconds, because kernels may call it too."""
    return -(-size // block)


MAX_RANK_TILE = 128  # wider ranks are cut into tiles of this size


def rank_tile(rank: int, largest: int = MAX_RANK_TILE) -> int:
    """The power of two, at least 16 (what a matrix instruction needs), that holds the rank or `largest` of it."""
    return max(16, min(largest, 1 << (rank - 1).bit_length() if rank > 1 else 1))


def shared_tile(rank: int, linears: int) -> int:
    """The rank tile where one program holds a tile of several linears: all of them together fill the usual one."""
    return rank_tile(rank, MAX_RANK_TILE >> (linears - 1).bit_length())


#: What `tiles.exact_product` makes of a bfloat16 operand and an fp32 one.
PARTS = "parts"


def _takes_registers(chip: str, precision: str) -> bool:
    """Whether fp32 operands are multiplied in three matrix products or in none, for which NVIDIA's chips need many
    registers; never of half-precision ones."""
    return chip.startswith("sm_") and precision not in ("tf32", PARTS)


def expand_ranks(rank: int, largest: int, chip: str, precision: str) -> int:
    """Ranks at a time where a tile of them is expanded in registers."""
    return rank_tile(rank, 16 if _takes_registers(chip, precision) else largest)


def held_ranks(ranks: int, chip: str, precision: str) -> int:
    """Ranks as registers and shared memory count them."""
    return ranks * (2 if chip.startswith("sm_") and precision != "tf32" else 1)


def rank_warps(warps: int, ranks: int, chip: str, precision: str, few: int = 32) -> int:
    """The warps, or twice as many where more than `few` ranks are held that take the registers of more."""
    return warps * (2 if ranks > few and _takes_registers(chip, precision) else 1)


#: Sums of one program of a skinny product above which it has twice the warps, each with half of them in registers.
MANY_SUMS = 1 << 13


def skinny_warps(warps: int, owned: int, ranks: int, chip: str, precision: str, few: int = 32) -> int:
    """The warps of a program that owns so many rows, or columns, and has their sums for so many ranks; `few`: see
    `rank_warps`."""
    return 2 * warps if owned * ranks > MANY_SUMS else rank_warps(warps, ranks, chip, precision, few)


PROGRAMS = 128  # about as many as a large GPU has processors

#: Bytes a cycle out of the second-level cache to all of a large GPU, and out of memory; and cycles in which a processor
#: makes one element of a dropout mask. Predictions, from published measurements of H100s and from the mask's
#: instructions: nothing was measured here.
_TO_ALL, _OUT_OF_MEMORY, _MASK = 3072, 2400, 0.12

#: Bytes a cycle to one processor, by the same, and by the cycles of its shared memory (`tools/emulate.py --traffic`):
#: where matrix instructions read out of that themselves, and where warps do for them.
_TO_ONE, _TO_ONE_BY_WARPS = 48, 32


def waiting(
    programs: int, moved: float, once: float, masked: float = 0, masking: int | None = None, by_warps: bool = True
) -> tuple[float, float]:
    """Cycles that programs take, by prediction, which each read so many bytes: for all of these, which often are the
    same, for `once`, what comes out of memory, or for what one processor has to do alone. Then the bytes it reads.

    `masking` of the programs, None means all, make so many elements of a mask besides; by_warps: see
    `fed_by_warps`. A function of shape and kind of chip alone, so that results are the same on every GPU of a kind.
    """
    alone = cdiv(programs, PROGRAMS) * moved
    masks = cdiv(programs if masking is None else masking, PROGRAMS) * masked
    to_one = _TO_ONE_BY_WARPS if by_warps else _TO_ONE
    return max(programs * moved / _TO_ALL, once / _OUT_OF_MEMORY, alone / to_one, masks * _MASK), alone


def fed_by_warps(chip: str, rows: int) -> bool:
    """Whether matrix instructions with so many rows on their left take operands that warps have read: all but the large
    ones of data centres' Hopper and Blackwell."""
    return rows < 64 or not chip.startswith(("sm_90", "sm_10"))


def powers(largest: int, smallest: int = 16) -> list[int]:
    """The powers of two from `smallest`, by default what a matrix instruction needs, to `largest`."""
    return [1 << bits for bits in range(smallest.bit_length() - 1, largest.bit_length())]


def parts(programs: int, steps: int) -> int:
    """In how many parts so many steps of a contraction are taken, each by programs of its own, where there are so few
    programs that a large GPU would wait for them. At least four steps each; a function of the shape alone."""
    count = 1
    while count < 8 and programs * count < 2 * PROGRAMS and steps >= 8 * count:
        count *= 2
    return count


def depth(contraction: int, owned: int, other: int, single: bool) -> int:
    """How much of the contraction one step loads: `contraction` at about 64 rows (or columns) owned and a small rank.

    Fewer owned rows take longer steps, so that as many bytes are under way; wide ranks and fp32 take shorter ones.
    """
    steps = min(contraction * 128 // (owned + other), 2 * contraction) // (2 if single else 1)
    return max(16, 1 << (steps.bit_length() - 1))


@cache
def chip_of(device: torch.device) -> str:
    """The chip a device is: ``"sm_90"``, ``"gfx942"``, or ``"interpreter"`` for the CPU."""
    if device.type == "cpu" or is_interpreting():
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def tile(op: str, chip: str) -> Tile:
    """The tile of an op on a chip; the nearest older listed chip of the family where it is not listed itself."""
    table = TILES[op]
    if chip in table:
        return table[chip]
    if chip.startswith("gfx"):
        return table["gfx942"]
    listed = sorted((int(name[3:]), name) for name in table if name.startswith("sm_"))
    older = [name for number, name in listed if number <= int(chip[3:])]
    return table[older[-1] if older else listed[0][1]]


def expand_tile(chip: str, single: bool) -> Tile:
    """The tile of a product of factors and what it is added to, which are in registers at once; of fp32 activations
    (`single`) fewer columns are."""
    config = tile("expand", chip)
    return config._replace(BN=min(config.BN, 64)) if single else config


def dot_precision(chip: str, *dtypes: torch.dtype) -> str:
    """How fp32 operands are multiplied: ``ieee``, or ``tf32x3`` (fp32-like from three TF32 products) when wide.

    Plain TF32 is used for fp32 models only where the user allowed it for torch's own products.

    Args:
        dtypes: of the activations and of their factors; without fp32 among them it makes no difference.
    """
    if chip == _INTERPRETER or chip.startswith("gfx"):
        return "ieee"
    if torch.float32 not in dtypes:
        return "tf32"
    if torch.bfloat16 in dtypes or torch.float16 in dtypes:
        return "tf32x3"  # wide: x is exact in TF32, only the fp32 factor needs the extra products
    # `allow_tf32` raises once the setting was made by its newer name
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def exact_precision(chip: str, activations: torch.dtype, factors: torch.dtype) -> str:
    """The same where `tiles.exact_product` multiplies them."""
    precision = dot_precision(chip, activations, factors)
    return PARTS if precision == "tf32x3" and activations is torch.bfloat16 else precision


def update_precision(chip: str, activations: torch.dtype, factors: torch.dtype) -> str:
    """The same for a product of factors alone, which is rounded to the activations' dtype: wide ones are fp32-like in
    ``bf16x3``, from three products of bfloat16 halves, to 2^-17. That is a hundredth of what the rounding loses; and
    TF32 operands have to lie in shared memory column by column, which for a factor [R, K] takes 16 times as long to
    write: longer than the whole output takes to reach memory.
    """
    precision = dot_precision(chip, activations, factors)
    return "bf16x3" if precision == "tf32x3" and activations.itemsize == 2 else precision
