"""PeftModel by task: the argument names of `forward` that trainers read, and the heads that train with the adapter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from peftfast.config import PeftConfig, TaskType
from peftfast.errors import MissingTaskTypeError
from peftfast.model import PeftModel

_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


def _forward(*names: str) -> Callable[..., Any]:
    """A `forward` that takes these arguments by position or by name, and any others by name.

    Trainers read the names to decide which columns of a data set to keep. What is None is not passed on: base models
    differ in which arguments they take. Where they take no text at all, positions are the base model's own.
    """
    known = frozenset(names)

    def forward(self: PeftModel, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if args and not _takes(type(self.get_base_model()).forward, names[0]):
            return self._run(*args, **kwargs)
        if len(args) > len(names):
            raise TypeError(f"forward takes at most {len(names)} arguments by position ({', '.join(names)})")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise TypeError(f"forward got {name!r} by position and by name")
            kwargs[name] = value
        return self._run(**{k: v for k, v in kwargs.items() if v is not None or k not in known})

    kind = inspect.Parameter
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kind("self", kind.POSITIONAL_OR_KEYWORD),
            *(kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in (*names, "task_ids")),
            kind("kwargs", kind.VAR_KEYWORD),
        ]
    )
    return forward


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a method has an argument of this name, as far as it names its arguments."""
    kinds = inspect.Parameter
    given = inspect.signature(forward).parameters.values()
    named = [p.name for p in given if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)]
    return name in named or len(named) <= 1


class _Generating(PeftModel):
    """What generates step by step."""

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        return self._tuner.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForCausalLM(_Generating):
    """Causal language modelling."""

    forward = _forward(*_INPUTS, "labels", *_OUTPUTS)


class PeftModelForSeq2SeqLM(_Generating):
    """Encoder-decoder language modelling."""

    forward = _forward(
        *_INPUTS, "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels", *_OUTPUTS
    )

    def generate(self, **kwargs: Any) -> Any:
        return super().generate(**kwargs)


class _WithHead(PeftModel):
    """A task whose head is new and therefore trained in full and saved with the adapter."""

    head_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._keep_head(peft_config)
        super().__init__(model, peft_config, *args, **kwargs)

    @classmethod
    def _keep_head(cls, cfg: PeftConfig) -> None:
        if hasattr(cfg, "modules_to_save"):
            names = list(cfg.modules_to_save or ())
            cfg.modules_to_save = [*names, *(n for n in cls.head_names if n not in names)]

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        self._keep_head(peft_config)
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)

    forward = _forward(*_INPUTS, "labels", *_OUTPUTS)


class PeftModelForSequenceClassification(_WithHead):
    """Sequence classification."""

    head_names = ("classifier", "score")


class PeftModelForTokenClassification(_WithHead):
    """Token classification."""

    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(_WithHead):
    """Extractive question answering."""

    head_names = ("qa_outputs",)
    forward = _forward(
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions",
        "end_positions", *_OUTPUTS,
    )  # fmt: skip


class PeftModelForFeatureExtraction(PeftModel):
    """Embeddings from the hidden states."""

    forward = _forward(*_INPUTS, *_OUTPUTS)


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
