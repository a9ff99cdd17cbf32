"""Prompt tuning (arXiv 2104.08691): trained embeddings in front of the input's."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftfast.config import PeftType, PromptLearningConfig, TaskType, checked, register_config, setting
from peftfast.errors import close_matches, warn
from peftfast.method import register_method
from peftfast.prompts.prefix_cache import grown, holds_tokens, take_cache
from peftfast.prompts.prompt import (
    BasePromptEncoder,
    Inputs,
    Prompts,
    batch_size_of,
    drop_token_types,
    fill_sizes,
    per_layer_inputs,
    widen_mask,
    word_embeddings_name,
)
from peftfast.rules import one_of, optional, table, text


class PromptTuningInit(str, enum.Enum):
    """Where the first embeddings come from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


def as_choice(value: Any, choices: type[enum.Enum], name: str) -> Any:
    """A config's string as a member of an enumeration; ValueError with the nearest one."""
    try:
        return choices(value)
    except ValueError:
        known = [c.value for c in choices]
        raise ValueError(
            f"{name} must be one of {', '.join(known)}, got {value!r}.{close_matches(value, known)}"
        ) from None


@register_config(PeftType.PROMPT_TUNING)
@checked
class PromptTuningConfig(PromptLearningConfig):
    """Trained embeddings in front of the input's (Lester et al., arXiv 2104.08691).

    Args:
        prompt_tuning_init: TEXT starts from the embeddings of a text, SAMPLE_VOCAB from those of random tokens, RANDOM
            from a normal distribution.
        prompt_tuning_init_text: for TEXT; cut or repeated to the prompt's length.
        tokenizer_name_or_path: for TEXT.
        tokenizer_kwargs: for TEXT, of `AutoTokenizer.from_pretrained`; `trust_remote_code` is not passed on, since a
            config file may come from anybody.
    """

    prompt_tuning_init: PromptTuningInit | str = setting(one_of(*PromptTuningInit), default=PromptTuningInit.RANDOM)
    prompt_tuning_init_text: str | None = setting(optional(text()), default=None)
    tokenizer_name_or_path: str | None = setting(optional(text()), default=None)
    tokenizer_kwargs: dict | None = setting(optional(table()), default=None)

    def __post_init__(self) -> None:
        name = f"{type(self).__name__}.prompt_tuning_init"
        self.prompt_tuning_init = as_choice(self.prompt_tuning_init, PromptTuningInit, name)
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            if not self.tokenizer_name_or_path:
                raise ValueError(
                    f"When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be {self.tokenizer_name_or_path}."
                )
            if self.prompt_tuning_init_text is None:
                raise ValueError("When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.")
        elif self.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEmbedding(BasePromptEncoder):
    """The prompt itself.

    Args:
        config: with all sizes filled in.
        word_embeddings: of the base model, for TEXT and SAMPLE_VOCAB.
    """

    def __init__(self, config: PromptTuningConfig, word_embeddings: nn.Module) -> None:
        super().__init__()
        rows = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(rows, config.token_dim)
        if config.inference_mode or config.prompt_tuning_init == PromptTuningInit.RANDOM:
            return
        device = word_embeddings.weight.device
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            tokens = torch.randint(0, word_embeddings.num_embeddings, (rows,)).to(device)
        else:
            tokens = torch.tensor(_text_tokens(config, rows), device=device)
        with torch.no_grad():
            self.embedding.weight = nn.Parameter(word_embeddings(tokens).detach().to(torch.float32).clone())


def _text_tokens(config: PromptTuningConfig, count: int) -> list[int]:
    from transformers import AutoTokenizer

    arguments = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **arguments)
    tokens = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not tokens:
        raise ValueError(f"prompt_tuning_init_text {config.prompt_tuning_init_text!r} has no tokens")
    return (tokens * math.ceil(count / len(tokens)))[:count]


#: Tasks with a label for every token, which the virtual tokens need too.
_LABEL_PER_TOKEN = (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS)


@register_method
class PromptTuning:
    """Virtual tokens are rows of input embeddings, in front of the others (left of any padding)."""

    peft_type: ClassVar[str] = PeftType.PROMPT_TUNING
    prefix: ClassVar[str] = "prompt_tuning_"
    in_encoder: ClassVar[bool] = True

    def claims(self, cfg: PromptLearningConfig) -> bool:
        return isinstance(cfg, PromptTuningConfig)

    def fill_sizes(self, cfg: PromptLearningConfig, model: nn.Module) -> None:
        fill_sizes(cfg, getattr(model, "config", None))

    def encoder(self, cfg: PromptTuningConfig, model: nn.Module) -> BasePromptEncoder:
        return PromptEmbedding(cfg, model.get_submodule(word_embeddings_name(model)))

    def attach(
        self, encoder: Prompts, cfg: PromptLearningConfig, inputs: Inputs, model: nn.Module, *, generating: bool = False
    ) -> Inputs:
        inputs, count = dict(inputs), cfg.num_virtual_tokens
        mask = inputs.get("attention_mask")
        if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):
            raise ValueError(
                "Prompt tuning needs an attention_mask of shape [batch, tokens], got "
                f"{'a dict of masks' if isinstance(mask, dict) else tuple(mask.shape)}; prefix tuning takes any"
            )
        if mask is not None:
            inputs["attention_mask"] = widen_mask(mask, count)
        if inputs.pop("position_ids", None) is not None and not generating:
            warn("Position ids are not supported for parameter efficient tuning. Ignoring position ids.")
        drop_token_types(cfg, inputs)
        name, cache = take_cache(inputs, model)
        if holds_tokens(cache) and not getattr(model.config, "is_encoder_decoder", False):
            return {**inputs, name: cache}
        if cache is not None:
            inputs[name] = grown(cache, count, model)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = model.get_submodule(encoder.words or word_embeddings_name(model))(inputs["input_ids"])
        rows = per_layer_inputs(inputs, embeds, count, model)
        if rows is not None:
            inputs["per_layer_inputs"] = rows
        inputs.pop("input_ids", None)
        batch = batch_size_of({"inputs_embeds": embeds})
        prompts = encoder.prompts(batch)[:, :count].to(device=embeds.device, dtype=embeds.dtype)
        inputs["inputs_embeds"] = torch.cat((prompts, embeds), dim=1)
        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = torch.cat((types.new_zeros(batch, count), types), dim=1)
        if cfg.task_type in _LABEL_PER_TOKEN:
            for name in ("labels", "shift_labels"):
                labels = inputs.get(name)
                if labels is not None:
                    inputs[name] = torch.cat((labels.new_full((batch, count), -100), labels), dim=1)
        return inputs

    @contextmanager
    def around(self, model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        yield inputs

    def shown(self, prompt: Tensor, cfg: PromptLearningConfig, model: nn.Module) -> Tensor:
        return prompt
