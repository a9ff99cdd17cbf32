"""P-tuning (arXiv 2103.10385): prompt tuning whose embeddings come out of a small network."""

from __future__ import annotations

import enum
from typing import ClassVar

from torch import nn

from peftfast.config import PeftType, PromptLearningConfig, checked, register_config, setting
from peftfast.errors import warn
from peftfast.method import register_method
from peftfast.methods.prompt_tuning import PromptTuning, as_choice
from peftfast.prompts.prompt import BasePromptEncoder
from peftfast.rules import integer, number, one_of, optional


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network: three linear layers, or a bidirectional LSTM and two."""

    MLP = "MLP"
    LSTM = "LSTM"


_MLP_LAYERS = 2


@register_config(PeftType.P_TUNING)
@checked
class PromptEncoderConfig(PromptLearningConfig):
    """Prompt tuning whose embeddings come out of a small network (P-tuning, Liu et al., arXiv 2103.10385).

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: of the network; None: the model's.
        encoder_num_layers: of the LSTM.
        encoder_dropout: between the layers of the LSTM.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = setting(
        one_of(*PromptEncoderReparameterizationType), default=PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = setting(optional(integer(1)), default=None)
    encoder_num_layers: int = setting(integer(1), default=_MLP_LAYERS)
    encoder_dropout: float = setting(number(0, 1), default=0.0)

    def __post_init__(self) -> None:
        self.encoder_reparameterization_type = as_choice(
            self.encoder_reparameterization_type,
            PromptEncoderReparameterizationType,
            f"{type(self).__name__}.encoder_reparameterization_type",
        )
        super().__post_init__()


class PromptEncoder(BasePromptEncoder):
    """Embeddings and the network they go through; for inference the network's output alone.

    Args:
        config: with all sizes filled in.
    """

    networks = ("lstm_head", "mlp_head")

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        if config.inference_mode:
            return
        width, hidden = self.token_dim, self.hidden_size
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            self.lstm_head = nn.LSTM(
                input_size=width, hidden_size=hidden, num_layers=config.encoder_num_layers,
                dropout=config.encoder_dropout, bidirectional=True, batch_first=True,
            )  # fmt: skip
            self.mlp_head = nn.Sequential(nn.Linear(hidden * 2, hidden * 2), nn.ReLU(), nn.Linear(hidden * 2, width))
            return
        if config.encoder_num_layers != _MLP_LAYERS:
            warn(
                f"for {self.encoder_type.value}, the argument `encoder_num_layers` is ignored. "
                f"Exactly {_MLP_LAYERS} MLP layers are used."
            )
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )


@register_method
class PTuning(PromptTuning):
    """Enters the model as prompt tuning does."""

    peft_type: ClassVar[str] = PeftType.P_TUNING
    prefix: ClassVar[str] = "p_tuning_"

    def claims(self, cfg: PromptLearningConfig) -> bool:
        return isinstance(cfg, PromptEncoderConfig)

    def encoder(self, cfg: PromptEncoderConfig, model: nn.Module) -> BasePromptEncoder:
        return PromptEncoder(cfg)
