"""Which modules of a model are its embeddings and heads: by transformers' own methods, which not every model has, and
by the names that they usually have."""

from __future__ import annotations

from torch import nn

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """None: the model has none, or does not say which it is."""
    return _ask(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The head; None: the model has none, or does not say which it is."""
    return _ask(model, "get_output_embeddings")


def _ask(model: nn.Module, method: str) -> nn.Module | None:
    ask = getattr(model, method, None)
    try:
        found = None if ask is None else ask()
    except (AttributeError, NotImplementedError):  # models of several parts (FLAVA) do not say
        return None
    return found if isinstance(found, nn.Module) else None
