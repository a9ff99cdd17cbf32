"""The next token from logits, on the device alone: settings are tensors, and nothing is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError if nothing could be drawn with these."""
    if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"Sampling takes temperature > 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}"
        )


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None) -> Tensor:
    """[B] tokens, each drawn by its chance.

    Args:
        logits: [B, V] fp32.
        temperature: [] what they are divided by.
        top_k, top_p: [] draw among the likeliest tokens only: so many (0: all), and as many as it takes for their
            chances to add up to so much. None, both of them: among all, without sorting.
    """
    logits = logits / temperature
    order = None
    if top_k is not None:
        logits, order = logits.sort(-1, descending=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill((rank >= top_k) & (top_k > 0), float("-inf"))
        chances = logits.softmax(-1)
        before = chances.cumsum(-1) - chances
        logits = logits.masked_fill((before >= top_p) & (rank > 0), float("-inf"))  # the first one is always kept
    # the largest of chance / exponential noise is a draw by chance (as torch.multinomial does it)
    noise = torch.empty_like(logits).exponential_()
    chosen = (logits.softmax(-1) / noise).argmax(-1)
    return chosen if order is None else order.gather(-1, chosen[:, None])[:, 0]
