"""What CorDA has to know before an adapter is added: covariances of layer inputs and the decompositions by them (Yang
et al., arXiv 2406.05223)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.weight import base_weight
from peftfast.calibration.cache import cache, cached
from peftfast.config import require_config, require_module
from peftfast.errors import enumerate_some
from peftfast.methods.lora.config import LoraConfig
from peftfast.methods.lora.corda import CordaEigens, oriented_eigens
from peftfast.modes import in_mode, removed_after
from peftfast.ops.finite import is_finite
from peftfast.wrapping.patterns import pattern_value
from peftfast.wrapping.targets import linear_targets

_PARTS = ("S_WC", "U_WC", "V_WC")


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave `eigens` on every target of `lora_config`, for `get_peft_model` with init_lora_weights="corda".

    Args:
        lora_config: its `target_modules` are resolved in place if they are None or "all-linear".
        run_model: runs calibration data through the model; None only if the covariance or the cache file exists.
            A sample is one sequence; about 128 times the hidden size of tokens in all is enough.
        hooked_model: the model that `run_model` runs; None: `model`.

    Raises:
        ValueError: no `corda_config`, nothing to run, a layer that saw no input, non-finite inputs, or a file that is
            damaged or of other targets. Nothing is left on the model then.
    """
    require_module(model)
    require_config(lora_config, "lora_config")
    settings = lora_config.corda_config
    if settings is None:
        raise ValueError("preprocess_corda needs a config with `corda_config`")
    modules = linear_targets(model, lora_config)
    stored = cached(settings.cache_file)
    if stored is not None:
        keys = {name: [f"{name}.eigens.{part}" for part in _PARTS] for name in modules}
        _check_known([name for name, of in keys.items() if not all(k in stored for k in of)], settings.cache_file)
        for name, module in modules.items():
            module.eigens = CordaEigens(*(stored[key].to(module.weight.device) for key in keys[name]))
        return
    covariances, samples = _covariances(model, lora_config, run_model, hooked_model)
    items: Any = modules.items()
    if settings.verbose:
        from tqdm.auto import tqdm

        items = tqdm(items, desc="CorDA decompositions")
    eigens = {}
    for name, module in items:
        rank = pattern_value(lora_config.rank_pattern, name, lora_config.r)
        weight = base_weight(module).dense(torch.float32)
        if rank > min(weight.shape):
            raise ValueError(f"{name}: rank {rank} exceeds the {min(weight.shape)} directions of its weight")
        whole = oriented_eigens(weight, covariances[name].to(weight.device, torch.float32))
        # "ipm" adapts the directions that the data uses most, "kpm" those it uses least
        part = slice(0, rank) if settings.corda_method == "ipm" else slice(len(whole.S_WC) - rank, None)
        eigens[name] = CordaEigens(whole.S_WC[part].clone(), whole.U_WC[:, part].clone(), whole.V_WC[:, part].clone())
    for name, module in modules.items():  # now that all are there
        module.eigens = eigens[name]
        if not settings.prune_temporary_fields:
            module.covariance_matrix = covariances[name]
            if name in samples:
                module.sample_count = samples[name]
    tensors = {f"{name}.eigens.{part}": getattr(of, part) for name, of in eigens.items() for part in _PARTS}
    cache(tensors, settings.cache_file)


def _check_known(missing: list[str], path: str | os.PathLike | None) -> None:
    if missing:
        raise ValueError(
            f"{path} is of another model or other targets: it has nothing that fits {enumerate_some(missing)}. Name "
            "another file, or remove this one to have it made anew"
        )


def _covariances(
    model: nn.Module, cfg: LoraConfig, run_model: Callable[[], Any] | None, hooked_model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The mean over samples of XᵀX of every target's input, each X scaled by its largest entry; and how many samples
    that were, which a file does not know."""
    settings, path = cfg.corda_config, cfg.corda_config.covariance_file
    stored = cached(path)
    if stored is not None:
        inputs = {name: base_weight(module).shape[1] for name, module in linear_targets(model, cfg).items()}
        _check_known([name for name, k in inputs.items() if name not in stored or stored[name].shape != (k, k)], path)
        return stored, {}
    if run_model is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
    hooked = model if hooked_model is None else hooked_model
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    dtype = torch.float16 if settings.use_float16_for_covariance else torch.float32

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            x = args[0].detach()
            x = x.reshape(-1, x.shape[-1]).to(dtype)
            x = x / x.max().abs()
            covariance = x.t() @ x
            if not is_finite(covariance):
                raise ValueError(f"{name}: invalid value found in input, please check your input data.")
            sums[name] = sums[name] + covariance if name in sums else covariance
            counts[name] = counts.get(name, 0) + 1

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in linear_targets(hooked, cfg).items()]
    with removed_after(hooks), in_mode(hooked, training=False):
        run_model()
    unseen = [name for name in linear_targets(model, cfg) if name not in sums]
    if unseen:
        raise ValueError(f"run_model gave these targets no input: {unseen[:5]}")
    result = {name: total / counts[name] for name, total in sums.items()}
    cache(result, path)
    return result, counts
