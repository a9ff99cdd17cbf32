"""bitsandbytes' 4-bit weights: NF4 and FP4 in blocks, absmax plain or itself quantised (Dettmers et al., arXiv
2305.14314). bitsandbytes is imported only to quantise; reading its weights needs nothing but the tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.rounding import drawn
from peftfast.base.weight import QUANTIZERS, Quantizer, UsualWeight, comes_from, frozen, kept_copy, register_format
from peftfast.rules import boolean, integer, torch_dtype
from peftfast.watch import Place
from peftfast_kernels.decode import Operand, block_scales, dequantize, levels_of

_TYPES = ("nf4", "fp4")

OFFLOADED = (
    "the quantised weight is offloaded and only there while its module runs; load the model without offloading to read "
    "or change it"
)


def is_bnb(thing: object, *names: str) -> bool:
    """Whether `thing` is an instance of one of these bitsandbytes classes."""
    return comes_from(type(thing), "bitsandbytes", *names)


def import_bnb(purpose: str) -> Any:
    """bitsandbytes, or ImportError that says what needs it."""
    try:
        import bitsandbytes
    except ImportError as e:
        raise ImportError(f"{purpose} needs bitsandbytes: pip install 'peftfast[bnb]'") from e
    return bitsandbytes


def decoded(w: Operand, dtype: torch.dtype) -> Tensor:
    """W [N, K] in any dtype, as bitsandbytes decodes it."""
    narrow = dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32
    return dequantize(w._replace(dtype=narrow), narrow).to(dtype)


class BnbWeight(UsualWeight):
    """What is alike in bitsandbytes' formats, of linear layers and of embeddings."""

    draws = True

    @property
    def shape(self) -> tuple[int, int]:
        m = self.module
        return (m.out_features, m.in_features) if hasattr(m, "out_features") else (m.num_embeddings, m.embedding_dim)

    @torch.no_grad()
    def restore(self, snapshot: tuple[Tensor, Any]) -> None:
        self._write(*snapshot)


@register_format
class Bnb4Weight(BnbWeight):
    """`bitsandbytes.nn.Linear4bit` and `Embedding4bit`: two codes per byte, kept by a Params4bit with a quant_state.

    FSDP and others replace the Params4bit by a plain Parameter; the state is then taken from the module. The state is
    read at every use, because bitsandbytes moves, repacks and replaces it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._checked: tuple[Any, int] | None = None
        if not module.weight.is_meta:
            self._state()

    @classmethod
    def claims(cls, module: nn.Module) -> bool:
        return is_bnb(module, "Linear4bit", "Embedding4bit") or is_bnb(getattr(module, "weight", None), "Params4bit")

    @property
    def quantization(self) -> str:
        return getattr(self._find_state(), "quant_type", None) or _TYPES[0]

    @property
    def fusable_modules(self) -> tuple[type[nn.Module], ...]:
        """The module's own class, if its forward is Linear4bit's: a plain product, as `operand` tells."""
        for c in type(self.module).__mro__:
            if "forward" in c.__dict__:
                return (type(self.module),) if c.__name__ == "Linear4bit" else ()
        return ()

    @property
    def compute_dtype(self) -> torch.dtype:
        m = self.module
        # None: not decided yet, the first input decides
        return getattr(m, "compute_dtype", None) or getattr(m, "dtype", None) or torch.get_default_dtype()

    # ---- the state ---------------------------------------------------------------------------------------------------
    def _find_state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None)
        return getattr(self.module, "quant_state", None) if state is None else state

    def _state(self) -> Any:
        """The quant_state, checked against the packed bytes.

        Raises:
            ValueError: it is missing or does not fit.
        """
        state, weight = self._find_state(), self.module.weight
        seen = (state, weight.numel())
        known = self._checked is not None and self._checked[0] is state and self._checked[1] == seen[1]
        if not known or weight.is_meta:
            problem = _problem(state, weight, self.shape)
            if problem:
                raise ValueError(f"{self.name or type(self.module).__name__}: {problem}")
            self._checked = seen
        keep_layout(self.module)
        if getattr(state, "packing_format_for_cpu", False):
            self._undo_cpu_packing(state)
        return state

    def _undo_cpu_packing(self, state: Any) -> None:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        scales = state.absmax.t().reshape(-1).float()
        packed, state = _convert_weight_packed_for_cpu_inverse(self.module.weight.data, state)
        if not state.nested:
            state.absmax = scales  # which bitsandbytes leaves transposed
        self.module.weight.data = packed

    def _is_turned(self, state: Any) -> bool:
        """Quantised from W transposed, [K, N], as old bitsandbytes allowed."""
        return tuple(state.shape) != self.shape

    # ---- reading -----------------------------------------------------------------------------------------------------
    def operand(self, x: Tensor, autocast: torch.dtype | None) -> Operand | None:
        dtype = self._product_dtype(x, autocast)
        if dtype is None:
            return None
        state = self._state()
        return None if self._is_turned(state) else self._operand(state, dtype)

    def lasting(self, w: Operand) -> list[Place] | None:
        own, state = self.module, self._find_state()
        weight = own._parameters.get("weight")
        if weight is None or not w.tensors[0].is_cuda:  # on a CPU, bitsandbytes repacks weights where they are
            return None
        places = [(own.__dict__, "compute_dtype")]
        places += [(one.__dict__, "quant_state") for one in (weight, own)]  # either may have it
        places += [(vars(one), name) for one in (state, state.state2) if one is not None for name in vars(one)]
        return [(own._parameters, "weight", weight), *[(place, key, place.get(key)) for place, key in places]]

    def readable(self) -> Operand:
        state = self._state()
        if self._is_turned(state):
            weight = self.dense()
            return Operand("dense", [weight], self.shape, weight.dtype)
        return self._operand(state, state.dtype)

    def _operand(self, state: Any, dtype: torch.dtype) -> Operand:
        shape = (state.shape[0], state.shape[1])
        packed = self.module.weight
        if type(packed) is not nn.Parameter:
            packed = packed.data  # not a Params4bit any more, which kernels and autograd could not take
        if state.nested:
            inner = state.state2
            tensors = [packed, state.absmax, inner.code, inner.absmax, state.offset]
            return Operand(state.quant_type, tensors, shape, dtype, state.blocksize, inner.blocksize)
        absmax = state.absmax if state.absmax.dtype == torch.float32 else state.absmax.float()
        return Operand(state.quant_type, [packed, absmax], shape, dtype, state.blocksize)

    def _product_dtype(self, x: Tensor, autocast: torch.dtype | None) -> torch.dtype | None:
        m = self.module
        if not m.compute_type_is_set:
            m.set_compute_type(x)  # what the module's own first forward would do
            m.compute_type_is_set = True
        dtype = x.dtype if m.compute_dtype is None else m.compute_dtype
        if dtype != x.dtype:
            return None  # input and output are cast around the product
        return dtype if autocast in (None, dtype) else None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        state = self._state()
        weight = decoded(self._operand(state, state.dtype), dtype or state.dtype)
        return weight.t().contiguous() if self._is_turned(state) else weight

    # ---- writing -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        bnb = import_bnb("Writing to a 4-bit weight")
        own, state = self.module.weight, self._state()
        exact = weight.to(own.device, torch.float32)
        packed, new = bnb.functional.quantize_4bit(
            (exact.t() if self._is_turned(state) else exact).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=own.dtype,
        )
        new.dtype, new.shape = state.dtype, state.shape
        self._write(packed.reshape(own.shape), new)

    @torch.no_grad()
    def assign_stochastic(self, weight: Tensor, generator: torch.Generator) -> None:
        own, state = self.module.weight, self._state()
        scales = block_scales(self._operand(state, torch.float32)).repeat_interleave(state.blocksize)
        exact = weight.to(own.device, torch.float32)
        flat = (exact.t() if self._is_turned(state) else exact).reshape(-1)
        levels, order = torch.tensor(levels_of(state.quant_type), device=own.device).sort()
        distinct = levels.diff(prepend=levels.new_full((1,), -math.inf)) > 0  # fp4 has two zeros
        levels, order = levels[distinct], order[distinct].to(torch.uint8)
        shares = torch.where(scales > 0, 1.0 / scales, 0.0)[: flat.numel()].mul_(flat)
        codes = order[drawn(shares, levels, generator).to(torch.int32)]
        bytes_ = own.data.reshape(-1).view(torch.uint8).clone()
        codes = torch.nn.functional.pad(codes, (0, 2 * bytes_.numel() - codes.numel()))
        bytes_.copy_(codes[0::2].bitwise_left_shift(4).bitwise_or_(codes[1::2]))
        own.data.copy_(bytes_.view(own.dtype).view(own.shape))

    def snapshot(self, host: bool = False) -> tuple[Tensor, Any]:
        return kept_copy(self.module.weight.data, host), _map_state(self._state(), lambda t: kept_copy(t, host))

    def _write(self, packed: Tensor, state: Any) -> None:
        """Parameter and quant_state keep their identity and their memory: tied modules, captured graphs and whoever
        else holds them go on with the new values."""
        own = self._state()
        self.module.weight.data.copy_(packed)
        _copy_state(own, state)
        if hasattr(self.module, "quant_state"):
            self.module.quant_state = own  # a copied module has a second one, which would be out of date now


def _problem(state: Any, weight: Tensor, shape: tuple[int, int]) -> str | None:
    """What is wrong with a 4-bit weight of this shape, if anything."""
    n, k = shape
    if weight.is_meta:
        return OFFLOADED
    if state is None:
        if weight.is_floating_point() and tuple(weight.shape) == shape and not getattr(weight, "bnb_quantized", False):
            return (
                "the 4-bit module has not been quantised yet, its weight is still dense; move the model to its device "
                "(model.to(device)) before adding adapters"
            )
        return (
            "the quant_state of the 4-bit weight is missing, on the Parameter and on the module. Without it the packed "
            "bytes mean nothing; load the model again, or restore `weight.quant_state`"
        )
    if state.quant_type not in _TYPES:
        return f"quant_state has quant_type {state.quant_type!r}, known are {', '.join(_TYPES)}"
    stored = None if state.shape is None else tuple(state.shape)
    if stored not in (shape, shape[::-1]):
        return f"quant_state is for a weight of shape {stored}, the module is [{n}, {k}]"
    size, needed = weight.numel() * weight.element_size(), (n * k + 1) // 2
    if not needed <= size < needed + weight.element_size():
        cast = any(needed <= weight.numel() * width < needed + width for width in (1, 2, 4))
        why = f"; they were cast to {weight.dtype}, as FSDP2 does if its param_dtype is not the quant_storage"
        return f"[{n}, {k}] in 4 bits is {needed} bytes, the weight holds {size}{why if cast else ''}"
    blocks = -(-n * k // state.blocksize)
    if state.absmax.numel() != blocks:
        return f"quant_state has {state.absmax.numel()} scales, blocks of {state.blocksize} make {blocks}"
    if state.nested:
        inner = state.state2
        if state.offset is None or inner.code is None or inner.code.numel() != 256:
            return "quant_state is nested, but offset or code table of its scales is missing"
        outer = -(-blocks // inner.blocksize)
        if inner.absmax.numel() != outer:
            return f"quant_state has {inner.absmax.numel()} outer scales, {blocks} scales make {outer}"
    if state.absmax.device != weight.device:
        return f"the weight is on {weight.device}, its quant_state on {state.absmax.device}"
    return None


def _map_state(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A new QuantState the tensors of this one, and of its nested state, after `function`."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(new, name, function(value))
        elif name == "state2" and value is not None:
            setattr(new, name, _map_state(value, function))
    return new


def _copy_state(own: Any, new: Any) -> None:
    for name, value in vars(new).items():
        mine = getattr(own, name, None)
        if isinstance(value, Tensor) and isinstance(mine, Tensor) and mine.shape == value.shape:
            mine.copy_(value)
        elif name == "state2" and value is not None:
            _copy_state(mine, value)
        else:
            setattr(own, name, value)


def keep_layout(module: nn.Module) -> None:
    """On CPUs with AVX-512, bitsandbytes repacks a weight at the first forward without gradients and rounds its scales
    to bf16 (and fails where rows are no multiple of 64). A weight that adapters are trained against stays as it is."""
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.support_avx512bf16_for_cpu = False


# ---- quantising ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def _quantised(
    quant_type: str,
    weight: Tensor,
    bias: Tensor | None,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    blocksize: int = 64,
    quant_storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """A Linear4bit with `weight` [N, K] quantised where it is."""
    bnb = import_bnb(f"quantize={quant_type!r}")
    source = weight.detach().contiguous()
    if source.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        source = source.float()
    packed, state = bnb.functional.quantize_4bit(
        source,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=quant_storage,
    )
    module = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False,
        compute_dtype=compute_dtype or source.dtype, compress_statistics=double_quant, quant_type=quant_type,
        quant_storage=quant_storage, device="meta",
    )  # fmt: skip
    module.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=blocksize, compress_statistics=double_quant,
        quant_type=quant_type, quant_storage=quant_storage, module=module, bnb_quantized=True,
    )  # fmt: skip
    module.quant_state = state
    keep_layout(module)  # the base may run before it has an adapter
    module.bias = frozen(bias)
    return module


def _config(
    quant_type: str,
    *,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    blocksize: int = 64,
    quant_storage: torch.dtype = torch.uint8,
) -> Mapping[str, Any]:
    """Of a Linear4bit; there is no name for its `blocksize`."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": quant_storage,
    }


_OPTIONS = {
    "compute_dtype": torch_dtype(floating=True),
    "double_quant": boolean(),
    "blocksize": integer(1),
    "quant_storage": torch_dtype(),
}

for _type in _TYPES:
    QUANTIZERS[_type] = Quantizer(partial(_quantised, _type), partial(_config, _type), _OPTIONS)
