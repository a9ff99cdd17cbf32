"""Small conveniences under PEFT's names: signatures, temporary scaling, whether a folder holds an adapter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from peftfast.config import PeftConfig
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.dora import cache_norms
from peftfast.model import PeftModel
from peftfast.tuners.lora import LoraModel


def update_forward_signature(model: PeftModel) -> None:
    """Give `model.forward` the base model's signature and help text, if its own only says `*args, **kwargs`."""
    _take_signature(model, "forward", ({"args", "kwargs"},))


def update_generate_signature(model: PeftModel) -> None:
    """Give `model.generate` the base model's signature and help text, if its own says nothing."""
    if hasattr(model, "generate"):
        _take_signature(model, "generate", ({"args", "adapter_names", "kwargs"}, {"kwargs"}))


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Both of the above; `method` is "forward", "generate" or "all"."""
    known = {
        "forward": (update_forward_signature,),
        "generate": (update_generate_signature,),
        "all": (update_forward_signature, update_generate_signature),
    }
    if method not in known:
        raise ValueError(f"method {method} is not supported please choose one of {list(known)}")
    for update in known[method]:
        update(model)


def _take_signature(model: PeftModel, name: str, uninformative: tuple[set[str], ...]) -> None:
    bound = getattr(model, name)
    if set(inspect.signature(bound).parameters) not in uninformative:
        return
    function = bound.__func__
    own = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = deepcopy(function.__kwdefaults__)
    update_wrapper(
        own, getattr(type(model.get_base_model()), name), assigned=("__doc__", "__name__", "__annotations__")
    )
    setattr(model, name, MethodType(own, model))


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or Hub repository holds an adapter config that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever is wrong with it, it cannot be loaded as an adapter
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all LoRA layers inside a `with` block (WiSE-FT, arXiv 2109.01903). The layers' dicts of
    scalings stay as they are; others stand in for them meanwhile.

    Raises:
        TypeError: `multiplier` is not a number. ValueError: the model has no layer with a scaling.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and "scaling" in m.other_param_names]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [(layer, layer.scaling) for layer in layers]
    for layer, scaling in before:
        _put_scaling(layer, {name: value * multiplier for name, value in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in before:
            _put_scaling(layer, scaling)


def _put_scaling(layer: BaseTunerLayer, scaling: dict[str, Any]) -> None:
    layer.scaling = scaling
    for name in scaling:
        layer.changed(name)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside a `with` block, adapters' modules that have hooks get their input in the dtype it has, because the hooks
    may change that of the weights, as in layerwise casting by diffusers; elsewhere input and weights need not agree.

    Args:
        active: False changes nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)] if active else []
    before = [(layer, layer.cast_input_dtype_enabled) for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled


class DoraCaching:
    """Keep DoRA's norms between forwards in eval mode: `with DoraCaching(): ...`, or for good `DoraCaching()(True)`.

    Faster generation for one number per output feature. Writes to factors through `.data` go unseen meanwhile.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self._before.append(cache_norms(self.enabled))
        return self

    def __exit__(self, *exception: Any) -> None:
        cache_norms(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        cache_norms(enabled)


class MontecloraTrainerMixin:
    """To derive a trainer from, before transformers' or TRL's: adds MonteCLoRA's loss term, of several models with
    adapters the mean of theirs, to what `compute_loss` gives."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """See the trainer's; the loss, or with `return_outputs` the loss and the model's outputs."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        terms = [module._get_monteclora_loss() for module in model.modules() if isinstance(module, LoraModel)]
        term = sum(terms) / len(terms) if terms else 0.0
        if not return_outputs:
            return found + term
        loss, outputs = found
        return loss + term, outputs
