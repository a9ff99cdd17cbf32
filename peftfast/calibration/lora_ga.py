"""What LoRA-GA has to know before an adapter is added: the gradients of the base weights (Wang et al., arXiv
2407.05000)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.calibration.cache import cache, cached
from peftfast.config import require_config, require_module
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.layers.walk import base_modules
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.lora_ga import GRADIENT
from peftfast.modes import in_mode, removed_after
from peftfast.ops.finite import is_finite
from peftfast.sites.site import has_site
from peftfast.wrapping.targets import linear_targets, make_matcher


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike | None = None,
    *,
    keep: Literal["device", "host"] = "device",
) -> None:
    """Leave the gradient of every linear target's weight on its module, for `get_peft_model` with
    init_lora_weights="lora_ga".

    Gradients are taken from autograd as they come, one weight's at a time, and averaged over all backward passes, in
    fp32 where there are several. `weight.grad` stays as it was, whatever `train_step` does to it; no other Parameter
    gets a gradient.

    Args:
        lora_config: its `target_modules` are resolved in place if they are None or "all-linear".
        train_step: runs forward and backward passes, any number of them, on batches that stand for the task. No
            optimizer's step.
        cache_file: gradients are read from this file if there is one, and else written to it; PEFT's are the same.
        keep: where gradients are until the adapter is added: beside the weights, or in host memory, so that the
            device has to hold one at a time only.

    Raises:
        ValueError: no `lora_ga_config`, no linear target, quantised weights, a file that does not fit the model, or
            gradients with NaN or infinite values. Nothing is left on the model then.
    """
    require_module(model)
    require_config(lora_config, "lora_config")
    if lora_config.lora_ga_config is None:
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    if keep not in ("device", "host"):
        raise ValueError(f"keep={keep!r} is neither 'device' nor 'host'")
    modules = _targets(model, lora_config)
    stored = cached(cache_file)
    if stored is not None:
        gradients = _from_cache(stored, modules, keep)
    else:
        gradients = _estimated(model, modules, train_step, keep)
        cache({f"{name}.{GRADIENT}": gradient for name, gradient in gradients.items()}, cache_file)
    for name, gradient in gradients.items():
        setattr(modules[name], GRADIENT, gradient)


def _targets(model: nn.Module, cfg: LoraConfig) -> dict[str, nn.Module]:
    found = linear_targets(model, cfg)
    # bitsandbytes' modules have a `quant_state` also while their weights are not packed yet
    packed = {name: base_weight(m).quantization or hasattr(m, "quant_state") for name, m in found.items()}
    if any(packed.values()):
        raise ValueError(
            f"LoRA-GA does not support quantized models, whose weights have no gradient: {_named(packed)}. Initialise "
            "on the dense model; peftfast.patch(model, config, quantize='nf4') quantises what that leaves."
        )
    matcher = make_matcher(cfg)
    others = [n for n, m in base_modules(model) if n not in found and matcher(n) and has_site(m)]
    if others:
        warn(
            f"LoRA-GA is for linear layers: the adapters of {enumerate_some(others)} will start as the identity",
            PeftWarning,
        )
    return found


def _named(marked: Mapping[str, Any]) -> str:
    return enumerate_some([name for name, mark in marked.items() if mark])


def _estimated(
    model: nn.Module, modules: Mapping[str, nn.Module], train_step: Callable[[], Any], keep: str
) -> dict[str, Tensor]:
    """The mean gradient of every weight that `train_step` reaches."""
    # several modules may share a weight
    weights = {id(module.weight): module.weight for module in modules.values()}
    sums: dict[int, Tensor] = {}
    counts = dict.fromkeys(weights, 0)

    def collect(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad.detach(), None
        gradient = gradient.cpu() if keep == "host" else gradient
        before, key = sums.get(id(weight)), id(weight)
        counts[key] += 1
        if before is None:
            sums[key] = gradient
        else:  # one alone stays as narrow as it is
            sums[key] = before.to(torch.promote_types(before.dtype, torch.float32)).add_(gradient)

    with _only_these_train(model, list(weights.values())):
        hooks = [weight.register_post_accumulate_grad_hook(collect) for weight in weights.values()]
        with removed_after(hooks), torch.enable_grad():
            train_step()
    unseen = {name: not counts[id(module.weight)] for name, module in modules.items()}
    if all(unseen.values()):
        raise ValueError("train_step gave no target a gradient: it has to run forward and backward passes of the model")
    if any(unseen.values()):
        warn(
            f"train_step gave these targets no gradient, so their adapters will start as the identity: "
            f"{_named(unseen)}",
            PeftWarning,
        )
    broken = {name: not is_finite(sums[id(m.weight)]) for name, m in modules.items() if not unseen[name]}
    if any(broken.values()):
        raise ValueError(f"The gradients of these weights hold NaN or infinite values: {_named(broken)}")
    means = {key: total.div_(counts[key]) for key, total in sums.items()}
    return {name: means[id(module.weight)] for name, module in modules.items() if not unseen[name]}


@contextmanager
def _only_these_train(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """The model in training mode, with no gradient for anything else; afterwards as it was, `grad` included."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = [weight.grad for weight in weights]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        with in_mode(model, training=True):
            yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        for weight, gradient in zip(weights, before, strict=True):
            weight.grad = gradient


def _from_cache(stored: Mapping[str, Tensor], modules: Mapping[str, nn.Module], keep: str) -> dict[str, Tensor]:
    """The gradients of a file, in which those of weights that got none are missing."""
    found = {name: stored[f"{name}.{GRADIENT}"] for name in modules if f"{name}.{GRADIENT}" in stored}
    if not found:
        raise ValueError(f"The cache file has gradients of other modules than these targets: {enumerate_some(stored)}")
    for name, gradient in found.items():
        weight = modules[name].weight
        if gradient.shape != weight.shape:
            raise ValueError(
                f"The cache file has a gradient of shape {list(gradient.shape)} for {name}, whose weight is "
                f"{list(weight.shape)}"
            )
        found[name] = gradient if keep == "host" else gradient.to(weight.device)
    return found
