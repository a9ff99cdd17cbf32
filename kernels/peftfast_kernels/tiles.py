"""Device functions shared by the kernels: dropout masks, rounding, tuples, program order.

Offsets are int64 wherever a row index enters, because an activation may hold more than 2**31 elements. ``INTERP`` is
true in Triton's interpreter, whose bf16 arithmetic is wrong (products of raw bits, truncating casts): operands are
then upcast to fp32 on load and rounded to bf16 by hand on store. Loops over matrix products take a step where there is
nothing to add up, too (``tl.maximum``): where a loop may take none, ptxas waits for every wgmma by itself.
"""

import triton
import triton.language as tl


@triton.jit
def mix(word):
    """The 32-bit permutation of keep_mask.py. word: uint32 of any shape."""
    word = word ^ (word >> 16)
    word = word * 0x21F0AAAD
    word = word ^ (word >> 15)
    word = word * 0xD35A2D97
    return word ^ (word >> 15)


@triton.jit
def row_keys(seed_ptr, rows):
    """The hash of (seed, row); rows: int64 [BM], seed_ptr: one int64."""
    seed = tl.load(seed_ptr)
    s0 = mix(seed.to(tl.uint32) + 0x9E3779B9)
    s1 = mix((seed >> 32).to(tl.uint32) + s0)
    key = mix(rows.to(tl.uint32) ^ s0)
    return mix(key + ((rows >> 32).to(tl.uint32) ^ s1))


@triton.jit
def keep_tile(keys, first, cols, threshold):
    """Keep mask bool [BM, BN] of the rows with these keys [BM] and the columns `first` + cols; first: even, cols: int32
    [BN].

    Compilers make one word for two neighbours, where they know that a thread has both. They would not, were `first`
    added to the columns in a loop: what its loads have of it, too, goes from step to step in registers.
    """
    keys += tl.cast(first >> 1, tl.uint32) * 0x9E3779B9
    word = mix(keys[:, None] + (cols >> 1).to(tl.uint32)[None, :] * 0x9E3779B9)
    half = word << ((cols & 1) * 16 ^ 16).to(tl.uint32)[None, :]
    return half >= tl.cast(threshold, tl.uint32) << 16


@triton.jit
def operand(value, INTERP: tl.constexpr):
    """A loaded tile as a dot operand: itself on a GPU, fp32 in the interpreter."""
    if INTERP:
        value = value.to(tl.float32)
    return value


@triton.jit
def narrow(value, dtype: tl.constexpr, INTERP: tl.constexpr):
    """An fp32 tile rounded to nearest even in ``dtype``."""
    if INTERP:
        if dtype == tl.bfloat16:
            bits = value.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            bits = tl.where(value == value, rounded, bits)  # the carry must not turn a NaN into something else
            value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def load_tile(y_ptr, rows, cols, M, O, stride_ym, stride_yo):
    """y [M, O] at these rows and columns, zeros outside. What is added to a product of factors is asked for before it:
    a program that computes little waits for memory, and so waits once."""
    inside = (rows[:, None] < M) & (cols[None, :] < O)
    return tl.load(y_ptr + rows[:, None] * stride_ym + cols[None, :].to(tl.int64) * stride_yo, mask=inside, other=0.0)


@triton.jit
def store_tile(acc, out_ptr, rows, cols, M, O, INTERP: tl.constexpr):
    """An fp32 tile as these rows and columns of out [M, O] contiguous."""
    inside = (rows[:, None] < M) & (cols[None, :] < O)
    tl.store(out_ptr + rows[:, None] * O + cols[None, :], narrow(acc, out_ptr.dtype.element_ty, INTERP), mask=inside)


@triton.jit
def pick(values, which):
    """values[which] of a tuple of pointers or of numbers of one type."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        if which == i:
            chosen = values[i]
    return chosen


@triton.jit
def owner(tile, counts):
    """(which, first): the member of a group whose tiles, counted one member after another, `tile` is among, and the
    number of its first tile. counts: a tuple of int32."""
    which = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    end = tl.zeros((), tl.int32)
    for i in tl.static_range(1, len(counts)):
        end += counts[i - 1]
        if tile >= end:
            which = tl.full((), i, tl.int32)
            first = end
    return which, first


@triton.jit
def tile_counts(sizes, BLOCK: tl.constexpr):
    """The number of tiles of each size, as a tuple."""
    counts = ()
    for i in tl.static_range(len(sizes)):
        counts = counts + (tl.cdiv(sizes[i], BLOCK),)
    return counts


@triton.jit
def padded(sizes, BLOCK: tl.constexpr):
    """Each size rounded up to whole blocks, as a tuple; a single one stays as it is."""
    if len(sizes) == 1:
        spans = sizes
    else:
        spans = ()
        for i in tl.static_range(len(sizes)):
            spans = spans + (tl.cdiv(sizes[i], BLOCK) * BLOCK,)
    return spans


@triton.jit
def total(counts):
    """The sum of a tuple."""
    value = tl.zeros((), tl.int32)
    for i in tl.static_range(len(counts)):
        value += counts[i]
    return value


@triton.jit
def grouped_order(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of program pid: GROUP row tiles share their column tiles while those are in L2."""
    per_group = GROUP * tiles_n
    first = pid // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


@triton.jit
def exact_product(left, right, acc, PRECISION: tl.constexpr, INTERP: tl.constexpr):
    """acc + left right, right fp32 and left of any dtype: as good as in fp32.

    A bfloat16 left is multiplied as it is, by the three parts of right that hold its 24 bits; as fp32 it would be taken
    apart as well, and go through shared memory in twice as many bytes.
    """
    if left.dtype == tl.bfloat16 and right.dtype == tl.float32 and not INTERP:
        high = right.to(tl.bfloat16)
        rest = tl.where(right == high, 0.0, right - high)  # of inf there is none
        middle = rest.to(tl.bfloat16)
        sum = tl.dot(left, (rest - middle).to(tl.bfloat16))
        sum = tl.dot(left, middle, sum)
        acc += tl.dot(left, high, sum)  # rounded once a step, not with every instruction
    else:
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION)
    return acc
