"""Preparing a quantised model for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftfast.config import require_module
from peftfast.training.checkpointing import switch_on

_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: bool = False,
) -> nn.Module:
    """Freeze a quantised model and switch gradient checkpointing on; prints what that means for memory.

    Unlike PEFT's function of this name it leaves every parameter in its dtype. Norms compute in fp32 inside, losses
    cast their logits, adapters are fp32 anyway; fp32 embeddings, norms and head would make all activations between
    the layers fp32 as well.

    Args:
        model: a transformers model, quantised or not.
        use_gradient_checkpointing: for quantised models only, as in PEFT.
        gradient_checkpointing_kwargs: of `model.gradient_checkpointing_enable`.
        auto_clear_cache: with `upcast`, give the memory of the old tensors back to the device.
        upcast: cast all half-precision parameters to fp32, as PEFT does; nothing of models that are packed by other
            tools than bitsandbytes, in PEFT neither.

    Returns:
        The model, changed in place.
    """
    require_module(model)
    kwargs = gradient_checkpointing_kwargs or {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    quantised = _is_quantised(model)
    # packed 4-bit weights may be stored as a half-precision dtype; they are no numbers of it
    half = [p for p in model.parameters() if p.dtype in _HALF and not hasattr(p, "quant_state")]
    extra = sum(p.numel() for p in half) * 2 / 2**20
    if not half:
        done = "found no half-precision parameters"
    elif upcast and not _is_packed_by_others(model):
        for parameter in half:
            parameter.data = parameter.data.to(torch.float32)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        done = f"cast {len(half)} half-precision parameters to fp32, {extra:.1f} MiB more of weights"
    else:
        done = (
            f"left {len(half)} half-precision parameters as they are, which saves {extra:.1f} MiB of weights, and the "
            "fp32 copies of activations that follow from them, against casting to fp32"
        )
    checkpointing = "not used"
    if quantised and use_gradient_checkpointing:
        _checkpoint(model, kwargs)
        checkpointing = f"on{f', {kwargs}' if kwargs else ''}"
    print(f"prepare_model_for_kbit_training: {done}; gradient checkpointing {checkpointing}.")
    return model


def _is_quantised(model: nn.Module) -> bool:
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        return True
    return _is_packed_by_others(model)


def _is_packed_by_others(model: nn.Module) -> bool:
    method = getattr(model, "quantization_method", None)
    return method in ("gptq", "aqlm", "eetq", "hqq", "torchao") or getattr(model, "hqq_quantized", False)


def _checkpoint(model: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_reentrant", True):
        # re-entrant checkpointing passes gradients on only if an input requires them
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    switch_on(model, kwargs)
