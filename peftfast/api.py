"""Where everything starts: `get_peft_model`, `patch`, `inject_adapter_in_model`, and state dicts as functions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig, require_config, require_module
from peftfast.errors import PeftWarning, check_present, warn
from peftfast.files.beside import room_for
from peftfast.files.fit import fit_state_dict
from peftfast.files.io import needs_embedding_layers
from peftfast.files.renamed import renamed
from peftfast.files.state import adapter_state_dict
from peftfast.interop.takeover import is_wrapped_by_peft, take_over
from peftfast.keys import starts_of
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import base_of
from peftfast.method import changes_base, method_for
from peftfast.mixed_model import PeftMixedModel
from peftfast.model import PeftModel, refuse_peft_model
from peftfast.rules import torch_dtype
from peftfast.sharding import copy_whole
from peftfast.tasks import model_class
from peftfast.training.checkpointing import checkpointing_switches, is_checkpointing, require_input_gradients
from peftfast.tuners.tuner import adapted_modules
from peftfast.wrapping.adding import add_adapter, say_if_in_prefix
from peftfast.wrapping.injection import plan_injection
from peftfast.wrapping.inventory import Inventory, inventory_of
from peftfast.wrapping.replication import replicated


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = False,
) -> PeftModel:
    """Wrap a model with an adapter, ready to train.

    Args:
        model: changed in place: adapted modules are replaced, everything but the adapter is frozen.
        peft_config: what to add; its targets are resolved in place.
        adapter_name: must not contain '.'.
        mixed: give a PeftMixedModel: adapters of different types in one model, and several of them active.
        autocast_adapter_dtype: keep factors in fp32 on a half-precision base.
        revision: of the base model, recorded in the config.
        low_cpu_mem_usage: create the adapter on the meta device, to be loaded.
        strict: refuse what is otherwise let pass with a warning.

    Raises:
        NoMatchingPeftModuleError: no module matched. ValueError, TypeError: anything else about the config.
    """
    refuse_peft_model(model)
    require_config(peft_config)
    new_name = getattr(model, "name_or_path", None) or None
    old_name = peft_config.base_model_name_or_path
    if old_name is not None and old_name != new_name:
        warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to '{new_name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint."
        )
    say_if_in_prefix(adapter_name, peft_config)
    if peft_config.inference_mode:
        warn(
            "The config has inference_mode=True, as saved adapters' configs have, so that nothing will be trainable. "
            "For training set config.inference_mode = False.",
            PeftWarning,
        )
    before = (peft_config.base_model_name_or_path, peft_config.revision)
    peft_config.base_model_name_or_path = new_name
    if revision is not None:
        peft_config.revision = revision
    try:
        kind = PeftMixedModel if mixed else model_class(peft_config)
        return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, strict=strict)
    except BaseException:
        peft_config.base_model_name_or_path, peft_config.revision = before
        raise


def patch(
    model: nn.Module,
    config: PeftConfig | None = None,
    *,
    quantize: str | None = None,
    quantize_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> PeftModel:
    """What a user calls before training: `model = peftfast.patch(model, LoraConfig(...))`.

    Args:
        model: a base model. Without a config: a model that PEFT has wrapped, which stays the same object with the same
            parameters and files and computes with our kernels from now on; `peftfast.patch_report(model)` says which
            layers do, `peftfast.unpatch(model)` undoes it.
        config: the adapter to add.
        quantize: "nf4", "fp4" or "int8": store the linear layers of a dense base so, as `peftfast.quantize_model` does;
            the errors are in `model.quantization_report`. Initialisations that change the base (LoftQ, PiSSA, OLoRA)
            see it dense, and what they leave is quantised.
        quantize_options: of `quantize_model`: `skip`, `double_quant`, `compute_dtype`, ...
        options: of `get_peft_model`.

    Returns:
        The wrapped model; training, saving and everything else go on as with PEFT.
    """
    if config is None and not options and quantize is None and isinstance(model, nn.Module):
        if isinstance(model, PeftModel):
            return model
        if is_wrapped_by_peft(model):
            take_over(model)
            return model
    if config is None:
        raise TypeError(
            "patch(model, config) needs a config, for example peftfast.LoraConfig(r=16, target_modules='all-linear')"
        )
    refuse_peft_model(model)
    require_config(config, "config")
    if quantize is None:
        if quantize_options:
            raise ValueError(f"quantize_options={dict(quantize_options)} need a format as well: quantize='nf4'")
        return get_peft_model(model, config, **options)
    from peftfast.quantization.quantize import plan_quantization, quantize_model

    settings = dict(quantize_options or {})
    skip = settings.pop("skip", None)
    planned = plan_quantization(model, quantize, skip, settings)
    if changes_base(config):
        wrapped = get_peft_model(model, config, **options)
        quantize_model(wrapped, quantize, skip=skip, **settings)
        return wrapped
    if not config.is_prompt_learning:  # refuse the config before the model is changed
        trial = copy.deepcopy(config)
        trial.validate()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with replicated(model, trial):
                found = plan_injection(Inventory(model, {}), "trial", trial, strict=options.get("strict", False))
        # a Parameter that is adapted by itself stays what it is
        skip = [*planned.skipped, *(name for name, _, _ in planned.places if name in found.parameters)]
    quantize_model(model, quantize, skip=skip, **settings)
    return get_peft_model(model, config, **options)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    *,
    autocast_adapter_dtype: bool = False,
) -> nn.Module:
    """Put an adapter into a model without wrapping the model; returns it, with `model.peft_config`.

    It becomes the active adapter, trainable unless its config is for inference.

    Args:
        state_dict: adapt exactly the modules that these weights are for.
        autocast_adapter_dtype: keep factors in fp32 on a half-precision base; False: in the base's dtype.
    """
    require_config(peft_config)
    if peft_config.is_prompt_learning:
        raise ValueError("`create_and_replace` does not support prompt learning, adaption prompt and shadow yet.")
    inventory = inventory_of(model)
    keys = None if state_dict is None else adapted_modules(state_dict, method_for(peft_config).prefix)
    first = not inventory.configs
    add_adapter(
        inventory, adapter_name, peft_config, keys=keys, device="meta" if low_cpu_mem_usage else None,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )  # fmt: skip
    if getattr(model, "peft_config", None) is not inventory.configs:
        inventory.model.peft_config = inventory.configs  # transformers deletes it with the last adapter
    inventory.activate_added(adapter_name, peft_config.inference_mode)
    if first and not peft_config.inference_mode:
        inventory.train_biases(peft_config)
    if not peft_config.inference_mode and is_checkpointing(checkpointing_switches(model)):
        require_input_gradients(model)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the names of the file.

    Args:
        state_dict: tensors gathered from a sharded model, by live name; a part of them gives that part of the adapter.
        unwrap_compiled: look inside `torch.compile`'s wrapper.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    cfg = _config(model, adapter_name)
    embeddings = needs_embedding_layers(model, cfg, adapter_name, save_embedding_layers)
    return adapter_state_dict(model, cfg, adapter_name, state_dict, embeddings, complete=False)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool | str = False,
) -> Any:
    """Load tensors, named as in the file, into an adapter.

    Returns:
        (missing_keys, unexpected_keys) of this adapter; what is missing by its name in the model.

    Raises:
        AdapterLoadError: wrong shapes or non-finite values; nothing was changed. TypeError: not tensors by name.
    """
    given = peft_model_state_dict
    if not isinstance(given, Mapping):
        raise TypeError(f"peft_model_state_dict must be a dict of tensors by name, got {type(given).__name__}")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"peft_model_state_dict must be a dict of tensors by name; {key!r} is {type(value).__name__}"
            )
    cfg = _config(model, adapter_name)
    given = renamed(base_of(model), None, given)
    with room_for(getattr(model, "_tuner", None), adapter_name, given):
        fit = fit_state_dict(model, cfg, given, adapter_name, finite=strict != "off")
        # names that do not fit are returned to the caller, as PEFT does, instead of warned about
        fit.check(strict, ignore_mismatched_sizes, only_tensors=strict is False)
    fit.fill_gaps(model, empty=False)
    fit.apply(model, assign=low_cpu_mem_usage)
    return fit.incompatible_keys()


def _config(model: nn.Module, adapter_name: str) -> PeftConfig:
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise ValueError("The model has no adapters; see get_peft_model or inject_adapter_in_model")
    check_present(adapter_name, configs)
    return configs[adapter_name]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors under their original names, adapters left out."""
    base = base_of(model)
    result, adapters, inside = {}, set(), set()
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, (BaseTunerLayer, StandIn)):
            adapters.update(f"{name}.{kept}" for kept in (*module.adapter_layer_names, *module.other_param_names))
            inside.update(f"{name}.{place}" for place in ("base_layer", "token_adapter", "original_module"))
    for key, tensor in base.state_dict(keep_vars=True).items():
        starts = starts_of(key)
        if adapters.isdisjoint(starts):
            name = ".".join(part for part, start in zip(key.split("."), starts, strict=True) if start not in inside)
            result[name] = tensor.detach()
    return result


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
    """Load a base checkpoint, under its original names, into a model that carries adapters.

    Raises:
        RuntimeError: names or sizes differ, or adapters are inside the weights; nothing was changed.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise RuntimeError(
            f"Adapters {merged} are inside the base weights. Please unmerge them before other base weights are loaded."
        )
    mine = get_base_model_state_dict(model)
    missing = [k for k in mine if k not in state_dict]
    unexpected = [k for k in state_dict if k not in mine]
    wrong = [k for k in mine if k in state_dict and mine[k].shape != state_dict[k].shape]
    if wrong or (strict and (missing or unexpected)):
        parts = {
            "Missing key(s) in state_dict": missing,
            "Unexpected key(s) in state_dict": unexpected,
            "Sizes that differ": [f"{k}: {list(mine[k].shape)}, given {list(state_dict[k].shape)}" for k in wrong],
        }
        said = "; ".join(f"{part}: {', '.join(keys)}" for part, keys in parts.items() if keys)
        raise RuntimeError(f"Error(s) in loading base weights. {said}")
    for key, tensor in mine.items():
        if key in state_dict:
            copy_whole(tensor, state_dict[key])
    for layer in layers:
        layer.changed()
    return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype | str) -> None:
    """Frozen parameters to `dtype`, trainable ones to fp32: what mixed-precision training with a loss scaler needs.
    Packed weights stay as they are."""
    require_module(model)
    dtype = torch_dtype(floating=True).enforce(dtype, "dtype")
    for parameter in model.parameters():
        packed = parameter.element_size() == 1 or hasattr(parameter, "quant_state")
        if parameter.is_floating_point() and not packed:
            parameter.data = parameter.to(torch.float32 if parameter.requires_grad else dtype)
