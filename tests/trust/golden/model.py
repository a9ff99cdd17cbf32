"""The base model of the golden files: plain torch, the same bits wherever it is built."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN, VOCABULARY = 8, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Tiny(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom", "_name_or_path": ""}
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        fill(self, scale=0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.body.layers:
            x = layer(x)
        return self.head(x)


def values(count: int, start: int) -> torch.Tensor:
    """Numbers in [-1, 1] from integer arithmetic: no generator, no library version in them."""
    i = torch.arange(start, start + count, dtype=torch.int64)
    return (((i * 7919 + 104729) * 31 % 2003).double() / 1001.0 - 1.0).float()


def fill(model: nn.Module, scale: float, only: str = "") -> None:
    """Give every parameter whose name contains `only` its numbers, in the order of names."""
    start = 0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if only in name and parameter.is_floating_point():
                parameter.copy_(values(parameter.numel(), start).reshape(parameter.shape) * scale)
                start += parameter.numel()


def inputs() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % VOCABULARY
