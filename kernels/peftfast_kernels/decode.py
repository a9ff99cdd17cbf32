"""How a stored weight is read: one `Decoder` per storage format, and the op `dequantize` that materialises [N, K].

``Operand.tensors`` by format (blocks run over the flattened [N, K] weight, so a block may straddle rows):

========= =============================================================================================================
dense     weight [N, K]
dense_t   weight stored [K, N] (transformers' Conv1D)
nf4, fp4  packed uint8 (two codes per byte, the first element in the high nibble, odd sizes leave a spare nibble), then
          absmax fp32 [blocks]; or, nested, absmax uint8 [blocks], code fp32 [256], absmax2 fp32 [ceil(blocks / 256)],
          offset fp32 []: absmax = code[absmax] * absmax2 + offset, each step rounded to fp32
int8      rows int8 [N, K], scale fp32 [N]: q * scale * (1 / 127), each step rounded to fp32
========= =============================================================================================================

The decoded value is rounded once to ``Operand.dtype``, as bitsandbytes does (NF4: Dettmers et al., arXiv 2305.14314;
LLM.int8: arXiv 2208.07339).
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from peftfast_kernels.op import Case, Cost, lasting, op, register_operand

# The codebooks are data of the file formats. NF4: quantiles of a normal distribution, arXiv 2305.14314 appendix E.
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# FP4: sign, two exponent bits, one mantissa bit, divided by its largest value 12.
FP4_CODE = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip

INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it

# fp32 scratch of the plain-torch 4-bit path, in elements: small enough to stay in cache, large enough to vectorise.
_CHUNK = 1 << 18


class Operand(NamedTuple):
    """A weight [N, K] as kernels see it. A name, not a function, so that it crosses `torch.library` and caches."""

    format: str  # key of DECODERS
    tensors: list[Tensor]  # what the format's decoder expects, in its order
    shape: tuple[int, int]  # (N, K), whatever the storage looks like
    dtype: torch.dtype  # decoded values are rounded to this dtype
    block: int = 64  # elements per absmax; 4-bit formats only
    nested_block: int = 256  # absmax entries per absmax2; nested 4-bit only

    @property
    def device(self) -> torch.device:
        """Where the stored tensors live."""
        return self.tensors[0].device

    @property
    def nested(self) -> bool:
        """Whether the absmax of a 4-bit format is itself quantised."""
        return len(self.tensors) == 5


register_operand(
    Operand,
    {
        "format": str,
        "tensors": list[Tensor],
        "shape": list[int],
        "dtype": torch.dtype,
        "block": int,
        "nested_block": int,
    },
)


class Decoder(NamedTuple):
    """One storage format, host side; `TILE_FUNCTIONS` in ``decode_kernels.py`` has its device function."""

    reference: Callable[[Operand], Tensor]  # -> [N, K], rounded to w.dtype, the definition written out
    stored: Callable[[Operand], Tensor]  # -> [N, K] (or [K, N] if transposed) in w.dtype; may alias the storage
    transposed: bool = False


DECODERS: dict[str, Decoder] = {}


def decoder_of(w: Operand) -> Decoder:
    """The decoder of an operand. Raises ``ValueError`` for an unknown format."""
    try:
        return DECODERS[w.format]
    except KeyError:
        raise ValueError(f"unknown storage format {w.format!r}; one of {', '.join(sorted(DECODERS))}") from None


def dense(weight: Tensor) -> Operand:
    """An operand over a plain weight [N, K]."""
    return Operand("dense", [weight], (weight.shape[0], weight.shape[1]), weight.dtype)


def dense_t(weight: Tensor) -> Operand:
    """An operand over a weight stored transposed, [K, N]."""
    return Operand("dense_t", [weight], (weight.shape[1], weight.shape[0]), weight.dtype)


def weight_nk(w: Operand, dtype: torch.dtype) -> Tensor:
    """W [N, K] in ``dtype`` for a torch product; a view of the storage where the format allows it."""
    stored, transposed = _stored(w, dtype)
    return stored.t() if transposed else stored


def weight_again(w: Operand, dtype: torch.dtype) -> Tensor:
    """`weight_nk` in a backward pass, where the forward pass has decoded the same: what one operator makes of the same
    tensors, a compiler makes once and keeps."""
    if torch.compiler.is_compiling() and w.format in ("nf4", "fp4"):
        packed, *scales = w.tensors
        w = w._replace(tensors=[packed.reshape(1, -1), *scales])
    return weight_nk(w, dtype)


def weight_kn(w: Operand, dtype: torch.dtype) -> Tensor:
    """W transposed, [K, N], in ``dtype`` for a torch product; a view of the storage where the format allows it."""
    stored, transposed = _stored(w, dtype)
    return stored if transposed else stored.t()


def _stored(w: Operand, dtype: torch.dtype) -> tuple[Tensor, bool]:
    decoder = decoder_of(w)
    if decoder.stored is _dense_stored:
        tensor = w.tensors[0]
        return tensor if tensor.dtype is dtype else tensor.to(dtype), decoder.transposed
    return dequantize(w, dtype), decoder.transposed


# -- formats ----------------------------------------------------------------------------------------------------------


def _dense_stored(w: Operand) -> Tensor:
    return w.tensors[0]


def _dense_reference(w: Operand) -> Tensor:
    return w.tensors[0].to(w.dtype)


def _dense_t_reference(w: Operand) -> Tensor:
    return w.tensors[0].t().to(w.dtype)


def _code(w: Operand) -> Tensor:
    return torch.tensor(levels_of(w.format), dtype=torch.float32, device=w.device)


# With dynamic shapes a compiler would take the numbers of a global table for inputs that may change.
def levels_of(format: str) -> tuple[float, ...]:
    return NF4_CODE if format == "nf4" else FP4_CODE


# What torch.compiler.assume_constant_result does, without importing the compiler (seconds, and Triton with it).
levels_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def block_scales(w: Operand) -> Tensor:
    """absmax fp32 [blocks] of a 4-bit operand, un-nested if need be."""
    if not w.nested:
        return w.tensors[1]
    _, codes, table, absmax2, offset = w.tensors
    codes = codes.reshape(-1)
    outer = absmax2
    if absmax2.numel() > 1:  # otherwise a small weight, where every operation shows
        outer = absmax2.repeat_interleave(w.nested_block)[: codes.numel()]
    # In two steps on purpose: the product is rounded to fp32 before the offset is added.
    return torch.index_select(table, 0, codes.to(torch.int32)).mul_(outer).add_(offset)


def packed_bytes(w: Operand) -> Tensor:
    """The packed codes as flat uint8, whatever dtype they are stored in (FSDP stores them as the model's dtype)."""
    return w.tensors[0].reshape(-1).view(torch.uint8)


def _four_bit_reference(w: Operand) -> Tensor:
    packed = packed_bytes(w).to(torch.int64)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: w.shape[0] * w.shape[1]]
    scales = block_scales(w).repeat_interleave(w.block)[: codes.numel()]
    return (_code(w)[codes] * scales).reshape(w.shape).to(w.dtype)


_pairs_cache: dict[tuple[str, torch.device], Tensor] = {}


def _pairs(w: Operand) -> Tensor:
    """int64 [256]: the two fp32 values of every byte, as one word: gathering rows of two takes twice as long."""
    key = (w.format, w.device)
    if key not in _pairs_cache:
        code = torch.tensor(levels_of(w.format), dtype=torch.float32, device="cpu")
        _pairs_cache[key] = lasting(_made_pairs(code), w.device)
    return _pairs_cache[key]


def _made_pairs(code: Tensor) -> Tensor:
    """The same of a table fp32 [16]."""
    return torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1).view(torch.int64).reshape(256)


def _four_bit_stored(w: Operand) -> Tensor:
    if _has_compiled_decoder(w):
        return _compiled(w)
    if torch.compiler.is_compiling():  # inductor's loops on a CPU leave out what follows the last whole block
        return dequantize.opaque(w, w.dtype)
    return _four_bit_torch(w)


def _compiled(w: Operand) -> Tensor:
    """By bitsandbytes' C++ kernel for CPUs, which takes a third of what torch's operations take."""
    library = torch.ops.bitsandbytes
    scales = w.tensors[1]
    if w.nested:
        _, codes, table, absmax2, offset = w.tensors
        scales = library.dequantize_blockwise(codes, absmax2, table, w.nested_block, torch.float32).add_(offset)
    return library.dequantize_4bit(packed_bytes(w), scales, w.block, w.format, list(w.shape), w.dtype)


_compiled_agrees: dict[tuple, bool] = {}


def _has_compiled_decoder(w: Operand) -> bool:
    """Whether bitsandbytes is loaded and decodes this weight bit for bit as `_four_bit_reference` defines it. On CPUs
    with AVX-512 it does not where a block straddles rows; whatever else it does is tried once for every block size."""
    if w.device.type != "cpu" or w.shape[1] % w.block or "bitsandbytes" not in sys.modules:
        return False
    if type(w.tensors[0]) not in (Tensor, torch.nn.Parameter) or w.nested_block != 256:
        return False
    return _agrees(w.format, w.dtype, w.block, w.nested)


def _agrees(format: str, dtype: torch.dtype, block: int, nested: bool) -> bool:
    key = (format, dtype, block, nested)
    if key not in _compiled_agrees:
        sample = random_operand(format, 160, 2 * block, dtype, "cpu", block, nested)  # two nested blocks
        try:
            _compiled_agrees[key] = torch.equal(_compiled(sample), _four_bit_reference(sample))
        except Exception:  # no such operator, no such dtype, no library for this machine
            _compiled_agrees[key] = False
    return _compiled_agrees[key]


# As `levels_of`: a graph would depend on what has been tried.
_agrees._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _four_bit_torch(w: Operand) -> Tensor:
    numel = w.shape[0] * w.shape[1]
    pairs, packed, scales = _pairs(w), packed_bytes(w), block_scales(w)
    out = torch.empty(numel, dtype=w.dtype, device=w.device)

    def values(start: int, stop: int) -> Tensor:
        return torch.index_select(pairs, 0, packed[start // 2 : (stop + 1) // 2].to(torch.int32)).view(torch.float32)

    whole = numel // w.block * w.block
    step = max(w.block, _CHUNK // w.block * w.block)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        factor = scales[start // w.block : stop // w.block, None]
        torch.mul(values(start, stop).view(-1, w.block), factor, out=out[start:stop].view(-1, w.block))
    if whole < numel:
        torch.mul(values(whole, numel)[: numel - whole], scales[whole // w.block], out=out[whole:])
    return out.view(w.shape)


def _int8_reference(w: Operand) -> Tensor:
    rows, scale = w.tensors
    return ((rows * scale.view(-1, 1)) * INT8_STEP).to(w.dtype)


def _int8_stored(w: Operand) -> Tensor:
    rows, scale = w.tensors[0], w.tensors[1].view(-1, 1)
    # a CPU multiplies numbers of two kinds slowly
    values = rows.to(scale.dtype).mul_(scale) if rows.is_cpu else rows * scale
    if w.dtype is values.dtype:
        return values.mul_(INT8_STEP)
    # The second product may be written straight into the narrow dtype: it is computed in fp32 and rounded once.
    return torch.mul(values, INT8_STEP, out=torch.empty(rows.shape, dtype=w.dtype, device=rows.device))


DECODERS["dense"] = Decoder(_dense_reference, _dense_stored)
DECODERS["dense_t"] = Decoder(_dense_t_reference, _dense_stored, transposed=True)
DECODERS["nf4"] = Decoder(_four_bit_reference, _four_bit_stored)
DECODERS["fp4"] = Decoder(_four_bit_reference, _four_bit_stored)
DECODERS["int8"] = Decoder(_int8_reference, _int8_stored)


# -- test operands ----------------------------------------------------------------------------------------------------


def random_operand(
    format: str, n: int, k: int, dtype: torch.dtype, device: str, block: int = 64, nested: bool = False, seed: int = 0
) -> Operand:
    """A random operand of a format, without any quantiser: every code and scale pattern is a legal weight."""
    g = torch.Generator().manual_seed(seed)
    scale = k**-0.5
    if format in ("dense", "dense_t"):
        weight = (torch.randn(n, k, generator=g) * scale).to(dtype)
        weight = weight if format == "dense" else weight.t().contiguous()
        return Operand(format, [weight.to(device)], (n, k), dtype)
    if format == "int8":
        rows = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
        return Operand(format, [rows.to(device), (torch.rand(n, generator=g) * 3 * scale).to(device)], (n, k), dtype)
    blocks = -(-n * k // block)
    packed = torch.randint(0, 256, ((n * k + 1) // 2, 1), generator=g, dtype=torch.uint8)
    if not nested:
        tensors = [packed, torch.rand(blocks, generator=g) * 3 * scale]
    else:
        tensors = [
            packed,
            torch.randint(0, 256, (blocks,), generator=g, dtype=torch.uint8),
            torch.linspace(-1, 1, 256),
            torch.rand(-(-blocks // 256), generator=g) * scale,
            torch.tensor(2 * scale),
        ]
    return Operand(format, [tensor.to(device) for tensor in tensors], (n, k), dtype, block)


def _reference(w: Operand, dtype: torch.dtype) -> Tensor:
    return decoder_of(w).reference(w).to(dtype)


def _cases():
    for format in DECODERS:
        for n, k in ((1, 1), (7, 9), (40, 96), (33, 130)):
            for block, nested in ((64, False), (32, True)) if format.endswith("4") else ((64, False),):
                yield Case(
                    f"{format}-N{n}-K{k}-block{block}{'-nested' * nested}",
                    lambda device, a=(format, n, k), b=block, c=nested: {
                        "w": random_operand(*a, torch.float32, device, b, c),
                        "dtype": torch.float32,
                    },
                )


def _cost(w: Operand, dtype: torch.dtype) -> Cost:
    stored = sum(tensor.numel() * tensor.element_size() for tensor in w.tensors)
    return Cost(flops=0.0, bytes=float(stored + w.shape[0] * w.shape[1] * dtype.itemsize))


def _worth_a_kernel(w: Operand, dtype: torch.dtype) -> bool:
    return decoder_of(w).stored is not _dense_stored  # a dense weight is a copy, which torch does as well


@op(
    reference=_reference,
    module="decode_kernels",
    cases=_cases,
    cost=_cost,
    fake=lambda w, dtype: w.tensors[0].new_empty(w.shape, dtype=dtype),
    accepts=_worth_a_kernel,
)
def dequantize(w: Operand, dtype: torch.dtype) -> Tensor:
    """Returns W [N, K] in ``dtype``, a fresh contiguous tensor, bit for bit what bitsandbytes decodes.

    Values are rounded to ``w.dtype`` first, then converted. Raises ``ValueError`` for an unknown format.
    """
    decoder = decoder_of(w)
    stored = decoder.stored(w)
    if decoder.transposed:
        stored = stored.t()
    if stored.dtype != dtype or decoder.stored is _dense_stored:
        stored = torch.empty(w.shape, dtype=dtype, device=w.device).copy_(stored)
    return stored
