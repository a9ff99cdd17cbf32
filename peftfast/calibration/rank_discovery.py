"""Ranks for a plain LoRA, chosen per module from a few batches under a total budget, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.calibration.eva import (
    all_rows,
    components_of,
    distribute,
    forward_fn_dict,
    placed,
    token_mask,
    token_rows,
)
from peftfast.config import PeftType, require_config, require_module
from peftfast.devices import singular_values
from peftfast.errors import enumerate_some
from peftfast.layers.layer import BaseTunerLayer
from peftfast.methods.lora.config import LoraConfig
from peftfast.modes import in_mode, removed_after
from peftfast.ops.finite import is_finite
from peftfast.rules import integer
from peftfast.wrapping.patterns import pattern_of, pattern_value
from peftfast.wrapping.targets import linear_targets

OVERSAMPLING = 8  # columns of the sketch beyond the largest rank


def discover_ranks(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Mapping[str, Any]],
    budget: int | None = None,
    *,
    by: Literal["variance", "gradient"] = "variance",
    minimum: int = 1,
    maximum: int | None = None,
    adjust_scaling: bool = True,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    loss_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Choose a rank for every linear target and write it to `config.rank_pattern`.

    Args:
        model: the base model, without adapters; left as it was.
        config: its `r` (and `rank_pattern`) say what the budget is by default; its targets are resolved in place.
        batches: calibration data, a list or anything that can be gone through again.
        budget: sum of all ranks; None: that of the config as given.
        by: "variance": how much of the variance of a module's inputs the r-th component explains (Paischer et al.,
            arXiv 2410.07170); "gradient": the r-th singular value of the loss's gradient by the weight, squared,
            which is what a step along it gains to first order. Gradients need `labels` in the batches, or `loss_fn`.
        minimum: rank that every module gets. maximum: that none exceeds; None: twice the config's `r`.
        adjust_scaling: write `alpha_pattern` as well, so that every module keeps its alpha / r.
        forward_fn: (model, batch) -> output. loss_fn: output -> scalar; None: `output.loss`.
        seed: of the random sketch of the gradients.

    Returns:
        module name -> rank, with the sum `budget` unless all modules reach `maximum`.

    Raises:
        ValueError: an adapted model, another kind of config, a budget below `minimum` for each, no linear targets, no
            data, or data without a loss. TypeError: a count that is no integer.
    """
    require_module(model)
    require_config(config, "config")
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"discover_ranks chooses ranks of a LoraConfig, got {type(config).__name__}")
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError("discover_ranks looks at the base model; call it before adding adapters")
    if by not in ("variance", "gradient"):
        raise ValueError(f"by must be 'variance' or 'gradient', got {by!r}")
    targets_before = config.target_modules
    try:
        modules = linear_targets(model, config)
        given = {n: pattern_value(config.rank_pattern, n, config.r) for n in modules}
        alphas = {n: pattern_value(config.alpha_pattern, n, config.lora_alpha) for n in modules}
        total = sum(given.values()) if budget is None else budget
        top = 2 * config.r if maximum is None else maximum
        for what, count in (("budget", total), ("minimum", minimum), ("maximum", top)):
            integer().enforce(count, what)
        if minimum < 1 or total < minimum * len(modules):
            raise ValueError(
                f"A budget of {total} ranks cannot give {len(modules)} modules at least {minimum} each (minimum must "
                "be at least 1)"
            )
        if top < minimum:
            raise ValueError(f"maximum={top} is below minimum={minimum}")
        limits = {n: min(top, *base_weight(m).shape) for n, m in modules.items()}
        with in_mode(model, training=False):
            if by == "variance":
                shares = _variances(model, modules, batches, limits, config, forward_fn)
            else:
                shares = _gradients(model, modules, batches, limits, forward_fn, loss_fn or _loss, seed)
    except BaseException:
        config.target_modules = targets_before
        raise
    ranks = distribute({n: shares[n][: limits[n]] for n in modules}, total, minimum)
    config.rank_pattern = pattern_of(ranks, config.r)
    if adjust_scaling:
        power = 0.5 if config.use_rslora else 1.0
        config.alpha_pattern = pattern_of(
            {n: alphas[n] if r == given[n] else alphas[n] * (r / given[n]) ** power for n, r in ranks.items()},
            config.lora_alpha,
        )
    return ranks


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("by='gradient' needs a loss: put `labels` into the batches or pass loss_fn")
    return loss


def _variances(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    limits: Mapping[str, int],
    config: LoraConfig,
    forward_fn: Callable[..., Any],
) -> dict[str, Tensor]:
    """Share of the inputs' variance that each component explains, module by module."""
    first = next(iter(batches), None)
    tokens = isinstance(first, Mapping)
    found = components_of(
        model, modules, batches, limits, lambda found: limits, 0.0, forward_fn,
        (lambda batch: token_mask(batch, config)) if tokens else None,
        lambda name: token_rows if tokens else all_rows,
    )  # fmt: skip
    return {n: found[n].explained for n in modules}


def _gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    limits: Mapping[str, int],
    forward_fn: Callable[..., Any],
    loss_fn: Callable[[Any], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """Squared singular values of the gradient by each weight, summed over the batches.

    The gradient dYᵀ X [N, K] is never built: its product with a random matrix [K, q] keeps its leading singular values
    (Halko et al., arXiv 0909.4061).
    """  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, Tensor] = {}
    random: dict[str, Tensor] = {}
    for name, module in modules.items():
        weight = base_weight(module)
        n, k = weight.shape
        q = min(limits[name] + OVERSAMPLING, n, k)
        basis, _ = torch.linalg.qr(torch.randn(k, q, device="cpu", generator=generator))
        random[name] = (basis * (k / q) ** 0.5).to(weight.device)
        sketches[name] = torch.zeros(n, q, device=weight.device)

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            x = args[0].detach()
            projected = x.reshape(-1, x.shape[-1]).float() @ random[name]
            # frozen weights and token ids give no graph; from here on there is one, of a copy, because the model may
            # write to what it got (nn.ReLU(inplace=True))
            output = output if output.requires_grad else output.detach().requires_grad_().clone()

            def arrived(dy: Tensor) -> None:
                sketches[name].addmm_(dy.reshape(-1, dy.shape[-1]).float().t(), projected)

            output.register_hook(arrived)
            return output

        return hook

    trainable = [p for p in model.parameters() if p.requires_grad]
    count = 0
    try:
        for p in trainable:  # no gradient by the weights themselves
            p.requires_grad_(False)
        with removed_after(m.register_forward_hook(watch(n)) for n, m in modules.items()):
            for batch in placed(batches, model):
                with torch.enable_grad():
                    loss_fn(forward_fn(model, batch)).backward()
                count += 1
    finally:
        for p in trainable:
            p.requires_grad_(True)
    if not count:
        raise ValueError("batches is empty")
    broken = [n for n, s in sketches.items() if not is_finite(s)]
    if broken:
        raise ValueError(f"The gradients of these weights hold NaN or infinite values: {enumerate_some(broken)}")
    return {n: singular_values(s / count).square() for n, s in sketches.items()}
