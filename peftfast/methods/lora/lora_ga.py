"""LoRA-GA: factors from the singular directions of the weight's gradient, taken out of W, so that the first step of the
adapter is close to that of full training (Wang et al., arXiv 2407.05000). `calibration.lora_ga.preprocess_loraga`
leaves the gradient on the module, under PEFT's name."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.errors import PeftWarning, warn
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import draw_as_building, initialiser, start_as_identity, take_out, wide_weight
from peftfast.methods.lora.settings import LoraGAConfig
from peftfast.sites import Site

#: Attribute of a module: the mean gradient of its weight, in the layout of the weight.
GRADIENT = "_peft_loraga_grad"


def directions_of_gradient(gradient: Tensor, rank: int, direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right singular vectors [r, K] for A, left ones [N, r] for B and B's singular values [r] of a gradient [N, K], by
    a randomised SVD (torch's generator decides). See `LoraGAConfig.direction`."""
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
    first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
    if direction == "random":
        first = second = torch.randperm(2 * rank)[:rank]
    elif direction == "ArBr":
        first, second = torch.arange(1, 2 * rank, 2), torch.arange(0, 2 * rank, 2)
    elif direction == "A2rBr":
        first, second = second, first
    first, second = first.to(s.device), second.to(s.device)
    return v.t()[first], u[:, second], s[second]


def gradient_factors(
    gradient: Tensor, weight: Tensor, rank: int, scaling: float, settings: LoraGAConfig
) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] from the gradient [N, K] of W [N, K], both fp32.

    B has the gradient's singular values in it, as in PEFT; in the paper it has not.
    """
    a, b, s = directions_of_gradient(gradient, rank, settings.direction)
    b = b * s
    if settings.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    elif settings.scale == "stable":
        b = b * (len(weight) ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd":
        _, largest, _ = torch.svd_lowrank(weight, q=rank, niter=4)
        if s[0] > 0:
            b = b * (largest[0] / s[0])
    return a, b


def _check(site: Site, cfg: LoraConfig, r: int) -> None:
    gradient = getattr(site.module, GRADIENT, None)
    if gradient is None:
        return
    if cfg.lora_ga_config is None:
        raise ValueError(
            "lora_ga_config must be provided when init_lora_weights='lora_ga': LoraConfig(..., "
            "lora_ga_config=LoraGAConfig(...))"
        )
    if site.weight.quantization is not None:
        raise ValueError(f"LoRA-GA changes the base weight, which is quantized here ({site.weight.quantization})")
    stored = site.module.weight.shape
    if gradient.shape != stored:
        raise ValueError(f"the gradient that `preprocess_loraga` left has the shape {list(gradient.shape)}, the weight "
                         f"{list(stored)}")  # fmt: skip
    if 2 * r > min(stored):
        raise ValueError(
            f"LoRA-GA takes A and B from the first 2 r = {2 * r} singular directions of the gradient, and a weight of "
            f"{list(stored)} has {min(stored)}: r may be {min(stored) // 2} at most here (rank_pattern)"
        )


@initialiser("lora_ga", check=_check)
def _lora_ga(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    gradient = getattr(site.module, GRADIENT, None)
    if gradient is None:
        if not hasattr(site.module, "kernel_size"):  # convolutions always start so, as `preprocess_loraga` says
            warn(
                "init_lora_weights='lora_ga', but `preprocess_loraga` has left no gradient on some or all modules: "
                "their base weights stay as they are, and adapters start as the identity. A trained LoRA-GA adapter "
                "that is loaded needs the base weights that its initialisation left; save it with "
                "path_initial_model_for_weight_conversion to load it on the original ones.",
                PeftWarning,
            )
        return start_as_identity(site, a, b, adapter)
    weight = wide_weight(site)
    draw_as_building(site, a, b, adapter)  # a seed gives the factors that it gives in PEFT
    gradient = gradient.t() if site.weight.transposed else gradient
    gradient = gradient.to(weight.device, torch.float32)
    scale = adapter.setting("scaling")
    down, up = gradient_factors(gradient, weight, a.shape[0], scale, adapter.cfg.lora_ga_config)
    a.copy_(down)
    b.copy_(up)
    take_out(site, weight, a, b, scale)
    delattr(site.module, GRADIENT)
