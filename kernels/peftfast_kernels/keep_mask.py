"""Dropout masks that are recomputed from a seed and never stored for the backward pass.

Where kernels run (on GPUs, and in Triton's interpreter) and under a compiler there is one counter-based definition, bit
for bit equal on every path; plain CPU tensors take their bits from a sequential generator, which costs a fraction of
the hash there. `keep_mask` exports the mask that the device's paths use.

An element is kept where its 16 bits are at least ``round(prob * 2**16)``: of ``mix(row_key + (col // 2) * 0x9E3779B9)``
the low half where the column is even, the high half where it is odd, with the 64-bit row counter and the 64-bit seed
entering through ``row_key = mix(mix(row_lo ^ s0) + (row_hi ^ s1))``, ``s0 = mix(seed_lo +
0x9E3779B9)``, ``s1 = mix(seed_hi + s0)``; everything is 32-bit unsigned arithmetic. ``mix`` is a xorshift-multiply
permutation of 32-bit words. The seed is mixed before it meets the row: ``row ^ seed`` would give neighbouring seeds the
same rows in another order. The mask depends on the seed, the row and the column only, never on a tile size or on which
path computes it. On plain CPU tensors the i-th block of 2**17 // K rows takes consecutive 16-bit words of numpy's SFC64
seeded with (seed, i), and the same threshold.

Kept elements are scaled by ``1 / (1 - p)`` with ``p = round(prob * 2**16) / 2**16``, the probability really used. More
bits a draw would be more words to make, which is what masked kernels take most of their instructions for.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from peftfast_kernels.op import Case, Cost, is_interpreting, op, row_chunks

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: consecutive words land far apart before mixing
MIX_1 = 0x21F0AAAD
MIX_2 = 0xD35A2D97
_DRAWS = 1 << 16

# int32 scratch per chunk is as many words as this: 512 KiB, which stay in a core's L2 cache.
_CHUNK = 1 << 17

# Masks of up to this many elements (bytes) outlive the call that made them, until the next one.
_REMEMBERED = 1 << 24

# Bytes of small masks, as numbers, that a thread keeps from the forward pass for the backward pass.
_SMALL = 1 << 22


def threshold(prob: float) -> int:
    """``round(prob * 2**16)``: of 2**16 equally likely draws, how many drop. One less where that is all, so that it
    fits into a draw: `keep_scale` drops what is left. Raises ``ValueError`` outside [0, 1]."""
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"dropout probability {prob!r} is outside [0, 1]")
    return min(round(prob * _DRAWS), _DRAWS - 1)


def keep_scale(prob: float) -> float:
    """``1 / (1 - p)`` for the quantised p: 1.0 without dropout; 0.0 where everything is dropped, so that no NaN can
    appear."""
    kept = _DRAWS - round(prob * _DRAWS)
    return _DRAWS / kept if kept else 0.0


def seed_or(seed: Tensor | None, prob: float, stand_in: Tensor) -> Tensor:
    """The seed, or, without dropout, any pointer. Raises ``ValueError`` where a seed is missing."""
    if seed is not None:
        return seed
    if prob and threshold(prob):
        raise ValueError(f"dropout with probability {prob} needs a seed tensor")
    return stand_in


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _xorshift_(word: Tensor, bits: int, scratch: Tensor) -> None:
    # torch has no logical shift on int32 (and no shift at all on uint32), so the copied sign bits are masked away.
    torch.bitwise_right_shift(word, bits, out=scratch)
    word.bitwise_xor_(scratch.bitwise_and_((1 << (32 - bits)) - 1))


def _mix_(word: Tensor, scratch: Tensor) -> Tensor:
    _xorshift_(word, 16, scratch)
    word.mul_(_signed(MIX_1))
    _xorshift_(word, 15, scratch)
    word.mul_(_signed(MIX_2))
    _xorshift_(word, 15, scratch)
    return word


def _row_keys(seed: Tensor, start: int, stop: int) -> Tensor:
    rows = torch.arange(start, stop, device=seed.device)
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    s0 = _mix_(low + _signed(GOLDEN), torch.empty_like(low))
    s1 = _mix_(high + s0, torch.empty_like(low))
    key = rows.to(torch.int32).bitwise_xor_(s0)
    scratch = torch.empty_like(key)
    key = _mix_(key, scratch).add_((rows >> 32).to(torch.int32).bitwise_xor_(s1))
    return _mix_(key, scratch).unsqueeze(1)


def _pair_keys(cols: int, device: torch.device) -> Tensor:
    return (torch.arange((cols + 1) // 2, device=device) * GOLDEN).to(torch.int32)


def dropped_rows(seed: Tensor, prob: float, start: int, stop: int, cols: int, pairs: Tensor) -> Tensor:
    """bool [stop - start, cols], True where dropped; ``pairs`` are their `_pair_keys`. Meant for one chunk."""
    word = _row_keys(seed, start, stop) + pairs
    _mix_(word, torch.empty_like(word))
    # Unsigned comparison in signed arithmetic: flipping the top bits maps the unsigned order onto the signed one.
    draws = word.bitwise_xor_(_signed(0x80008000)).view(torch.int16)[:, :cols]
    return draws < threshold(prob) - (1 << 15)


def _numpy_mix_(word: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    for bits, factor in ((16, MIX_1), (15, MIX_2)):
        np.bitwise_xor(word, np.right_shift(word, np.uint32(bits), out=scratch), out=word)
        np.multiply(word, np.uint32(factor), out=word)
    return np.bitwise_xor(word, np.right_shift(word, np.uint32(15), out=scratch), out=word)


def _numpy_masked_rows(rows: int, cols: int, seed: int, limit: int, row_offset: int):
    """`masked_rows` for CPU tensors. numpy has unsigned shifts: half the passes of int32 torch, and no dispatcher."""
    halves = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)
    s0 = _numpy_mix_(halves[:1] + np.uint32(GOLDEN), np.empty(1, np.uint32))
    s1 = _numpy_mix_(halves[1:] + s0, np.empty(1, np.uint32))
    pairs = (np.arange((cols + 1) // 2, dtype=np.uint64) * np.uint64(GOLDEN)).astype(np.uint32)
    for part in row_chunks(rows, cols, _CHUNK):
        counter = np.arange(row_offset + part.start, row_offset + part.stop, dtype=np.int64)
        key = counter.astype(np.uint32) ^ s0
        scratch = np.empty_like(key)
        key = _numpy_mix_(key, scratch) + ((counter >> 32).astype(np.uint32) ^ s1)
        word = _numpy_mix_(key, scratch)[:, None] + pairs
        draws = _numpy_mix_(word, np.empty_like(word)).view(np.uint16)[:, :cols]
        yield part, torch.from_numpy(draws < np.uint16(limit))


_thread = threading.local()  # a generator and the masks of the last call

_WARM_UP = 18  # rounds after which every bit of SFC64's state depends on every bit of the seed


def _generated_rows(cols: int, rows: int, seed: int, limit: int, block: int) -> np.ndarray:
    """bool [rows, cols], True where dropped: the first rows of a block."""
    generator = getattr(_thread, "generator", None)
    if generator is None:
        generator = _thread.generator = np.random.SFC64(0)
        _thread.state = generator.state
    # The generator's own seeding procedure (three words, a counter of 1, some rounds thrown away), without the cost of
    # making an object and a SeedSequence for every block.
    state = _thread.state
    state["state"]["state"][:] = (seed & 0xFFFFFFFFFFFFFFFF, block, GOLDEN, 1)
    generator.state = state
    draws = generator.random_raw(_WARM_UP + (rows * cols + 3) // 4)[_WARM_UP:].view(np.uint16)
    return draws[: rows * cols].reshape(rows, cols) < np.uint16(limit)


def _generated_masked_rows(rows: int, cols: int, seed: int, limit: int, row_offset: int):
    """`masked_rows` where no kernel runs beside it.

    The masks of the last call are kept, because a backward pass asks twice in a row: for the input and for A.
    """
    key = (rows, cols, seed, limit, row_offset)
    if getattr(_thread, "key", None) == key:
        yield from _thread.masks
        return
    masks = []
    height = max(1, _CHUNK // max(cols, 1))  # rows that one state of the generator covers
    start, end = row_offset, row_offset + rows
    while start < end:
        block, first = divmod(start, height)
        stop = min((block + 1) * height, end)
        last = stop - block * height
        dropped = torch.from_numpy(_generated_rows(cols, last, seed, limit, block)[first:])
        part = slice(start - row_offset, stop - row_offset)
        masks.append((part, dropped))
        if rows * cols > _REMEMBERED:
            masks.clear()
        yield part, dropped
        start = stop
    _thread.key, _thread.masks = (key, masks) if masks else (None, [])


_forced: bool | None = None


@contextmanager
def device_masks(on: bool = True) -> Iterator[None]:
    """While this is open, CPU tensors get the masks that kernels and compiled code make (``on``), or never do.

    Without it they do where Triton's interpreter runs kernels on CPU tensors.
    """
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


def small_keep(rows: int, cols: int, seed: Tensor | None, prob: float, dtype: torch.dtype) -> Tensor | None:
    """[rows, cols] in ``dtype``: 1 where kept, 0 where dropped. None where the mask is for `masked_rows`: on devices,
    under a compiler, beside the interpreter, and wherever it is worth more than one chunk.

    At such sizes the host decides: one multiplication costs a fraction of a fill by a mask, and of making it anew.
    """
    if not 0 < rows * cols <= _CHUNK or type(seed) is not Tensor or not seed.is_cpu:
        return None
    if torch.compiler.is_compiling() or _hashes_on_cpu():
        return None
    key = (seed.item(), rows, cols, prob, dtype)
    masks = _thread.__dict__.setdefault("small", {})
    keep = masks.get(key)
    if keep is None:
        keep = torch.from_numpy(~_generated_rows(cols, rows, key[0], threshold(prob), 0)).to(dtype)
        masks[key] = keep
        total = _thread.__dict__.get("small bytes", 0) + keep.nbytes
        while total > _SMALL:
            total -= masks.pop(next(iter(masks))).nbytes
        _thread.__dict__["small bytes"] = total
    return keep


def _hashes_on_cpu() -> bool:
    return is_interpreting() if _forced is None else _forced


def masked_rows(rows: int, cols: int, seed: Tensor | None, prob: float, row_offset: int = 0):
    """Yields ``(slice of rows, dropped bool [chunk, cols])`` chunk by chunk; nothing of full size is ever held.

    Raises ``ValueError`` if a mask is needed and there is no seed.
    """
    if seed is None:
        raise ValueError(f"dropout with probability {prob} needs a seed tensor")
    if seed.device.type == "cpu" and type(seed) is Tensor and not torch.compiler.is_compiling():
        make = _numpy_masked_rows if _hashes_on_cpu() else _generated_masked_rows
        yield from make(rows, cols, seed.item(), threshold(prob), row_offset)
        return
    pairs = _pair_keys(cols, seed.device)
    for part in row_chunks(rows, cols, _CHUNK, seed.device):
        yield part, dropped_rows(seed, prob, row_offset + part.start, row_offset + part.stop, cols, pairs)


def drop(x: Tensor, seed: Tensor | None, prob: float, row_offset: int = 0) -> Tensor:
    """``keep_mask * x / (1 - p)`` in x's dtype, for x [M, K]; returns x itself where ``prob`` is 0.

    ``row_offset`` is the global row of x's first row, so that a slice of a batch sees its own part of the mask.
    """
    if threshold(prob) == 0:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = keep_scale(prob)
    for part, dropped in masked_rows(x.shape[0], x.shape[1], seed, prob, row_offset):
        torch.mul(x[part], scale, out=out[part])
        out[part].masked_fill_(dropped, 0)
    return out


def _reference_mix(word: Tensor) -> Tensor:
    low = 0xFFFFFFFF
    word = word ^ (word >> 16)
    word = (word * MIX_1) & low
    word = word ^ (word >> 15)
    # int64 wraps modulo 2**64, which leaves the low 32 bits of the product exact.
    word = (word * MIX_2) & low
    return word ^ (word >> 15)


def _reference(seed: Tensor | None, prob: float, rows: int, cols: int, device: torch.device) -> Tensor:
    """The definition above written out in int64, where every 32-bit word is a plain non-negative number."""
    if threshold(prob) == 0 or seed is None:
        return torch.ones(rows, cols, dtype=torch.bool, device=device)
    low = 0xFFFFFFFF
    row = torch.arange(rows, device=device)
    s0 = _reference_mix(((seed & low) + GOLDEN) & low)
    s1 = _reference_mix((((seed >> 32) & low) + s0) & low)
    key = _reference_mix((row & low) ^ s0)
    key = _reference_mix((key + ((row >> 32) ^ s1)) & low)
    col = torch.arange(cols, device=device)
    word = _reference_mix((key[:, None] + (col // 2 * GOLDEN)[None, :]) & low)
    draw = torch.where(col % 2 == 0, word & 0xFFFF, word >> 16)
    return draw >= threshold(prob)


def _cases():
    for rows, cols, prob, seed in (
        (1, 1, 0.5, 0),
        (3, 5, 0.1, 1),
        (33, 130, 0.3, -7),
        (0, 8, 0.5, 3),
        (64, 64, 1.0, 5),
        (17, 40, 0.0, 6),
        (70, 257, 2e-5, (1 << 40) + 11),
        (129, 300, 0.9999, -(1 << 62)),
    ):
        yield Case(
            f"M{rows}-K{cols}-p{prob}-s{seed}",
            lambda device, a=(rows, cols, prob, seed): {
                "seed": torch.tensor(a[3], dtype=torch.int64, device=device),
                "prob": a[2],
                "rows": a[0],
                "cols": a[1],
                "device": torch.device(device),
            },
        )


def _cost(seed: Tensor | None, prob: float, rows: int, cols: int, device: torch.device) -> Cost:
    return Cost(flops=0.0, bytes=float(rows * cols))


@op(
    reference=_reference,
    module="keep_mask_kernels",
    cases=_cases,
    cost=_cost,
    fake=lambda seed, prob, rows, cols, device: torch.empty(rows, cols, dtype=torch.bool, device=device),
    device_of=lambda seed, prob, rows, cols, device: torch.device(device),
)
def keep_mask(seed: Tensor | None, prob: float, rows: int, cols: int, device: torch.device) -> Tensor:
    """Returns the keep mask, bool [rows, cols]: what every kernel applies for this seed and probability.

    ``seed`` is a 0-d int64 tensor on ``device``; None is allowed where ``prob`` is 0. Raises ``ValueError`` otherwise.
    """
    out = torch.ones(rows, cols, dtype=torch.bool, device=device)
    if threshold(prob):
        for part, dropped in masked_rows(rows, cols, seed, prob):
            torch.logical_not(dropped, out=out[part])
    return out
