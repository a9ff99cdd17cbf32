"""PeftModel by task: the argument names of `forward` that trainers read, and the heads that train with the adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peftfast.config import PeftConfig, TaskType
from peftfast.errors import MissingTaskTypeError
from peftfast.model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """Causal language modelling."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._tuner(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return self._tuner.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """Encoder-decoder language modelling."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._tuner(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask,
                decoder_inputs_embeds=decoder_inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )

    def generate(self, **kwargs: Any) -> Any:
        return super().generate(**kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        return self._tuner.prepare_inputs_for_generation(*args, **kwargs)


class _WithHead(PeftModel):
    """A task whose head is new and therefore trained in full and saved with the adapter."""

    head_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._keep_head(model, peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    def _keep_head(self, model: nn.Module, cfg: PeftConfig) -> None:
        if hasattr(cfg, "modules_to_save"):
            names = list(cfg.modules_to_save or ())
            cfg.modules_to_save = [*names, *(n for n in self.head_names if n not in names)]

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._keep_head(self.get_base_model(), peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._tuner(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )


class PeftModelForSequenceClassification(_WithHead):
    """Sequence classification."""

    head_names = ("classifier", "score")


class PeftModelForTokenClassification(_WithHead):
    """Token classification."""

    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(_WithHead):
    """Extractive question answering."""

    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._tuner(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                start_positions=start_positions,
                end_positions=end_positions,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )


class PeftModelForFeatureExtraction(PeftModel):
    """Embeddings from the hidden states."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        return self._tuner(
            **given(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
            ),
            **kwargs,
        )


def given(**arguments: Any) -> dict[str, Any]:
    """The arguments that were passed: base models differ in which they take."""
    return {k: v for k, v in arguments.items() if v is not None}


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def model_class(cfg: PeftConfig) -> type[PeftModel]:
    """The PeftModel class for a config's task."""
    if cfg.task_type is None:
        if cfg.is_prompt_learning:
            raise MissingTaskTypeError(
                f"{type(cfg).__name__} needs a task_type, because virtual tokens enter each kind of model differently: "
                f"one of {', '.join(t.value for t in TaskType)}"
            )
        return PeftModel
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cfg.task_type]
