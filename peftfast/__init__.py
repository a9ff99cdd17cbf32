"""peftfast: PEFT's API and files over fused kernels.

    import peftfast

    model = peftfast.patch(model, peftfast.LoraConfig(r=16, target_modules="all-linear"))

Names are imported when first used: importing this package imports neither transformers, Triton nor bitsandbytes.
"""

from __future__ import annotations

import importlib
from typing import Any

from peftfast.version import __version__ as __version__

#: module -> the public names in it
_PUBLIC: dict[str, tuple[str, ...]] = {
    "tuners.adalora": ("AdaLoraModel",),
    "api": (
        "cast_mixed_precision_params",
        "get_base_model_state_dict",
        "get_peft_model",
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "patch",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
    "auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "training.averaging": ("AdapterAverage",),
    "training.blocks": ("fuse_blocks",),
    "training.capture.decoding": ("capture_decoding",),
    "training.capture.training_step": ("capture_training_step",),
    "training.liger.switch": ("use_liger",),
    "config": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PeftConfig",
        "PeftType",
        "PromptLearningConfig",
        "TaskType",
        "get_peft_config",
    ),
    "calibration.corda": ("preprocess_corda",),
    "calibration.lora_ga": ("preprocess_loraga",),
    "calibration.prefix": (
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "errors": (
        "AdapterLoadError",
        "AdapterMismatchWarning",
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
    ),
    "calibration.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "tuners.ia3": ("IA3Model",),
    "many.hotswap": (
        "check_hotswap_configs_compatible",
        "hotswap_adapter",
        "hotswap_adapter_from_state_dict",
    ),
    "many.swappable": ("prepare_model_for_compiled_hotswap",),
    "files.contents": ("Contents", "adapter_contents"),
    "files.io": ("load_peft_weights",),
    "quantization.kbit": ("prepare_model_for_kbit_training",),
    "methods.adalora": ("AdaLoraConfig",),
    "methods.ia3": ("IA3Config",),
    "methods.lora.config": ("LoraConfig",),
    "methods.lora.settings": (
        "ArrowConfig",
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "VeloraConfig",
    ),
    "methods.p_tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "methods.prefix_tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "methods.prompt_tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "methods.trainable_tokens": ("TrainableTokensConfig",),
    "mixed_model": ("PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PeftMixedModel"),
    "model": ("PEFT_TYPE_TO_TUNER_MAPPING", "PeftModel"),
    "quantization.quantize": ("QuantizationReport", "dequantize_model", "quantize_model", "replace_lora_weights_loftq"),
    "prompts.prompt_model": ("nearest_tokens", "resize_prompt"),
    "arrow": ("create_arrow_model",),
    "extraction.adapters": ("convert_to_lora", "save_as_lora"),
    "extraction.models": ("extract_lora",),
    "many.intruders": ("reduce_intruder_dimension",),
    "many.pool": ("AdapterPool",),
    "many.router": ("Router",),
    "calibration.kappa": ("KappaTuneSelector", "find_kappa_target_modules"),
    "calibration.rank_discovery": ("discover_ranks",),
    "status": ("get_layer_status", "get_model_status"),
    "interop.takeover": ("patch_report", "unpatch"),
    "interop.utilities": ("shift_tokens_right",),
    "tasks": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "tuners.lora": ("LoraModel",),
    "tuners.trainable_tokens": ("TrainableTokensModel",),
    "plan": ("AdapterPlan", "plan_adapter"),
}

#: Modules that are names of the package themselves, as `helpers` is in PEFT.
_MODULES = ("functional", "helpers", "optimizers")

_WHERE = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_instead(name)}")
    try:
        found = importlib.import_module(f"{__name__}.{module}")
    except AttributeError as e:  # of which `from peftfast import ...` would say that there is no such name here
        raise ImportError(f"peftfast {__version__} does not run with what is installed: {e}") from e
    value = getattr(found, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


def _instead(name: str) -> str:
    """Where to go for what this package does not have under this name."""
    if name.startswith("_"):
        return ""
    from peftfast.errors import close_matches
    from peftfast.interop import absent, layout

    if name in absent.NAMES:
        return ", which peftfast does not provide; use the peft package itself for it"
    if f"peft.{name}" in layout.MODULES:
        return f"; `import peftfast.as_peft`, and what PEFT has there is in peft.{name}"
    return "." + close_matches(name, __all__)
