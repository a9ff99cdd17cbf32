"""Names that PEFT has and peftfast has not. Libraries import them to tell methods apart, so the import must work; using
one says what to do instead."""

from __future__ import annotations

import functools
from typing import Any

#: In any module under the name `peft`.
NAMES = frozenset(
    """
    AdaLoraConfig AdaLoraLayer AdaLoraModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig BdLoraConfig BOFTConfig
    BOFTModel C3AConfig C3AModel CPTConfig CPTEmbedding CordaConfig DeloraConfig DeloraModel EvaConfig FourierFTConfig
    FourierFTModel GraloraConfig GraloraModel HRAConfig HRAModel IA3Config IA3Layer IA3Model KasaConfig LNTuningConfig
    LNTuningModel LoHaConfig LoHaLayer LoHaModel LoKrConfig LoKrLayer LoKrModel LoraGAConfig MissConfig MissModel
    MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit OFTConfig OFTModel OSFConfig OSFModel
    PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
    PromptEncoderReparameterizationType PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel RandLoraConfig
    RandLoraModel RoadConfig RoadModel ShiraConfig ShiraModel VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig VeraModel
    WaveFTConfig WaveFTModel XLoraConfig XLoraModel convert_to_lora create_arrow_model create_riemannian_optimizer
    factorization get_eva_state_dict initialize_lora_eva_weights prepare_model_for_kbit_training preprocess_loraga
    replace_lora_weights_loftq save_as_lora shift_tokens_right
    """.split()
)


class _Refused:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} is not provided by peftfast, which stands in for peft in this process. Use the "
            "peft package itself for it."
        )


@functools.cache
def placeholder(name: str) -> type:
    """A class of which nothing is an instance and whose call raises NotImplementedError."""
    return type(name, (_Refused,), {"__module__": __name__, "__doc__": "Not provided by peftfast."})
