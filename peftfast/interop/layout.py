"""Where PEFT keeps its names, and which of ours stands for each: the one table behind `import peftfast.as_peft`."""

from __future__ import annotations

import importlib
from typing import Any

from peftfast.errors import close_matches
from peftfast.interop import absent


def _from(module: str, *names: str) -> dict[str, str]:
    """Names that stand for what `module` calls so too."""
    return {name: f"{module}:{name}" for name in names}


_MIXED = _from("peftfast.tuners.mixed", "MixedModel")
_LORA_LAYERS = _from("peftfast.layers.kinds", "Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
#: The file below `peft.tuners.lora` of each kind of packed linear layer, and what its layer with adapters is called.
_PACKED = {
    "aqlm": ("AqlmLoraLinear",), "awq": ("AwqLoraLinear",), "bnb": ("Linear4bit", "Linear8bitLt"),
    "eetq": ("EetqLoraLinear",), "gptq": ("GPTQLoraLinear",), "hqq": ("HqqLoraLinear",),
    "torchao": ("TorchaoLoraLinear",),
}  # fmt: skip
_FUNCTIONAL = _from("peftfast.functional", "cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")

#: Modules that exist under the name `peft`. Each answers every public name of peftfast, as PEFT's modules import each
#: other's names, and in addition what is listed here: name -> "module:attribute".
MODULES: dict[str, dict[str, str]] = {
    "peft": {},
    "peft.auto": {},
    "peft.config": _from("peftfast.config", "PeftConfigMixin"),
    "peft.functional": _FUNCTIONAL,
    "peft.helpers": _from(
        "peftfast.helpers",
        "DoraCaching",
        "MontecloraTrainerMixin",
        "check_if_peft_model",
        "disable_input_dtype_casting",
        "rescale_adapter_scale",
        "update_forward_signature",
        "update_generate_signature",
        "update_signature",
    ),
    "peft.import_utils": {},
    "peft.mapping": {},
    "peft.mapping_func": {},
    "peft.mixed_model": _MIXED,
    "peft.optimizers": _from(
        "peftfast.optimizers", "create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"
    ),
    "peft.optimizers.lorafa": _from("peftfast.optimizers", "LoraFAOptimizer", "create_lorafa_optimizer"),
    "peft.optimizers.loraplus": _from("peftfast.optimizers", "create_loraplus_optimizer"),
    "peft.optimizers.riemannian": _from("peftfast.optimizers", "create_riemannian_optimizer"),
    "peft.peft_model": _from("peftfast.status", "TunerLayerStatus", "TunerModelStatus"),
    "peft.tuners": _MIXED,
    "peft.tuners.adalora": _from("peftfast.methods.rank_allocator", "RankAllocator"),
    "peft.tuners.ia3": {},
    "peft.tuners.loha": {},
    "peft.tuners.loha.layer": {},
    "peft.tuners.lokr": {},
    "peft.tuners.lokr.layer": {},
    "peft.tuners.lora": {
        **_LORA_LAYERS,
        **_from("peftfast.interop.kinds", *(name for names in _PACKED.values() for name in names)),
    },
    **{f"peft.tuners.lora.{part}": _from("peftfast.interop.kinds", *names) for part, names in _PACKED.items()},
    "peft.tuners.lora.arrow": {"_resolve_adapter_source": "peftfast.arrow:source_of"},
    "peft.tuners.lora.config": {},
    "peft.tuners.lora.corda": _from("peftfast.methods.lora.corda", "CordaEigens"),
    "peft.tuners.lora.eva": {},
    "peft.tuners.lora.conversion": {},
    "peft.tuners.lora.intruders": {},
    "peft.tuners.lora.dora": {},
    "peft.tuners.lora.layer": {**_LORA_LAYERS, "MultiheadAttention": "peftfast.layers.attention:AttentionLayer"},
    "peft.tuners.lora.loraga": {},
    "peft.tuners.lora.model": {},
    "peft.tuners.lora.tp_layer": {},
    "peft.tuners.lora.variants": {
        "BlockDiagonalLinear": "peftfast.methods.lora.bdlora:BlockDiagonalLinear",
        **_from(
            "peftfast.methods.lora.alora",
            "calculate_alora_offsets",
            "get_alora_offsets_for_forward",
            "get_alora_offsets_for_generate",
            "is_alora_relevant_in_batch",
        ),
    },
    "peft.tuners.lora.monteclora": _from("peftfast.methods.lora.monteclora", "MontecloraSampler"),
    "peft.tuners.mixed": _MIXED,
    "peft.tuners.p_tuning": {},
    "peft.tuners.prefix_tuning": {},
    "peft.tuners.prompt_tuning": {},
    "peft.tuners.trainable_tokens": {},
    "peft.tuners.tuners_utils": {
        "inspect_matched_modules": "peftfast.status:inspect_matched_modules",
        "_maybe_include_all_linear_layers": "peftfast.interop.utilities:include_all_linear_layers",
        **_FUNCTIONAL,
    },
    "peft.utils": {
        "_get_submodules": "peftfast.interop.utilities:get_submodules",
        "fsdp_auto_wrap_policy": "peftfast.training.fsdp:fsdp_auto_wrap_policy",
    },
    "peft.utils.constants": {},
    "peft.utils.error": {},
    "peft.utils.loftq_utils": {},
    "peft.utils.hotswap": {},
    "peft.utils.integrations": {},
    "peft.utils.merge_utils": _from(
        "peftfast.interop.merge_utils",
        "calculate_majority_sign_mask",
        "dare_linear",
        "dare_ties",
        "disjoint_merge",
        "magnitude_based_pruning",
        "magnitude_prune",
        "prune",
        "random_pruning",
        "reshape_weight_task_tensors",
        "task_arithmetic",
        "ties",
    ),
    "peft.utils.peft_types": {},
    "peft.utils.quantization_utils": {},
    "peft.utils.save_and_load": {
        "_maybe_shard_state_dict_for_tp": "peftfast.interop.weight_mapping:refuse_tensor_parallel"
    },
    "peft.utils.transformers_weight_conversion": _from("peftfast.interop.weight_mapping", "build_peft_weight_mapping"),
    "peft.utils.warning": {},
}
MODULES |= {
    f"peft.tuners.{method}.{part}": {}
    for method in ("adalora", "ia3", "p_tuning", "prefix_tuning", "prompt_tuning", "trainable_tokens")
    for part in ("config", "model")
}
for _place, _layer in (("adalora", "AdaLoraLayer"), ("ia3", "IA3Layer"), ("trainable_tokens", "TrainableTokensLayer")):
    MODULES[f"peft.tuners.{_place}"][_layer] = f"peftfast.interop.kinds:{_layer}"
    MODULES[f"peft.tuners.{_place}.layer"] = MODULES[f"peft.tuners.{_place}"]
MODULES["peft.tuners.mixed.model"] = MODULES["peft.tuners.mixed"]
MODULES["peft.utils.other"] = MODULES["peft.utils"]

#: What every module below `peft` answers besides, as PEFT's import these of each other.
SHARED: dict[str, str] = {
    "BaseTuner": "peftfast.tuners.tuner:BaseTuner",
    "BaseTunerLayer": "peftfast.layers.own:LoraLayer",
    "CONFIG_NAME": "peftfast.config:CONFIG_NAME",
    "DUMMY_MODEL_CONFIG": "peftfast.tuners.tuner:DUMMY_MODEL_CONFIG",
    "EMBEDDING_LAYER_NAMES": "peftfast.embeddings:EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": "peftfast.wrapping.targets:ALL_LINEAR",
    "LoraLayer": "peftfast.layers.own:LoraLayer",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": "peftfast.wrapping.targets:MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "peftfast.interop.weight_mapping:PEFT_TYPE_TO_PREFIX_MAPPING",
    "ParamWrapper": "peftfast.layers.parameter:ParameterLayer",
    "SAFETENSORS_WEIGHTS_NAME": "peftfast.files.io:SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES": "peftfast.embeddings:SEQ_CLS_HEAD_NAMES",
    "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING": "peftfast.wrapping.default_targets:ADALORA",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": "peftfast.wrapping.default_targets:IA3_FEEDFORWARD",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING": "peftfast.wrapping.default_targets:IA3",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "peftfast.wrapping.default_targets:LORA",
    "WEIGHTS_NAME": "peftfast.files.io:WEIGHTS_NAME",
    "check_adapters_to_merge": "peftfast.layers.mergeable:check_adapters_to_merge",
    "check_target_module_exists": "peftfast.wrapping.targets:check_target_module_exists",
    "id_tensor_storage": "transformers.pytorch_utils:id_tensor_storage",
    **_from(
        "peftfast.layers.saved_modules", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper"
    ),
    **_from(
        "peftfast.interop.installed",
        "is_aqlm_available",
        "is_bnb_4bit_available",
        "is_bnb_available",
        "is_diffusers_available",
        "is_eetq_available",
        "is_gptqmodel_available",
        "is_hqq_available",
        "is_inc_available",
        "is_optimum_available",
        "is_te_available",
        "is_te_pytorch_available",
        "is_torch_tpu_available",
        "is_torchao_available",
        "is_torchao_ge_v0_18_0",
        "is_xpu_available",
    ),
    **_from(
        "peftfast.interop.utilities",
        "ALLOWED_COMPUTE_DTYPES",
        "DUMMY_TARGET_MODULES",
        "TOKENIZER_CONFIG_NAME",
        "UPCAST_DTYPES",
        "check_deepspeed_zero3_enabled",
        "dequantize_bnb_weight",
        "dequantize_module_weight",
        "find_parameter_name_by_module",
        "gather_params_ctx",
        "get_bnb_param_type",
        "get_device_map",
        "get_pattern_key",
        "get_quantization_config",
        "infer_device",
        "init_empty_weights",
        "match_target_against_key",
        "onload_layer",
        "str_to_bool",
        "transpose",
    ),
}


def lookup(module: str, name: str) -> Any:
    """What `from <module> import <name>` gives.

    Raises:
        AttributeError: peftfast has nothing of that name; says what is near.
    """
    import peftfast

    if name in peftfast.__all__:
        return getattr(peftfast, name)
    place = MODULES[module].get(name) or (SHARED.get(name) if module != "peft" else None)
    if place is None and (name in absent.NAMES or name in absent.INTERNAL.get(module, ())):
        return absent.placeholder(name)
    if place is None:
        raise AttributeError(
            f"module {module!r} (served by peftfast) has no attribute {name!r}.{close_matches(name, names(module))}"
        )
    source, _, attribute = place.partition(":")
    return getattr(importlib.import_module(source), attribute)


def names(module: str) -> list[str]:
    """Everything of ours that `lookup` answers for a module."""
    import peftfast

    return sorted({*peftfast.__all__, *MODULES[module], *(SHARED if module != "peft" else ())})
