"""Sub-configs of LoraConfig: PEFT's fields, names and defaults, each checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from peftfast.config import CheckedFields, checked, setting
from peftfast.rules import boolean, integer, number, one_of, optional, positive, sequence, text


@checked
class LoftQConfig(CheckedFields):
    """Initialisation for quantised bases (Li et al., arXiv 2310.08659).

    Args:
        loftq_bits: bits of the base. loftq_iter: alternating steps of quantisation and SVD.
    """

    loftq_bits: int = setting(one_of(2, 4, 8), default=4)
    loftq_iter: int = setting(integer(1), default=1)


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

    rho: float = setting(number(1.0), default=2.0)
    tau: float = setting(number(0.0, 1.0), default=0.99)
    use_label_mask: bool = setting(boolean(), default=True)
    label_mask_value: int = setting(integer(), default=-100)
    whiten: bool = setting(boolean(), default=False)
    adjust_scaling_factors: bool = setting(boolean(), default=True)


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

    cache_file: str | None = setting(optional(text()), default=None)
    covariance_file: str | None = setting(optional(text()), default=None)
    corda_method: Literal["ipm", "kpm"] = setting(one_of("ipm", "kpm"), default="ipm")
    verbose: bool = setting(boolean(), default=False)
    use_float16_for_covariance: bool = setting(boolean(), default=False)
    prune_temporary_fields: bool = setting(boolean(), default=True)

    def __post_init__(self) -> None:
        for name in ("cache_file", "covariance_file"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        super().__post_init__()


@checked
class ArrowConfig(CheckedFields):
    """Routing of tokens among LoRAs (Ostapenko et al., arXiv 2405.11157), with GenKnowSub
    (aclanthology.org/2025.acl-short.54); for `create_arrow_model`.

    Args:
        top_k: how many experts a token is sent through. router_temperature: of the softmax over their similarities.
        use_gks: take the mean of the adapters of general knowledge from every expert.
        rng_seed: accepted for PEFT's sake; experts' prototypes are computed exactly, nothing is drawn.
        task_adapter_names, gks_adapter_names: filled in by `create_arrow_model`. Experts are all plain LoRAs beside the
            router but those of general knowledge, which are these and whatever is called gks_0, gks_1, ...
    """

    top_k: int = setting(integer(1), default=3)
    router_temperature: float = setting(number(0.0), default=1.0)
    use_gks: bool = setting(boolean(), default=False)
    rng_seed: int | None = setting(optional(integer()), default=None)
    task_adapter_names: list[str] | None = setting(optional(sequence(text())), default=None)
    gks_adapter_names: list[str] | None = setting(optional(sequence(text())), default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router_temperature == 0:
            raise ValueError("router_temperature must be greater than 0.")


@checked
class LoraGAConfig(CheckedFields):
    """Initialisation from the gradient of the weight (Wang et al., arXiv 2407.05000).

    Args:
        direction: which of the gradient's 2 r first singular directions A and B take: "ArBr" (A the second, fourth,
            ..., B the others), "A2rBr" (A the second half), "ArB2r" (B the second half), or "random" (both the same).
        scale: of B, which has the singular values in it: "stable" (times N^(1/4) / sqrt(stable_gamma), N being the
            output features), "weight_svd" (its first singular value becomes the weight's), "unit" (as it is); or
            "gd_scale": A and B divided by the adapter's scaling.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = setting(
        one_of("ArBr", "A2rBr", "ArB2r", "random"), default="ArB2r"
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = setting(
        one_of("stable", "weight_svd", "gd_scale", "unit"), default="stable"
    )
    stable_gamma: int = setting(integer(1), default=16)


@checked
class BdLoraConfig(CheckedFields):
    """Block-diagonal factors, so that layers which are sharded over devices need no communication for their adapters.

    Args:
        target_modules_bd_a, target_modules_bd_b: parts of the names of modules whose A, whose B is block-diagonal. For
            tensor parallelism: B of what is sharded by its output (q, k, v, gate, up), A of what is sharded by its
            input (o, down).
        nblocks: how many blocks, the number of devices.
        match_strict: refuse targets of which neither is block-diagonal; False makes them plain LoRAs.
    """

    target_modules_bd_a: list[str] | None = setting(optional(sequence(text())), default=None)
    target_modules_bd_b: list[str] | None = setting(optional(sequence(text())), default=None)
    nblocks: int = setting(integer(1), default=1)
    match_strict: bool = setting(boolean(), default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ValueError(
                f"Found overlapping modules in target_modules_bd lists: {both} cannot have both A and B block-diagonal"
            )


@checked
class KasaConfig(CheckedFields):
    """Adaptation in the directions of the base weight's smallest singular values (Wang et al., arXiv 2412.06071).

    The two coefficients have an effect where the training adds `model._get_kasa_loss()` to its loss, and only there.

    Args:
        beta: of the sum of squares of the trained singular values.
        gamma: of how far the factors are from orthonormal, ‖Bᵀ B - I‖ + ‖A Aᵀ - I‖.
    """

    beta: float = setting(number(0.0), default=1e-4)
    gamma: float = setting(number(0.0), default=1e-3)


@checked
class VeloraConfig(CheckedFields):
    """Training that keeps of a layer's input one number for each group of features (Miles et al., arXiv 2405.17991).

    Args:
        num_groups: how many groups; more are closer to LoRA's own gradient and take more memory.
        scale: what the reconstructed input is multiplied by, and so A's gradient.
        init_type: the direction that groups are projected on: "batch_average", their mean in every forward;
            "batch_average_once", that of the first one; "random".
    """

    num_groups: int = setting(integer(1), default=64)
    scale: float = setting(positive(), default=1.0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = setting(
        one_of("batch_average", "batch_average_once", "random"), default="batch_average"
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

    num_samples: int = setting(integer(1), default=8)
    use_entropy: bool = setting(boolean(), default=False)
    dirichlet_prior: float = setting(positive(), default=0.1)
    sample_scaler: float = setting(number(), default=1e-4)
    kl_loss_weight: float = setting(number(), default=1e-5)
    buffer_size: int = setting(integer(1), default=150)


@dataclass
class LoraRuntimeConfig:
    """Settings of one process, never saved.

    Args:
        ephemeral_gpu_offload: accepted for PEFT's sake; initialisations run where the base weight is.
    """

    ephemeral_gpu_offload: bool = False
