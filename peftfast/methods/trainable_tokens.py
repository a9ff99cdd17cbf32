"""Trainable tokens: some rows of an embedding (and of a head tied to it) are trained and replace the base's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.base.offload import at_hand
from peftfast.config import PeftConfig, PeftType, checked, register_config, setting
from peftfast.embeddings import input_embeddings
from peftfast.errors import enumerate_some
from peftfast.layers.walk import name_of
from peftfast.method import register_method
from peftfast.ops.function import writable
from peftfast.rules import boolean, either, integer, optional, sequence, text
from peftfast.sharding import put_together, taken_apart
from peftfast.sites import Dense, Site, Slot
from peftfast.sites.embedding import scaled_by
from peftfast.sites.site import bias_at_hand, is_plain

#: Elements of a table up to which a copy with the rows in it takes less than what is done with these beside it.
SMALL = 1 << 18


@register_config(PeftType.TRAINABLE_TOKENS)
@checked
class TrainableTokensConfig(PeftConfig):
    """Single rows of embeddings, trained and saved in place of the whole tables.

    Args:
        token_indices: rows to train.
        target_modules: the embedding(s); None: the model's input embedding.
        init_weights: start from the base's rows; False: from random ones.
    """

    token_indices: list[int] = setting(sequence(integer(0), distinct=True), default=[])
    target_modules: list[str] | str | None = setting(optional(either(text(), sequence(text()))), default=None)
    init_weights: bool = setting(boolean(), default=True)


@register_method
class TrainableTokens:
    """The trained rows are stored themselves, not their difference from the base's."""

    peft_type: ClassVar[str] = PeftType.TRAINABLE_TOKENS
    prefix: ClassVar[str] = "trainable_tokens_"
    family: ClassVar[str] = "trainable_tokens"
    layer_name: ClassVar[str] = "TrainableTokensLayer"
    peft_layer: ClassVar[str] = "tuners.trainable_tokens.layer.TrainableTokensLayer"
    default_targets: ClassVar[Mapping[str, Any]] = {}
    always_ties: ClassVar[bool] = True

    def claims(self, cfg: PeftConfig) -> bool:
        return isinstance(cfg, TrainableTokensConfig)

    def choose_targets(self, cfg: TrainableTokensConfig, model: nn.Module) -> None:
        """None is the input embedding, by its whole name; of a model that does not say which, what is called so."""
        if cfg.target_modules is None:
            name = name_of(model, input_embeddings(model))
            usual = "embed_tokens"
            if name is None and any(n.rpartition(".")[2] == usual for n, _ in model.named_modules()):
                cfg.target_modules = [usual]
                return
            if name is None:
                raise ValueError(
                    f"Target modules {usual} not found in the base model. Please specify `target_modules` in "
                    f"`peft_config`: {type(model).__name__} does not say which its input embedding is "
                    "(get_input_embeddings), whose rows a TrainableTokensConfig trains by default"
                )
            cfg.target_modules = name

    def describe(self, cfg: TrainableTokensConfig, key: str, tensors: Mapping[str, Tensor]) -> str:
        return f"rows {enumerate_some(cfg.token_indices)} of the table"

    def tied_slots(self, site: Site) -> Mapping[str, str]:
        return {"trainable_tokens_delta": "trainable_tokens_delta"}

    def settings(self, site: Site, cfg: TrainableTokensConfig, key: str) -> Mapping[str, Any]:
        rows = site.weight.shape[0]
        outside = [i for i in cfg.token_indices if not 0 <= i < rows]
        if outside:
            raise ValueError(
                f"trainable_token_indices {outside} are outside the embedding, which has rows 0 to {rows - 1}; "
                "model.resize_token_embeddings(...) adds rows"
            )
        return {"token_indices": list(cfg.token_indices)}

    def slots(self, site: Site, cfg: TrainableTokensConfig, settings: Mapping[str, Any]) -> Mapping[str, Slot]:
        return {"trainable_tokens_delta": Slot((len(settings["token_indices"]), site.weight.shape[1]))}

    def init(self, site: Site, adapter: Adapter) -> None:
        rows = adapter["trainable_tokens_delta"]
        if adapter.cfg.init_weights:
            rows.copy_(put_together(site.weight.dense())[adapter.setting("token_indices")])
        else:
            rows.normal_()

    def forward(self, site: Site, x: Tensor, y: Tensor | None, active: Sequence[Adapter]) -> Tensor:
        self.check_together(active)
        m = site.module
        weight, looks_up = at_hand(m), isinstance(m, nn.Embedding)
        bias = None if looks_up else bias_at_hand(m)
        if weight.numel() > SMALL and is_plain(weight) and (not looks_up or site.segmented(x)):
            y = F.embedding(x, weight, m.padding_idx) if looks_up else F.linear(x, weight, bias)
            for adapter in active:
                if adapter.setting("token_indices"):
                    y = _looked_up(m, x, y, adapter) if looks_up else _multiplied(x, y, weight, bias, adapter)
            return scaled_by(m, y) if looks_up else y
        for adapter in active:
            weight = weight.index_copy(0, _index(adapter, weight), adapter["trainable_tokens_delta"].to(weight))
        if looks_up:
            y = F.embedding(x, weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)
            return scaled_by(m, y)
        return F.linear(x, weight, bias)

    def check_together(self, adapters: Sequence[Adapter]) -> None:
        """Two adapters that replace the same row have no meaning together."""
        seen: set[int] = set()
        for adapter in adapters:
            rows = set(adapter.setting("token_indices"))
            if rows & seen:
                raise ValueError(
                    f"Token indices of adapter {adapter.name} are already defined and would result in undefined "
                    f"merging behavior: {sorted(rows & seen)}. Only disjunct token indices are currently supported."
                )
            seen |= rows

    def merged(self, site: Site, dense: Dense, adapter: Adapter, base: Dense) -> Dense:
        weight, rows = map(put_together, (dense.weight, adapter["trainable_tokens_delta"]))
        weight = weight.index_copy(0, _index(adapter, weight), rows.to(weight))
        return dense._replace(weight=taken_apart(weight, dense.weight))


def _looked_up(m: nn.Embedding, x: Tensor, y: Tensor, adapter: Adapter) -> Tensor:
    """Rows y [..., K] of the table for ids x [...], with the adapter's in their places."""
    ids, rows = adapter.setting("token_indices"), adapter["trainable_tokens_delta"].to(y)
    numbers = torch.arange(len(ids), device=x.device)
    places = torch.full((len(m.weight),), len(ids), device=x.device).index_copy(0, _index(adapter, x), numbers)[x]
    padding = ids.index(m.padding_idx) if m.padding_idx in ids else None  # which gets no gradient
    own = F.embedding(places.clamp(max=len(ids) - 1), rows, padding)
    return torch.where((places < len(ids)).unsqueeze(-1), own, y)


def _multiplied(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """Products y [..., N] of x [..., K] with the table, with those of the adapter's rows in their places."""
    index = _index(adapter, x)
    own = F.linear(x, adapter["trainable_tokens_delta"].to(weight), None if bias is None else bias[index])
    return y.index_copy_(-1, index, own) if writable() else y.index_copy(-1, index, own)  # nobody else has y


def _index(adapter: Adapter, like: Tensor) -> Tensor:
    return torch.tensor(adapter.setting("token_indices"), dtype=torch.int64, device=like.device)
