"""What tools/aot.py compiles: one `Variant` per kernel configuration that a launcher can ask for on a chip.

Each ``*_kernels.py`` module declares ``variants(chip)`` beside its launchers, built from the same tile tables.
"""

from typing import Any, NamedTuple

MODULES = (
    "keep_mask_kernels",
    "lora_down_kernels",
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


class Variant(NamedTuple):
    """One ahead-of-time compilation of a kernel."""

    name: str
    kernel: Any  # the @triton.jit function
    pointers: dict[str, str]  # pointer argument -> element type, "bf16"
    constexprs: dict[str, Any]  # constexpr arguments and arguments specialised to a constant
    warps: int
    stages: int = 1
    matrix: str = NO_MATRIX
    fp_fusion: bool = True
    weights: int = 0  # weights decoded per main-loop iteration; their instruction count is limited
    quick: bool = False  # part of the quick subset
    tuples: tuple[str, ...] = ()  # arguments that are tuples, of `members` values each
    members: int = 0

    @property
    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """Argument name -> Triton type. Pointers are listed, scales are fp32, everything else is a 32-bit integer."""
        types = {}
        for name in self.kernel.arg_names:
            if name in self.constexprs:
                kind = "constexpr"
            elif name in self.pointers:
                kind = f"*{self.pointers[name]}"
            else:
                kind = "fp32" if name.endswith(("scale", "scales")) else "i32"
            types[name] = (kind,) * self.members if name in self.tuples else kind
        return types
