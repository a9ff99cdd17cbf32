"""CorDA: factors from the singular directions of W C, C being the covariance of the layer's inputs (Yang et al., arXiv
2406.05223). `calibration.corda.preprocess_corda` leaves what this needs on the module, under PEFT's name `eigens`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftfast.adapter import Adapter
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.init import initialiser, take_out, wide_weight
from peftfast.ops.finite import is_finite
from peftfast.sites import Site


@dataclass
class CordaEigens:
    """W ≈ U S Vᵀ in the metric of the inputs: S_WC [r], U_WC [N, r], V_WC [K, r], the covariance taken out again."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def oriented_eigens(weight: Tensor, covariance: Tensor) -> CordaEigens:
    """The decomposition of W [N, K] by the covariance [K, K] of its inputs, all min(N, K) directions, best first."""
    damp, identity = 0.01, torch.eye(len(covariance), device=covariance.device)
    while True:  # as much damping as the inverse needs to be one
        damped = covariance + identity * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(damped)
        if not is_finite(damped):
            raise ValueError("The covariance of the inputs holds NaN or infinite values; check the calibration data")
        if torch.dist(damped @ inverse, identity) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return CordaEigens(s, u, (vh @ inverse).t())


def _check_eigens(site: Site, cfg: LoraConfig, r: int) -> None:
    eigens = getattr(site.module, "eigens", None)
    if eigens is None:
        raise ValueError(
            "`eigens` attribute not found for layer, please run `preprocess_corda` first (on the model that the "
            "adapter is added to, with the same config). To load a trained CorDA adapter, save it with "
            "path_initial_model_for_weight_conversion"
        )
    (n, k), shapes = site.weight.shape, [tuple(t.shape) for t in (eigens.S_WC, eigens.U_WC, eigens.V_WC)]
    if shapes != [(r,), (n, r), (k, r)]:
        raise ValueError(
            f"the eigens have shapes {shapes}, this adapter needs {[(r,), (n, r), (k, r)]}; please make sure that "
            "`preprocess_corda` saw the same model and the same ranks"
        )


@initialiser("corda", ready=_check_eigens)
def _corda(site: Site, a: Tensor, b: Tensor, adapter: Adapter) -> None:
    """B A s = U S Vᵀ, taken out of W."""
    eigens: CordaEigens = site.module.eigens
    scale = adapter.setting("scaling")
    root = (eigens.S_WC.to(a.device) / scale).sqrt()
    a.copy_((eigens.V_WC.to(a.device).t() * root[:, None]).reshape(a.shape))
    b.copy_((eigens.U_WC.to(b.device) * root).reshape(b.shape))
    take_out(site, wide_weight(site), a, b, scale)
    del site.module.eigens
