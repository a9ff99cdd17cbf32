"""Small functions of PEFT's that other libraries import from its modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfast.base.bnb4 import import_bnb, is_bnb
from peftfast.base.dense import DenseWeight
from peftfast.base.weight import base_weight
from peftfast.config import PeftConfig
from peftfast.wrapping.patterns import END
from peftfast.wrapping.targets import ALL_LINEAR, all_linear

#: in which adapters can compute, and the names of those that are widened for it
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
DUMMY_TARGET_MODULES = "dummy-target-modules"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


# ---- modules and names ---------------------------------------------------------------------------------------------
def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, attribute name) of the module `key` in `model`."""
    parent_name, _, attribute = key.rpartition(".")
    return model.get_submodule(parent_name), model.get_submodule(key), attribute


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of the module in `model`; empty if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of the patterns that matches the end of a module's name, or that name."""
    return next((key for key in pattern_keys if re.match(END.format(key), key_to_match)), key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


def str_to_bool(value: str) -> int:
    value = value.lower()
    if value in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if value in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


# ---- devices -------------------------------------------------------------------------------------------------------
def infer_device() -> str:
    """The type of accelerator that torch finds, "cpu" if it finds none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Accelerate's, or that all of the model is where its first Parameter is."""
    return model.hf_device_map if hasattr(model, "hf_device_map") else {"": next(model.parameters()).device}


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Modules that are made meanwhile have their Parameters, and if asked for their buffers, on the meta device."""
    kinds = ("register_parameter", "register_buffer") if include_buffers else ("register_parameter",)
    before = {kind: getattr(nn.Module, kind) for kind in kinds}

    def empty(kind: str) -> Callable[..., None]:
        def register(module: nn.Module, name: str, value: Tensor | None, *args: Any, **kwargs: Any) -> None:
            if value is not None:
                moved = value.to("meta")
                value = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
            before[kind](module, name, value, *args, **kwargs)

        return register

    for kind in kinds:
        setattr(nn.Module, kind, empty(kind))
    try:
        yield
    finally:
        for kind, function in before.items():
            setattr(nn.Module, kind, function)


def check_deepspeed_zero3_enabled() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Meanwhile, what ZeRO-3 has taken apart of these is together."""
    given = [param] if isinstance(param, Tensor) else list(param)
    apart = [p for p in given if hasattr(p, "ds_id")]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Meanwhile, what Accelerate offloads of the modules below is on the device on which they run. What is written to
    the base module of a layer with adapters lasts: it is kept in host memory from then on."""
    offloaded = [
        module
        for name, module in layer.named_modules()
        if name and getattr(getattr(module, "_hf_hook", None), "offload", False)
    ]
    for module in offloaded:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in offloaded:
            if module is getattr(layer, "base_layer", None):
                module._hf_hook.weights_map = {name: t.to("cpu") for name, t in module.state_dict().items()}
            module._hf_hook.post_forward(module, torch.tensor([]))


# ---- weights -------------------------------------------------------------------------------------------------------
def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def get_bnb_param_type(param: Tensor) -> Literal[False, "4bit", "8bit"]:
    return "4bit" if is_bnb(param, "Params4bit") else "8bit" if is_bnb(param, "Int8Params") else False


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """A Params4bit, or an Int8Params with the `state` of its module, as a dense matrix."""
    functional = import_bnb("dequantize_bnb_weight").functional
    if is_bnb(weight, "Params4bit"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    if state is None:
        raise ValueError("No `state` was passed for bnb 8bit quantized weights: it is the module's")
    scales = weight.SCB if state.SCB is None else state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight itself where it is dense, else a dense copy."""
    stored = base_weight(module)
    if isinstance(stored, DenseWeight):
        return module.weight
    return stored.dense(torch.float32 if stored.quantization == "int8" else None)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> Tensor:
    """Labels as a decoder's inputs: one place to the right, padding where they are left out (-100)."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    shifted = input_ids.roll(1, dims=1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill_(shifted == -100, pad_token_id)


# ---- configs, layers -----------------------------------------------------------------------------------------------
def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The config with which transformers has quantised the model by `method`; None."""
    if getattr(model, "quantization_method", None) != method:
        return None
    return getattr(getattr(model, "config", None), "quantization_config", None)


def include_all_linear_layers(peft_config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The config with names in the place of "all-linear"."""
    target = getattr(peft_config, "target_modules", None)
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        peft_config.target_modules = set(all_linear(model, peft_config))
    return peft_config
