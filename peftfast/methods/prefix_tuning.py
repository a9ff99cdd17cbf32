"""Prefix tuning (arXiv 2101.00190): trained keys and values in front of those of every attention layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftfast.config import PeftType, PromptLearningConfig, checked, register_config, setting
from peftfast.method import register_method
from peftfast.prompts.prefix_cache import (
    States,
    cache_name,
    checkpoint_safe,
    empty_cache,
    fill,
    grown,
    holds_tokens,
    take_cache,
    under_checkpointing,
)
from peftfast.prompts.prompt import (
    BasePromptEncoder,
    Inputs,
    Prompts,
    backbone_of,
    batch_size_of,
    drop_token_types,
    fill_sizes,
    text_config_of,
    widen_mask,
)
from peftfast.rules import boolean, integer, one_of, optional


@register_config(PeftType.PREFIX_TUNING)
@checked
class PrefixTuningConfig(PromptLearningConfig):
    """Trained keys and values in front of those of every attention layer (Li and Liang, arXiv 2101.00190).

    Args:
        init_weights: None: random; "zero": keys and values that start at zero.
        encoder_hidden_size: of the projection; None: `token_dim`.
        prefix_projection: train small embeddings and a two-layer network that makes the keys and values of them.
        token_dim, num_attention_heads: width of the keys of one layer and its key/value heads. Left open, they come
            from the model; both given, they are kept, for instance to reach layers that are wider than the others.
    """

    init_weights: str | None = setting(optional(one_of("zero")), default=None)
    encoder_hidden_size: int | None = setting(optional(integer(1)), default=None)
    prefix_projection: bool = setting(boolean(), default=False)


class PrefixEncoder(BasePromptEncoder):
    """Keys and values of all layers, one row `[num_layers * 2 * token_dim]` for every virtual token.

    Args:
        config: with all sizes filled in.
    """

    networks = ("transform",)

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        self.prefix_projection = config.prefix_projection
        width = config.num_layers * 2 * config.token_dim
        if config.prefix_projection and not config.inference_mode:
            self.embedding = nn.Embedding(config.num_virtual_tokens, config.token_dim)
            self.transform = nn.Sequential(
                nn.Linear(config.token_dim, config.encoder_hidden_size),
                nn.Tanh(),
                nn.Linear(config.encoder_hidden_size, width),
            )
            last: tuple[Tensor, ...] = (self.transform[-1].weight, self.transform[-1].bias)
        else:
            self.embedding = nn.Embedding(config.num_virtual_tokens, width)
            last = (self.embedding.weight,)
        if config.init_weights == "zero":
            for parameter in last:
                nn.init.zeros_(parameter)


def layer_states(prompt: Tensor, cfg: PrefixTuningConfig) -> States:
    """Keys and values of every layer.

    Args:
        prompt: `[B, tokens, num_layers * 2 * token_dim]`.
    """
    batch, tokens, _ = prompt.shape
    heads = cfg.num_attention_heads
    shape = (batch, tokens, cfg.num_layers * 2, heads, cfg.token_dim // heads)
    rows = prompt.view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    # encoder-decoder files leave room for cross-attention keys, which nothing uses: layer i has rows 4i and 4i + 1 of
    # the rows counted around
    step = 2 * cfg.num_transformer_submodules
    count = len(rows)
    return [(rows[step * i % count], rows[(step * i + 1) % count]) for i in range(cfg.num_layers)]


@register_method
class PrefixTuning:
    """Virtual tokens are entries of the key/value cache that the model starts with."""

    peft_type: ClassVar[str] = PeftType.PREFIX_TUNING
    prefix: ClassVar[str] = "prefix_tuning_"
    in_encoder: ClassVar[bool] = False

    def claims(self, cfg: PromptLearningConfig) -> bool:
        return isinstance(cfg, PrefixTuningConfig)

    def fill_sizes(self, cfg: PrefixTuningConfig, model: nn.Module) -> None:
        if all(cache_name(m) is None for m in (model, backbone_of(model)[1])):
            raise ValueError(
                f"Model does not support past key values which are required for prefix tuning: neither "
                f"{type(model).__name__} nor its backbone takes `past_key_values`. Prompt tuning works with any model."
            )
        given = cfg.token_dim is not None and cfg.num_attention_heads is not None
        width = cfg.encoder_hidden_size
        fill_sizes(cfg, getattr(model, "config", None))
        if not given:
            _follow_key_heads(cfg, text_config_of(model.config))
            if width is None:
                cfg.encoder_hidden_size = cfg.token_dim
        if cfg.token_dim % cfg.num_attention_heads:
            raise ValueError(
                f"token_dim={cfg.token_dim} is not a multiple of num_attention_heads={cfg.num_attention_heads}"
            )

    def encoder(self, cfg: PrefixTuningConfig, model: nn.Module) -> BasePromptEncoder:
        return PrefixEncoder(cfg)

    def attach(
        self, encoder: Prompts, cfg: PrefixTuningConfig, inputs: Inputs, model: nn.Module, *, generating: bool = False
    ) -> Inputs:
        if generating and under_checkpointing(model):
            raise ValueError(
                "PREFIX_TUNING does not work with gradient checkpointing in generate(): call model.eval() first"
            )
        inputs, count = dict(inputs), cfg.num_virtual_tokens
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        mask = "decoder_attention_mask" if encoder_decoder else "attention_mask"
        if inputs.get(mask) is not None:
            inputs[mask] = widen_mask(inputs[mask], count)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + count
        drop_token_types(cfg, inputs)
        name, cache = take_cache(inputs, model)
        if holds_tokens(cache):
            return {**inputs, name: cache}
        prompt = encoder.prompts(batch_size_of(inputs))
        cache = empty_cache(model) if cache is None else grown(cache, count, model)
        inputs[name] = fill(cache, layer_states(_in_dtype(prompt, model), cfg), model)
        return inputs

    @contextmanager
    def around(self, model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
        inputs = dict(inputs)
        name, cache = take_cache(inputs, model)
        before = cache.get_seq_length()
        checkpointed = under_checkpointing(model)
        with ExitStack() as stack:
            if checkpointed:
                cache = stack.enter_context(checkpoint_safe(model, cache))
            if cache_name(model) is None:
                # the head does not know caches; what is inside it does
                stack.enter_context(_handing(backbone_of(model)[1], cache))
            else:
                inputs[name] = cache
            yield inputs
            if not checkpointed and cache.get_seq_length() == before:
                raise ValueError(f"{type(model).__name__} did not read the cache that prefix tuning gave it")

    def rows_of(self, states: Sequence[tuple[Tensor, Tensor] | None], cfg: PrefixTuningConfig, rows: Tensor) -> Tensor:
        """`rows` `[tokens, width]` with these keys and values `[heads, tokens, head size]` in them. What layers take
        none of stays: those that keep no keys (None), those that are larger than the prefix."""
        heads, size = cfg.num_attention_heads, cfg.token_dim // cfg.num_attention_heads
        rows = rows.clone()
        parts = rows.view(len(rows), cfg.num_layers, 2, heads, size)
        for i, kept in enumerate(states):
            for j, part in enumerate(kept or ()):
                if part.shape[0] <= heads and part.shape[2] <= size:
                    parts[:, i, j, : part.shape[0], : part.shape[2]] = part.transpose(0, 1)
        return rows

    def shown(self, prompt: Tensor, cfg: PrefixTuningConfig, model: nn.Module) -> Any:
        return fill(empty_cache(model), layer_states(_in_dtype(prompt, model), cfg), model)


def _in_dtype(prompt: Tensor, model: nn.Module) -> Tensor:
    dtype = getattr(model, "dtype", None)
    return prompt if dtype is None else prompt.to(dtype)


def _handing(module: nn.Module, cache: Any) -> RemovableHandle:
    """A context in which `module` is called with the cache, whoever calls it."""
    name = cache_name(module)
    return module.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, name: cache}), with_kwargs=True)


def _follow_key_heads(cfg: PrefixTuningConfig, data: dict[str, Any]) -> None:
    """Grouped-query attention: the prefix has the key/value heads' sizes; where layers differ, those of the layers
    with the largest heads."""
    heads = data.get("num_key_value_heads")
    if heads is None:
        return
    size = data.get("head_dim") or cfg.token_dim // cfg.num_attention_heads
    if data.get("global_head_dim") is not None:
        size, heads = data["global_head_dim"], data.get("num_global_key_value_heads") or heads
    else:
        base = heads
        for layer in (data.get("per_layer_config") or {}).values():
            if layer.get("head_dim", size) > size:
                size, heads = layer["head_dim"], layer.get("num_key_value_heads", base)
    cfg.token_dim, cfg.num_attention_heads = size * heads, heads
