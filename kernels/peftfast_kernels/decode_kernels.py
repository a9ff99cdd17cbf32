"""Triton: how a kernel reads a [BN, BK] tile of W in each storage format, and the standalone dequantisation.

A tile function takes the format's pointers, the tile's rows and first column, and returns the decoded tile rounded to
the compute dtype; it reaches a kernel as ``DECODE: tl.constexpr``. 4-bit codes are looked up in a table of 16 fp32
values, which compilers keep in shared memory: in as many banks, so that a warp has any 32 of them at once. From global
memory it would wait for every line that it touches, 16 of them in a table of pairs by byte.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfast_kernels.configs import cdiv, chip_of, tile
from peftfast_kernels.decode import INT8_STEP, Operand, decoder_of, levels_of, packed_bytes
from peftfast_kernels.launch import Launch, planned
from peftfast_kernels.op import lasting
from peftfast_kernels.tiles import narrow
from peftfast_kernels.variants import DTYPES, WIDTH, Variant


@triton.jit
def tile_dense(
    w0, w1, w2, w3, w4, table, rows, k0, N, K, stride_n, stride_k,
    BK: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """w0: a plain weight, element (n, k) at n * stride_n + k * stride_k."""
    cols = k0 + tl.arange(0, BK)
    return tl.load(
        w0 + rows[:, None].to(tl.int64) * stride_n + cols[None, :].to(tl.int64) * stride_k,
        mask=(rows[:, None] < N) & (cols[None, :] < K),
        other=0.0,
    )


@triton.jit
def tile_int8(
    w0, w1, w2, w3, w4, table, rows, k0, N, K, stride_n, stride_k,
    BK: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """w0: int8 [N, K]; w1: fp32 [N]; table: fp32 [1], the constant 1 / 127."""
    cols = k0 + tl.arange(0, BK)
    q = tl.load(
        w0 + rows[:, None].to(tl.int64) * stride_n + cols[None, :].to(tl.int64) * stride_k,
        mask=(rows[:, None] < N) & (cols[None, :] < K),
        other=0,
    )
    scale = tl.load(w1 + rows, mask=rows < N, other=0.0)
    return narrow(q.to(tl.float32) * scale[:, None] * tl.load(table), DTYPE, INTERP)


@triton.jit
def block_scale(absmax, code, absmax2, offset, block, inside, NESTED: tl.constexpr, IN_WORDS: tl.constexpr):
    """fp32 absmax of these blocks, 0 outside: stored, or code[absmax] * absmax2[block // NESTED] + offset."""
    if NESTED:
        if IN_WORDS:
            two = tl.load(absmax.to(tl.pointer_type(tl.int16), bitcast=True) + block // 2, mask=inside, other=0)
            index = (two.to(tl.int32) >> (block % 2 * 8).to(tl.int32)) & 255
        else:
            index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(absmax2 + block // NESTED, mask=inside, other=0.0)
        return tl.where(inside, tl.load(code + index) * outer + tl.load(offset), 0.0)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@triton.jit
def tile_4bit(
    w0, w1, w2, w3, w4, table, rows, k0, N, K, stride_n, stride_k,
    BK: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    INTERP: tl.constexpr,
):  # fmt: skip
    """w0: packed uint8; w1..w4: absmax and its nesting; table: fp32 [16], the value of every code.

    LAYOUT 0: K is odd, bytes straddle rows. 1: K is even. 2: blocks end with rows, BK and BLOCK divide one another, and
    nothing is read as bytes (`Stored.in_words`): taking codes out of words takes less than out of bytes, and where
    anything that a product is made of was a byte, Triton has each thread take 4 neighbours, whose registers it moves.
    """
    wide = rows[:, None].to(tl.int64)
    if LAYOUT == 0:
        cols = k0 + tl.arange(0, BK)
        inside = (rows[:, None] < N) & (cols[None, :] < K)
        element = wide * K + cols[None, :]
        byte = tl.load(w0 + element // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
        scale = block_scale(w1, w2, w3, w4, element // BLOCK, inside, NESTED, False)
    else:
        if LAYOUT == 1:
            cols = k0 // 2 + tl.arange(0, BK // 2)
            inside = (rows[:, None] < N) & (cols[None, :] < K // 2)
            byte = tl.load(w0 + wide * (K // 2) + cols[None, :], mask=inside, other=0).to(tl.int32)
            scale = block_scale(w1, w2, w3, w4, (wide * K + 2 * cols[None, :]) // BLOCK, inside, NESTED, False)
        else:
            blocks = k0 // BLOCK + tl.arange(0, BK // BLOCK if BK > BLOCK else 1)
            inside = (rows[:, None] < N) & (blocks[None, :] < K // BLOCK)
            scale = block_scale(w1, w2, w3, w4, wide * (K // BLOCK) + blocks[None, :], inside, NESTED, True)
            cols = k0 // 8 + tl.arange(0, BK // 8)
            inside = (rows[:, None] < N) & (cols[None, :] < K // 8)
            words = w0.to(tl.pointer_type(tl.int32), bitcast=True) + wide * (K // 8) + cols[None, :]
            # Of three dimensions: a tile of two that happens to have the same sizes would be read by threads alike.
            word = tl.reshape(tl.load(words[:, :, None], mask=inside[:, :, None], other=0), inside.shape)
            half = tl.interleave(word, word >> 16)
            byte = tl.interleave(half, half >> 8)  # and what is above it
        code = tl.interleave(byte >> 4, byte) & 15
    COUNT: tl.constexpr = rows.shape[0] * BK
    EACH: tl.constexpr = BK // scale.shape[1]  # columns that have a scale
    value = tl.gather(tl.load(table + tl.arange(0, 16)), tl.reshape(code, (COUNT,)), 0)
    value = tl.reshape(value, (rows.shape[0], scale.shape[1], EACH)) * scale[:, :, None]
    return tl.reshape(narrow(value, DTYPE, INTERP), (rows.shape[0], BK))


@triton.jit
def dequantize_kernel(
    w0, w1, w2, w3, w4, table, out_ptr, N, K, stride_n, stride_k,
    DECODE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, LAYOUT: tl.constexpr, DTYPE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Program (i, j) decodes BN rows and BK columns. out_ptr: [N, K] contiguous, any float dtype."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    w = DECODE(
        w0, w1, w2, w3, w4, table, rows, k0, N, K, stride_n, stride_k, BK, BLOCK, NESTED, LAYOUT, DTYPE, INTERP
    )  # fmt: skip
    cols = k0 + tl.arange(0, BK)
    inside = (rows[:, None] < N) & (cols[None, :] < K)
    offsets = rows[:, None].to(tl.int64) * K + cols[None, :]
    if w.dtype != out_ptr.dtype.element_ty:
        w = narrow(w.to(tl.float32), out_ptr.dtype.element_ty, INTERP)
    tl.store(out_ptr + offsets, w, mask=inside)


#: How a kernel reads a tile of W, by storage format.
TILE_FUNCTIONS = {
    "dense": tile_dense,
    "dense_t": tile_dense,
    "int8": tile_int8,
    "nf4": tile_4bit,
    "fp4": tile_4bit,
}

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

_tables: dict[tuple[str, torch.device], Tensor] = {}


def _table(format: str, device: torch.device) -> Tensor:
    key = (format, device)
    if key not in _tables:
        values = (INT8_STEP,) if format == "int8" else levels_of(format)
        _tables[key] = lasting(torch.tensor(values, dtype=torch.float32, device="cpu"), device)
    return _tables[key]


class Stored(NamedTuple):
    """What there is to know of an operand besides its tensors."""

    format: str
    shape: tuple[int, int]
    strides: tuple[int, ...]  # of the weight [N, K]; zeros for packed ones
    dtype: torch.dtype
    block: int
    nested_block: int  # 0: not nested
    in_words: bool = False  # whether packed codes may be read by fours and, nested, absmax by twos, see `tile_4bit`


def stored(w: Operand) -> tuple[Stored, tuple[Tensor, ...]]:
    """What every kernel with a DECODE parameter has to know of an operand, and its pointers w0 to w4 and table."""
    first = w.tensors[0]
    if w.format.startswith("dense"):
        strides = first.stride() if w.format == "dense" else first.stride()[::-1]
        return Stored(w.format, tuple(w.shape), strides, w.dtype, w.block, 0), (first,) * 6
    decoder_of(w)
    tensors, strides, nested, in_words = list(w.tensors), (0, 0), w.nested, False
    if w.format in ("nf4", "fp4"):
        if first.dtype is not torch.uint8 or not first.is_contiguous():  # a kernel does not ask for the shape
            first = tensors[0] = packed_bytes(w)
        # views of larger tensors may begin anywhere, and an odd number of absmax bytes has no last pair
        absmax = tensors[1]
        in_words = not (first.data_ptr() & 3 or nested and (absmax.data_ptr() | absmax.numel()) & 1)
    else:
        strides = first.stride()
    pointers = (tensors + [first] * 5)[:5]  # a pointer that the format does not read still has to be one
    kind = Stored(w.format, tuple(w.shape), strides, w.dtype, w.block, w.nested_block if nested else 0, in_words)
    return kind, (*pointers, _table(w.format, first.device))


def decode_layout(w: Stored, bk: int) -> int:
    """Which of `tile_4bit`'s layouts a tile of `bk` columns may use."""
    k = w.shape[1]
    if w.format not in ("nf4", "fp4") or k % 2:
        return 0
    whole = k % w.block == 0 and w.block % 8 == 0 and (w.block % bk == 0 or bk % w.block == 0)
    return 2 if whole and w.in_words else 1


def decode_arguments(w: Stored, bk: int) -> dict:
    """What every kernel with a DECODE parameter takes besides pointers, for a tile of bk columns."""
    return {
        "N": w.shape[0],
        "K": w.shape[1],
        "stride_n": w.strides[0],
        "stride_k": w.strides[1],
        "DECODE": TILE_FUNCTIONS[w.format],
        "BLOCK": w.block,
        "NESTED": w.nested_block,
        "LAYOUT": decode_layout(w, bk),
        "DTYPE": TL_DTYPES[w.dtype],
    }


@planned
def _plan(chip: str, w: Stored) -> Launch:
    """A 2D grid, one program per [BN, BK] tile."""
    config = tile("dequantize", chip)
    return Launch(
        dequantize_kernel,
        (cdiv(w.shape[0], config.BM), cdiv(w.shape[1], config.BN)),
        **decode_arguments(w, config.BN),
        BN=config.BM,
        BK=config.BN,
        num_warps=config.warps,
        # Each step is rounded to fp32 as bitsandbytes rounds it: a fused multiply-add would differ in the last bit.
        enable_fp_fusion=False,
    )


def dequantize(w: Operand, dtype: torch.dtype) -> Tensor:
    """One launch; the packed bytes are read once, the result written once."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    if out.numel():
        kind, pointers = stored(w)
        _plan(chip_of(out.device), kind)(*pointers, out)
    return out


def stored_variant(format: str, n: int, k: int, nested: bool, dtype: str) -> tuple[Stored, dict[str, str]]:
    """An ordinary weight, and the types of its pointers, for ahead-of-time checks."""
    strides = (0, 0) if format in ("nf4", "fp4") else (k, 1)
    codes = {"nf4": "u8", "fp4": "u8", "int8": "i8"}.get(format, dtype)
    pointers = {"w0": codes, "w1": "u8" if nested else "fp32", "w2": "fp32", "w3": "fp32", "w4": "fp32"}
    kind = Stored(format, (n, k), strides, DTYPES[dtype], 64, 256 if nested else 0, in_words=True)
    return kind, {**pointers, "table": "fp32"}


def variants(chip: str):
    """What `dequantize` launches, for ahead-of-time checks."""
    for format, nested in (("nf4", True), ("fp4", False), ("int8", False)):
        w, pointers = stored_variant(format, WIDTH, WIDTH, nested, "bf16")
        launch = _plan(chip, w)
        yield Variant(
            f"dequantize {format}{' nested' * nested}",
            launch,
            {**pointers, "out_ptr": "bf16"},
            weights=launch.arguments["BN"] * launch.arguments["BK"] if format != "int8" else 0,
            quick=nested,
        )
