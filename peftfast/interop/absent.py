"""Names that PEFT has and peftfast has not. Libraries import them to tell methods apart, so the import must work; using
one says what to do instead."""

from __future__ import annotations

import functools
from typing import Any

#: In any module under the name `peft`.
NAMES = frozenset(
    """
    AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel BOFTConfig BOFTModel
    BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder
    DeftConfig DeftModel DeloraConfig DeloraModel FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig
    GloraModel GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel LNTuningConfig
    LNTuningModel LilyConfig LilyModel LoHaConfig LoHaLayer LoHaModel LoKrConfig LoKrLayer LoKrModel
    MissConfig MissModel MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel
    OSFConfig OSFModel PeanutConfig PeanutModel PolyConfig PolyModel PsoftConfig PsoftModel PveraConfig PveraModel
    RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig
    SupertuningModel TinyLoraConfig TinyLoraModel UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel
    VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel bloom_model_postprocess_past_key_value
    compose_cartridge_adapters factorization register_peft_method
    """.split()
)

#: In these modules alone: steps and parts of PEFT's own that libraries read or replace.
INTERNAL: dict[str, tuple[str, ...]] = {
    "peft.tuners.adalora": ("SVDConv2d", "SVDLinear", "SVDQuantLinear"),
    "peft.tuners.adalora.layer": ("SVDConv2d", "SVDLinear"),
    **{
        f"peft.tuners.lora.{part}": (f"dispatch_{part}",)
        for part in ("aqlm", "awq", "eetq", "gptq", "hqq", "torchao")
    },
    "peft.tuners.lora.bnb": ("dispatch_bnb_4bit", "dispatch_bnb_8bit"),
    "peft.tuners.lora.dora": (
        "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer", "DoraEmbeddingLayer", "DoraLinearLayer",
    ),
    "peft.tuners.lora.layer": ("LoraVariant", "_LoraParameterProxy", "dispatch_default"),
    "peft.tuners.lora.model": ("dispatch_default",),
    "peft.tuners.lora.tp_layer": ("LoraParallelLinear", "dispatch_megatron"),
    "peft.tuners.lora.variants": (
        "ALoraLinearVariant", "ArrowLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant",
        "DoraEmbeddingVariant", "DoraLinearVariant", "LoraVariant", "MiCAEmbeddingVariant", "MiCALinearVariant",
        "QALoraLinearVariant", "VeloraLinearVariant",
    ),
    "peft.tuners.tuners_utils": ("_ExcludedModule",),
    "peft.utils.quantization_utils": (
        "Bnb4bitBackend", "Bnb8bitBackend", "ForwardOnlyQuantizationBackend", "HqqBackend", "QuantizationBackend",
        "TorchaoBackend", "get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend",
    ),
}  # fmt: skip


def is_method(peft_type: object) -> bool:
    """Whether `peft_type` is one of PEFT's that peftfast has no config for."""
    return str(peft_type).replace("_", "") in {n.removesuffix("Config").upper() for n in NAMES if n.endswith("Config")}


class _Refused:
    # diffusers reads where layers keep an adapter's tensors off the classes, to leave those in their dtype
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} is not provided by peftfast, which stands in for peft in this process. Use the "
            "peft package itself for it."
        )

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """There for libraries that replace it in every class of models."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """There for the same reason."""


@functools.cache
def placeholder(name: str) -> type:
    """A class of which nothing is an instance and whose call raises NotImplementedError."""
    return type(name, (_Refused,), {"__module__": __name__, "__doc__": "Not provided by peftfast."})
