"""Sub-configs of LoraConfig: PEFT's fields, names and defaults, each checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from peftfast.config import CheckedFields, checked, setting
from peftfast.rules import boolean, integer, number, one_of, optional, positive, text


@checked
class LoftQConfig(CheckedFields):
    """Initialisation for quantised bases (Li et al., arXiv 2310.08659).

    Args:
        loftq_bits: bits of the base. loftq_iter: alternating steps of quantisation and SVD.
    """

    loftq_bits: int = setting(4, one_of(2, 4, 8))
    loftq_iter: int = setting(1, integer(1))


@checked
class EvaConfig(CheckedFields):
    """Initialisation from the explained variance of layer inputs (Paischer et al., arXiv 2410.07170).

    Args:
        rho: a layer's rank may grow to rho times the config's r; 1 keeps all ranks equal.
        tau: a layer is done when the cosine similarity of its components between batches exceeds this.
        use_label_mask, label_mask_value: leave out positions whose label has this value.
        whiten: scale components to unit variance.
        adjust_scaling_factors: keep alpha / r as it was when ranks are redistributed.
    """

    rho: float = setting(2.0, number(1.0))
    tau: float = setting(0.99, number(0.0, 1.0))
    use_label_mask: bool = setting(True, boolean())
    label_mask_value: int = setting(-100, integer())
    whiten: bool = setting(False, boolean())
    adjust_scaling_factors: bool = setting(True, boolean())


@checked
class CordaConfig(CheckedFields):
    """Initialisation from the covariance of layer inputs (Yang et al., arXiv 2406.05223).

    Args:
        cache_file: where the decomposition is kept. covariance_file: where covariances are kept. Paths become strings,
            which files can hold.
        corda_method: "ipm" (instruction-previewed: adapts the directions the task uses) or "kpm"
            (knowledge-preserving: adapts those it does not).
        verbose: show progress. use_float16_for_covariance: half the memory.
        prune_temporary_fields: False leaves `covariance_matrix` and `sample_count` on the modules, to be looked at.
    """

    cache_file: str | None = setting(None, optional(text()))
    covariance_file: str | None = setting(None, optional(text()))
    corda_method: Literal["ipm", "kpm"] = setting("ipm", one_of("ipm", "kpm"))
    verbose: bool = setting(False, boolean())
    use_float16_for_covariance: bool = setting(False, boolean())
    prune_temporary_fields: bool = setting(True, boolean())

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        super().__post_init__()


@checked
class KasaConfig(CheckedFields):
    """Adaptation in the directions of the base weight's smallest singular values (Wang et al., arXiv 2412.06071).

    The two coefficients have an effect where the training adds `model._get_kasa_loss()` to its loss, and only there.

    Args:
        beta: of the sum of squares of the trained singular values.
        gamma: of how far the factors are from orthonormal, ‖Bᵀ B - I‖ + ‖A Aᵀ - I‖.
    """

    beta: float = setting(1e-4, number(0.0))
    gamma: float = setting(1e-3, number(0.0))


@checked
class VeloraConfig(CheckedFields):
    """Training that keeps of a layer's input one number for each group of features (Miles et al., arXiv 2405.17991).

    Args:
        num_groups: how many groups; more are closer to LoRA's own gradient and take more memory.
        scale: what the reconstructed input is multiplied by, and so A's gradient.
        init_type: the direction that groups are projected on: "batch_average", their mean in every forward;
            "batch_average_once", that of the first one; "random".
    """

    num_groups: int = setting(64, integer(1))
    scale: float = setting(1.0, positive())
    init_type: Literal["batch_average", "batch_average_once", "random"] = setting(
        "batch_average", one_of("batch_average", "batch_average_once", "random")
    )


@checked
class MontecloraConfig(CheckedFields):
    """Training with samples around the down factor, whose spread is trained (Sengupta et al., arXiv 2411.04358).

    The loss terms have an effect where the training adds `model._get_monteclora_loss()` to its loss, as
    `helpers.MontecloraTrainerMixin` does, and only there.

    Args:
        num_samples: how many samples are averaged in a call.
        use_entropy: add the sum of squares of their weights to the loss term.
        dirichlet_prior: concentration of the weights' prior; large: even, small: few samples.
        sample_scaler: size of the samples' distance from the factor.
        kl_loss_weight: of the divergence from the priors.
        buffer_size: for how many calls random numbers are drawn at once; on a CPU the stream of a seed depends on it.
    """

    num_samples: int = setting(8, integer(1))
    use_entropy: bool = setting(False, boolean())
    dirichlet_prior: float = setting(0.1, positive())
    sample_scaler: float = setting(1e-4, number())
    kl_loss_weight: float = setting(1e-5, number())
    buffer_size: int = setting(150, integer(1))


@dataclass
class LoraRuntimeConfig:
    """Settings of one process, never saved.

    Args:
        ephemeral_gpu_offload: accepted for PEFT's sake; initialisations run where the base weight is.
    """

    ephemeral_gpu_offload: bool = False
