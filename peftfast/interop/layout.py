"""Where PEFT keeps its names, and which of ours stands for each: the one table behind `import peftfast.as_peft`."""

from __future__ import annotations

import importlib
from typing import Any

from peftfast.errors import close_matches
from peftfast.interop import absent

_LORA_LAYERS = {
    "LoraLayer": "peftfast.layers.own:LoraLayer",
    **{name: f"peftfast.layers.kinds:{name}" for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")},
}

#: Modules that exist under the name `peft`. Each answers every public name of peftfast, as PEFT's modules import each
#: other's names, and in addition what is listed here: name -> "module:attribute".
MODULES: dict[str, dict[str, str]] = {
    "peft": {},
    "peft.auto": {},
    "peft.config": {"PeftConfigMixin": "peftfast.config:PeftConfigMixin"},
    "peft.functional": {
        name: f"peftfast.functional:{name}"
        for name in ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")
    },
    "peft.helpers": {
        name: f"peftfast.helpers:{name}"
        for name in (
            "DoraCaching",
            "MontecloraTrainerMixin",
            "check_if_peft_model",
            "disable_input_dtype_casting",
            "rescale_adapter_scale",
            "update_forward_signature",
            "update_generate_signature",
            "update_signature",
        )
    },
    "peft.import_utils": {"is_bnb_available": "peftfast.interop.submodules:is_bnb_available"},
    "peft.mapping": {"PEFT_TYPE_TO_PREFIX_MAPPING": "peftfast.interop.weight_mapping:PEFT_TYPE_TO_PREFIX_MAPPING"},
    "peft.mapping_func": {},
    "peft.mixed_model": {},
    "peft.optimizers": {
        "create_lorafa_optimizer": "peftfast.optimizers:create_lorafa_optimizer",
        "create_loraplus_optimizer": "peftfast.optimizers:create_loraplus_optimizer",
    },
    "peft.optimizers.lorafa": {
        "LoraFAOptimizer": "peftfast.optimizers:LoraFAOptimizer",
        "create_lorafa_optimizer": "peftfast.optimizers:create_lorafa_optimizer",
    },
    "peft.optimizers.loraplus": {"create_loraplus_optimizer": "peftfast.optimizers:create_loraplus_optimizer"},
    "peft.peft_model": {},
    "peft.tuners": {"LoraLayer": "peftfast.layers.own:LoraLayer"},
    "peft.tuners.adalora": {},
    "peft.tuners.ia3": {},
    "peft.tuners.loha": {},
    "peft.tuners.loha.layer": {},
    "peft.tuners.lokr": {},
    "peft.tuners.lokr.layer": {},
    "peft.tuners.lora": {**_LORA_LAYERS},
    "peft.tuners.lora.arrow": {
        "_resolve_adapter_source": "peftfast.arrow:source_of",
        "create_arrow_model": "peftfast.arrow:create_arrow_model",
    },
    "peft.tuners.lora.config": {},
    "peft.tuners.lora.corda": {
        "CordaEigens": "peftfast.methods.corda:CordaEigens",
        "preprocess_corda": "peftfast.calibration.corda:preprocess_corda",
    },
    "peft.tuners.lora.eva": {},
    "peft.tuners.lora.conversion": {},
    "peft.tuners.lora.intruders": {"reduce_intruder_dimension": "peftfast.many.intruders:reduce_intruder_dimension"},
    "peft.tuners.lora.layer": {
        **_LORA_LAYERS,
        "MultiheadAttention": "peftfast.layers.attention:AttentionLayer",
        "ParamWrapper": "peftfast.layers.parameter:ParameterLayer",
    },
    "peft.tuners.lora.loraga": {},
    "peft.tuners.lora.model": {},
    "peft.tuners.lora.variants": {
        "BlockDiagonalLinear": "peftfast.methods.bdlora:BlockDiagonalLinear",
        **{
            name: f"peftfast.methods.alora:{name}"
            for name in (
                "calculate_alora_offsets",
                "get_alora_offsets_for_forward",
                "get_alora_offsets_for_generate",
                "is_alora_relevant_in_batch",
            )
        },
    },
    "peft.tuners.lora.monteclora": {"MontecloraSampler": "peftfast.methods.monteclora:MontecloraSampler"},
    "peft.tuners.p_tuning": {},
    "peft.tuners.prefix_tuning": {},
    "peft.tuners.prompt_tuning": {},
    "peft.tuners.trainable_tokens": {},
    "peft.tuners.tuners_utils": {
        "BaseTuner": "peftfast.tuners.tuner:BaseTuner",
        "BaseTunerLayer": "peftfast.layers.own:LoraLayer",
        "check_target_module_exists": "peftfast.wrapping.targets:check_target_module_exists",
        "inspect_matched_modules": "peftfast.status:inspect_matched_modules",
        **{
            name: f"peftfast.functional:{name}"
            for name in ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")
        },
    },
    "peft.utils": {
        "AuxiliaryTrainingWrapper": "peftfast.layers.saved_modules:AuxiliaryTrainingWrapper",
        "CONFIG_NAME": "peftfast.config:CONFIG_NAME",
        "ModulesToSaveWrapper": "peftfast.layers.saved_modules:ModulesToSaveWrapper",
        "SAFETENSORS_WEIGHTS_NAME": "peftfast.files.io:SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "peftfast.wrapping.default_targets:LORA",
        "TrainableTokensWrapper": "peftfast.layers.saved_modules:TrainableTokensWrapper",
        "WEIGHTS_NAME": "peftfast.files.io:WEIGHTS_NAME",
        "_get_submodules": "peftfast.interop.submodules:get_submodules",
        "fsdp_auto_wrap_policy": "peftfast.training.fsdp:fsdp_auto_wrap_policy",
        "infer_device": "peftfast.interop.submodules:infer_device",
    },
    "peft.utils.constants": {
        "DUMMY_MODEL_CONFIG": "peftfast.tuners.tuner:DUMMY_MODEL_CONFIG",
        "EMBEDDING_LAYER_NAMES": "peftfast.wrapping.targets:EMBEDDING_LAYER_NAMES",
        "INCLUDE_LINEAR_LAYERS_SHORTHAND": "peftfast.wrapping.targets:ALL_LINEAR",
        "MIN_TARGET_MODULES_FOR_OPTIMIZATION": "peftfast.wrapping.targets:MIN_TARGET_MODULES_FOR_OPTIMIZATION",
        "SEQ_CLS_HEAD_NAMES": "peftfast.wrapping.targets:SEQ_CLS_HEAD_NAMES",
    },
    "peft.utils.error": {},
    "peft.utils.loftq_utils": {},
    "peft.utils.hotswap": {
        name: f"peftfast.many.hotswap:{name}"
        for name in (
            "check_hotswap_configs_compatible",
            "hotswap_adapter",
            "hotswap_adapter_from_state_dict",
            "prepare_model_for_compiled_hotswap",
        )
    },
    "peft.utils.peft_types": {},
    "peft.utils.save_and_load": {
        "_maybe_shard_state_dict_for_tp": "peftfast.interop.weight_mapping:refuse_tensor_parallel"
    },
    "peft.utils.transformers_weight_conversion": {
        "build_peft_weight_mapping": "peftfast.interop.weight_mapping:build_peft_weight_mapping"
    },
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
MODULES["peft.utils.other"] = {**MODULES["peft.utils"], **MODULES["peft.utils.constants"]}
MODULES["peft.utils"] |= MODULES["peft.utils.constants"]


def lookup(module: str, name: str) -> Any:
    """What `from <module> import <name>` gives.

    Raises:
        AttributeError: peftfast has nothing of that name; says what is near.
    """
    import peftfast

    if name in peftfast.__all__:
        return getattr(peftfast, name)
    place = MODULES[module].get(name)
    if place is None and name in absent.NAMES:
        return absent.placeholder(name)
    if place is None:
        raise AttributeError(
            f"module {module!r} (served by peftfast) has no attribute {name!r}.{close_matches(name, names(module))}"
        )
    source, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(source), attribute)
    except ModuleNotFoundError as e:
        if e.name != source:
            raise
        raise AttributeError(f"module {module!r} (served by peftfast) does not provide {name!r} yet") from e


def names(module: str) -> list[str]:
    """Everything that `lookup` answers for a module."""
    import peftfast

    return sorted({*peftfast.__all__, *MODULES[module]})
