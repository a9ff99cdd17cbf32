"""What tools/aot.py compiles: one `Variant` per kernel configuration that a launcher can ask for on a chip.

Each ``*_kernels.py`` module declares ``variants(chip)`` beside its launchers: launches as these plan them, with the
dtypes of their pointers, which a `Launch` leaves open.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from peftfast_kernels.launch import Launch

MODULES = (
    "keep_mask_kernels",
    "lora_down_kernels",
    "lora_expand_kernels",
    "lora_gemm_kernels",
    "lora_grad_kernels",
    "decode_kernels",
    "feature_scale_kernels",
    "gated_kernels",
    "row_norm_kernels",
    "lora_routed_grad_kernels",
    "lora_routed_kernels",
    "dora_add_kernels",
    "siblings_kernels",
    "siblings_gemm_kernels",
)

# The matrix instructions a variant must contain: none, any the chip has, or the chip's largest (wgmma, tcgen05, MFMA).
NO_MATRIX, ANY_MATRIX, BIG_MATRIX = "none", "any", "big"

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Sizes of an ordinary layer: what is launched on them is what ordinary models launch.
ROWS, WIDTH = 8192, 4096


class Source(NamedTuple):
    """What a compiler is given of a launch: types, constants and hints of its arguments."""

    signature: dict[str, str | tuple[str, ...]]
    constants: dict[tuple[int, ...], Any]  # by the argument's place, and the place in it where it is a tuple
    hints: dict[tuple[int, ...], list]


class Variant(NamedTuple):
    """One ahead-of-time compilation of a kernel."""

    name: str
    launch: Launch
    pointers: Mapping[str, str | tuple[str, ...]]  # pointer argument -> element type, "bf16"
    matrix: str = NO_MATRIX
    weights: int = 0  # weights decoded per main-loop iteration; their instruction count is limited
    quick: bool = False  # part of the quick subset

    @property
    def options(self) -> dict[str, Any]:
        """What the launch asks of the compiler."""
        return {name: v for name, v in self.launch.arguments.items() if name not in self.launch.kernel.arg_names}

    @property
    def source(self) -> Source:
        """Arguments as Triton's own launch would look at them: 1 and constexprs are compiled in, and of pointers and
        numbers it is known whether they are multiples of 16."""
        found = Source({}, {}, {})
        for i, parameter in enumerate(self.launch.kernel.params):
            name = parameter.name
            given = self.pointers[name] if name in self.pointers else self.launch.arguments[name]
            each = isinstance(given, tuple) and not parameter.is_constexpr
            kinds = []
            for j, value in enumerate(given if each else (given,)):
                place = (i, j) if each else (i,)
                kind = f"*{value}" if name in self.pointers else "fp32" if isinstance(value, float) else "i32"
                if parameter.is_constexpr or value == 1 and kind == "i32":
                    kind, found.constants[place] = "constexpr", value
                elif name in self.pointers or kind == "i32" and value % 16 == 0:
                    found.hints[place] = [["tt.divisibility", 16]]
                kinds.append(kind)
            found.signature[name] = tuple(kinds) if each else kinds[0]
        return found
