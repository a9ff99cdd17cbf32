"""A prefix that starts as the keys and values that the base model has for a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftfast.config import PeftConfig, plain_name
from peftfast.method import method_for
from peftfast.model import PeftModel
from peftfast.modes import in_mode
from peftfast.prompts.prompt_model import prompts_of
from peftfast.rules import integer

States = list[tuple[Tensor, Tensor] | None]  # (keys, values) [heads, tokens, head size] of every layer that keeps some


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Let a prefix start as the first tokens of a text; returns its rows `[num_virtual_tokens, width]`.

    Args:
        model: with a prefix-tuning adapter without `prefix_projection`.
        tokenizer: of the base model.
        text: at least as many tokens as the prefix has; those behind have no effect.
        adapter_name: None: the active one.
        num_virtual_tokens: as the config says.
        use_chat_template: the text is a system message, if the tokenizer has a template that takes one.
        max_length: read so many tokens of the text.
    """
    name, cfg = _checked(model, adapter_name, num_virtual_tokens)
    count = cfg.num_virtual_tokens
    ids = _token_ids(tokenizer, text, use_chat_template, max_length)
    if ids.shape[1] < count:
        raise ValueError(f"Need at least {count} cached tokens, got {ids.shape[1]}: the text is too short")
    # tokens do not see those behind them, and a layer with a sliding window would forget the first of a long text
    ids = ids[:, :count].to(model.device)
    base = model.get_base_model()
    with in_mode(base, training=False):
        cache = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    if cache is None:
        raise ValueError(f"{type(base).__name__} gave no key/value cache to start from")
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Let a prefix start as the first tokens in the cache of one sequence; arguments and result as above."""
    name, cfg = _checked(model, adapter_name, num_virtual_tokens)
    states = _first_tokens(past_key_values, cfg.num_virtual_tokens)
    shared = getattr(model.get_base_model().config, "num_kv_shared_layers", 0) or 0
    if len(states) not in (cfg.num_layers, cfg.num_layers - shared):
        raise ValueError(f"The cache has {len(states)} layers, the prefix {cfg.num_layers}")
    encoder = prompts_of(model).encoder(name)
    rows = method_for(cfg).rows_of(states, cfg, encoder.prompt_embeddings.detach())
    encoder.load_prompt_embeddings(rows)
    return rows


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens in the cache of one sequence as rows of a prefix, `[tokens, layers * 2 * heads * head size]`."""
    num_virtual_tokens = integer(1).enforce(num_virtual_tokens, "num_virtual_tokens")
    states = _first_tokens(past_key_values, num_virtual_tokens)
    shapes = [None if kept is None else tuple(map(tuple, (part.shape for part in kept))) for kept in states]
    if any(shape is None or {*shape} != {*shapes[0]} for shape in shapes) or len({*shapes[0]}) > 1:
        raise ValueError(f"Inconsistent head shapes across layers in `past_key_values`: {shapes}")
    rows = torch.stack([part.transpose(0, 1) for kept in states for part in kept], dim=1)
    return rows.reshape(num_virtual_tokens, -1)


def _checked(model: PeftModel, adapter_name: str | None, num_virtual_tokens: int | None) -> tuple[str, PeftConfig]:
    """The adapter that is meant, if a cache can become its prompt."""
    name = model.active_adapter if adapter_name is None else adapter_name
    cfg = model.peft_config.get(name)
    if cfg is None or not hasattr(method_for(cfg), "rows_of"):
        present = {n: plain_name(c.peft_type) for n, c in model.peft_config.items()}
        raise ValueError(f"Adapter {name!r} must be a PREFIX_TUNING adapter. Adapters present: {present}")
    if cfg.prefix_projection:
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`."
        )
    if num_virtual_tokens not in (None, cfg.num_virtual_tokens):
        raise ValueError(
            f"Adapter {name!r} has {cfg.num_virtual_tokens} virtual tokens, got {num_virtual_tokens=}; "
            "peftfast.resize_prompt changes their number"
        )
    if cfg.num_transformer_submodules != 1:
        raise ValueError(f"Adapter {name!r}: only decoders have a cache of the text, not encoder-decoder models")
    return name, cfg


def _token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    if use_chat_template and hasattr(tokenizer, "apply_chat_template"):
        try:
            return tokenizer.apply_chat_template(
                [{"role": "system", "content": text}], tokenize=True, add_generation_prompt=False, return_dict=False,
                return_tensors="pt",
            )[:, :max_length]  # fmt: skip
        except Exception:  # no template, or one that takes no such message; templates raise errors of their own
            pass
    return tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]


def _first_tokens(cache: Any, count: int) -> States:
    """Keys and values of the first `count` tokens, of a cache of any kind or the tuples of old."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        pairs = [(layer[0], layer[1]) for layer in cache]
        lengths = [keys.shape[2] for keys, _ in pairs]
    else:
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
        lengths = [
            None if keys is None else layer.get_seq_length() for layer, (keys, _) in zip(layers, pairs, strict=True)
        ]
    states: States = []
    for (keys, values), length in zip(pairs, lengths, strict=True):
        if keys is None:  # recurrent
            states.append(None)
            continue
        if keys.ndim != 4 or keys.shape[0] != 1:
            raise ValueError(
                f"`past_key_values` must be of one sequence, [1, heads, tokens, head size], got {tuple(keys.shape)}"
            )
        if length < count:
            raise ValueError(f"Need at least {count} cached tokens, got {int(length)}.")
        if keys.shape[2] < length:
            raise ValueError(
                f"A layer with a sliding window has kept the last {keys.shape[2]} of {int(length)} tokens, not the "
                f"first; fill the cache with {count} tokens"
            )
        states.append((keys[0, :, :count], values[0, :, :count]))
    if not any(states):
        raise ValueError("Empty `past_key_values`.")
    return states
