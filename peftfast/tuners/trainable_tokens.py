"""The module around trained rows of embeddings."""

from __future__ import annotations

from peftfast.tuners.tuner import BaseTuner


class TrainableTokensModel(BaseTuner):
    """A model some of whose token rows are trained."""

    prefix = "trainable_tokens_"
