"""bitsandbytes' decoding by its portable implementation, for tests that need it right on every CPU.

The AVX-512 kernel of bitsandbytes 0.50.2 reads the scales of other blocks where a block of absmax straddles two rows of
the weight (the row length is no multiple of the blocksize): its result is then further from the quantised weight than
quantising ever is. `test_decode.py` shows it. CUDA kernels and the portable form are right.
"""

import inspect

import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.nn import modules
from torch import Tensor


def evaluate_exactly() -> None:
    """On AVX512-BF16 CPUs bitsandbytes evaluates 4-bit layers in bf16 with rounded scales, whatever dtype they are in:
    no reference for anything. This makes it take the path of all other CPUs."""
    modules.has_avx512bf16 = lambda: False


# without the compiler it is wrapped in, which would compile once per shape
_compute = inspect.unwrap(_dequantize_4bit_compute)


def dequantize_4bit(packed: Tensor, state: functional.QuantState) -> Tensor:
    """What `bitsandbytes.functional.dequantize_4bit` is to return."""
    if packed.is_cuda:
        return functional.dequantize_4bit(packed, state)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = packed.reshape(-1).view(torch.uint8)
    return _compute(
        codes,
        absmax.float(),
        _get_4bit_code(state.quant_type, packed.device),
        state.blocksize,
        state.shape,
        state.dtype,
    )
