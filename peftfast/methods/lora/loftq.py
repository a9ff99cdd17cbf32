"""LoftQ: factors that make up for what quantising the base loses (Li et al., arXiv 2310.08659)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.base.weight import quantise_and_back
from peftfast.errors import PeftWarning, warn
from peftfast.methods.lora.combine import padded
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import check_finite, fill_as_identity, initialiser
from peftfast.sites import Site

#: `loftq_bits` -> storage format
_FORMATS = {4: "nf4", 8: "int8"}


def loftq_factors(
    weight: Tensor, rank: int, scale: float, iterations: int, store: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with W close to Q + scale · B A, Q being quantised.

    In turn, Q is W - scale · B A quantised, and B A the best approximation of rank r of W - Q.

    Args:
        weight: W [N, K], fp32.
        scale: the adapter's scaling. PEFT leaves it out, which is the same for alpha = r only.
        iterations: at least 1. store: quantises [N, K] and gives back what is stored, in fp32.
    """
    low = torch.zeros_like(weight)
    for _ in range(iterations):
        a, b = best_factors(weight - store(weight - low), rank, scale)
        low = scale * b @ a
    return a, b


def best_factors(residual: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] with scale · B A the best approximation of `residual` [N, K]; ranks that it does not have
    are zero."""
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return padded(root[:, None] * vh[:rank], 0, rank), padded(u[:, :rank] * root, 1, rank)


def _check(site: Site, cfg: LoraConfig, r: int) -> None:
    if site.weight.quantization is not None:
        return
    bits = cfg.loftq_config.loftq_bits
    if bits not in _FORMATS:
        raise ValueError(f"loftq_bits={bits} is not supported: bitsandbytes stores {sorted(_FORMATS)} bits")
    check_finite(site, cfg, r)


@initialiser("loftq", ready=_check)
def _loftq(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """The base becomes the dequantised Q; the factors hold the rest."""
    if site.weight.quantization is not None:
        warn(
            "init_lora_weights='loftq' needs the weights before quantisation, but some or all modules are already "
            f"stored as {site.weight.quantization}. Their adapters start as the identity, unless they are loaded now; "
            "peftfast.replace_lora_weights_loftq(model, originals) computes the factors, and "
            "peftfast.patch(dense_model, config, quantize='nf4') does both steps.",
            PeftWarning,
        )
        return fill_as_identity(site, a, b)
    settings = adapter.cfg.loftq_config
    stored = weight = site.weight.dense(torch.float32)

    def store(target: Tensor) -> Tensor:
        nonlocal stored
        stored = quantise_and_back(target, _FORMATS[settings.loftq_bits])
        return stored

    new_a, new_b = loftq_factors(weight, adapter.setting("r"), adapter.scale, settings.loftq_iter, store)
    site.weight.assign(stored)
    a.copy_(new_a.reshape(a.shape))
    b.copy_(new_b.reshape(b.shape))
