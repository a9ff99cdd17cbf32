"""Virtual tokens in transformers' key/value caches: filling any cache class, and caches that gradient checkpointing can
replay."""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.errors import warn
from peftfast.rows.invoked import CACHE_NAMES
from peftfast.watch import read_off

Shapes = list[tuple[int, int] | None]
States = Sequence[tuple[Tensor, Tensor]]  # (keys, values) of every layer, each [B, heads, tokens, head size]


def holds_tokens(cache: Any) -> bool:
    """Whether a cache is there and not empty."""
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):  # a state-space model's of before transformers 5.4; it starts with zeros
        return bool(cache.conv_states[0].any())
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # recurrent states only (Mamba's), which have no length
        return cache.has_previous_state()


def grown(cache: Any, count: int, model: nn.Module) -> Any:
    """An empty cache with room for `count` more tokens: a cache of fixed length is made anew, any other is itself."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(grown(cache.self_attention_cache, count, model), cache.cross_attention_cache)
    if not getattr(cache, "is_compileable", False):
        return cache
    length = max((getattr(layer, "max_cache_len", 0) for layer in getattr(cache, "layers", ())), default=0)
    if not length:
        return cache  # recurrent states are of fixed size whatever the length
    return type(cache)(config=model.config, max_cache_len=length + count)


def empty_cache(model: nn.Module) -> Any:
    """What the model makes for itself when it has no cache yet."""
    # not from `transformers` itself, a module that torch 2.11 does not compile
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if getattr(model.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model.config)


#: What is read off a model once, because it is needed in every forward and takes a while.
_layer_shapes: weakref.WeakKeyDictionary[nn.Module, dict[int, Shapes]] = weakref.WeakKeyDictionary()
_checkpointing: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
_taken: weakref.WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = weakref.WeakKeyDictionary()


def layer_shapes(model: nn.Module, count: int) -> Shapes:
    """(key/value heads, head size) of the first `count` layers where the config says that layers differ, else None;
    of those behind which the others share keys."""
    known = read_off(_layer_shapes, model, lambda _: {})
    if count not in known:
        config = (
            model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
        )
        shared = getattr(config, "num_kv_shared_layers", 0) or 0
        own = getattr(config, "num_hidden_layers", count) - shared if shared > 0 else count
        known[count] = [_layer_shape(config, i) for i in range(min(own, count))]
    return known[count]


def _layer_shape(config: Any, layer: int) -> tuple[int, int] | None:
    kinds = getattr(config, "layer_types", None)
    if not kinds or layer >= len(kinds):
        return None
    layers = getattr(config, "per_layer_config", None)
    if layers is not None:
        heads, size = getattr(layers[layer], "num_key_value_heads", None), getattr(layers[layer], "head_dim", None)
        return (heads, size) if heads and size else None
    size = getattr(config, "global_head_dim", None)
    if size is None:
        return None
    if kinds[layer] == "sliding_attention":
        return config.num_key_value_heads, config.head_dim
    return getattr(config, "num_global_key_value_heads", None) or config.num_key_value_heads, size


def fill(cache: Any, states: States, model: nn.Module) -> Any:
    """Put the virtual tokens into an empty cache; returns it.

    A layer with fewer or smaller heads than provided takes the first of them. Layers that keep no keys of their own
    (recurrent ones, those that share another layer's) are passed over; so are, with a warning, layers that are larger.

    Raises:
        ValueError: no layer took them, or the model has more layers than there are states.
    """
    from transformers.cache_utils import CacheLayerMixin, EncoderDecoderCache

    target = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    shapes = layer_shapes(model, len(states))
    own = len(target.layers)  # 0: layers are made as they are needed
    if own > len(states) and any(isinstance(layer, CacheLayerMixin) for layer in target.layers[len(states) :]):
        raise ValueError(f"The prefix has keys for {len(states)} layers, the model's cache {own}; check `num_layers`")
    devices = layer_devices(model)
    taken, wider = [], []
    for i, (keys, values) in enumerate(states):
        if i >= len(shapes) or (own and (i >= own or not isinstance(target.layers[i], CacheLayerMixin))):
            continue
        if shapes[i] is not None:
            heads, size = shapes[i]
            if heads > keys.shape[1] or size > keys.shape[3]:
                wider.append(i)
                continue
            keys, values = keys[:, :heads, :, :size], values[:, :heads, :, :size]
        device = devices.get(i, keys.device)
        target.update(keys.to(device), values.to(device), i)
        taken.append(i)
    heads, size = states[0][0].shape[1], states[0][0].shape[3]
    if not taken:
        raise ValueError(
            "Prefix tuning skipped every layer because no layer's KV shape matched the provisioned prefix "
            f"(num_attention_heads={heads}, head_dim={size}). Override `token_dim` and `num_attention_heads` in "
            "`PrefixTuningConfig` to match a layer that should receive the prefix."
        )
    if wider:
        warn(
            f"Prefix tuning injected into layers {taken}; skipped {wider}, whose keys are larger than the prefix's "
            f"(num_attention_heads={heads}, head_dim={size})."
        )
    return cache


def layer_devices(model: nn.Module) -> dict[int, torch.device]:
    """Layer number -> device, for a model spread over several."""
    found = {}
    for name, device in (getattr(model, "hf_device_map", None) or {}).items():
        number = re.search(r"\.(\d+)(\.|$)", name)
        if number is not None and device not in ("disk", "cpu"):
            found.setdefault(int(number.group(1)), torch.device(device))
    return found


# ---- gradient checkpointing ------------------------------------------------------------------------------------------
@functools.cache
def _replayed_class() -> type:
    from transformers.cache_utils import DynamicCache

    class ReplayedCache(DynamicCache):
        """Gives every forward of a layer the same prefix: what a layer adds is returned and not kept, so that a layer
        that is computed a second time, in the backward pass, reads what it read the first time."""

        reads = 0

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.reads += 1
            while self.layer_class_to_replicate is not None and len(self.layers) <= layer_idx:
                self.layers.append(self.layer_class_to_replicate())
            layer = self.layers[layer_idx]
            before = dict(layer.__dict__)
            try:
                return layer.update(key_states, value_states, *args, **kwargs)
            finally:
                layer.__dict__.clear()
                layer.__dict__.update(before)

    return ReplayedCache


class _NeverSet(dict):
    """`EncoderDecoderCache.is_updated` of a cache that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def replayed(cache: Any) -> Any:
    """The same prefix in a cache that keeps nothing more."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        both = EncoderDecoderCache(replayed(cache.self_attention_cache), replayed(cache.cross_attention_cache))
        both.is_updated = _NeverSet()
        return both
    new = _replayed_class()()
    new.layers, new.layer_class_to_replicate = cache.layers, cache.layer_class_to_replicate
    return new


class _Collect(torch.autograd.Function):
    """Identity on the hidden states; its backward hands on the gradients that a replayed layer left at the leaves."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *originals: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        collected = []
        for leaf in ctx.leaves:
            collected.append(leaf.grad)
            leaf.grad = None
        return grad, None, *collected


#: Those of `CACHE_NAMES`, and what state-space models called theirs up to 5.23, in which there are no keys and values.
STATE_NAMES = (*CACHE_NAMES, "cache_params")


def cache_name(module: nn.Module, names: Sequence[str] = CACHE_NAMES) -> str | None:
    """The one of these names under which `module` takes a cache, None if it takes none."""
    taken = _arguments(module)
    for name in names:
        if name in taken:
            return name
    return None


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of what the module's `forward` takes."""
    forward = module.forward
    if torch.compiler.is_compiling():  # whose functions last as long as the tracing
        return tuple(inspect.signature(forward).parameters)
    function = getattr(forward, "__func__", forward)  # a bound method is another one at every look
    found = _taken.get(function)
    if found is None:
        found = _taken[function] = tuple(inspect.signature(forward).parameters)
    return found


@contextmanager
def replacing(thing: Any, **attributes: Any) -> Iterator[None]:
    """While this is open, an object has these attributes of its own."""
    own = thing.__dict__
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)  # what is put in holds the object too: without the collector it would not be freed
        own.update(before)


def counting(cache: Any, count: int) -> AbstractContextManager[None]:
    """A context of `cache.crop(length)` where `length` does not count `count` virtual tokens.

    transformers below 5.15 crops to what the user's tokens make when guessed ones are refused. Since then it says how
    many are to go, as a negative number, which is right as it is.
    """
    crop = cache.crop
    return replacing(cache, crop=lambda length: crop(length + count if length > 0 else length))


def length_without(cache: Any, count: int) -> AbstractContextManager[None]:
    """A context of `cache.get_seq_length()` that does not count `count` virtual tokens."""
    length = cache.get_seq_length
    return replacing(cache, get_seq_length=lambda *args, **kwargs: length(*args, **kwargs) - count)


def take_cache(inputs: dict[str, Any], model: nn.Module) -> tuple[str, Any]:
    """The name under which `model` takes a cache, and the cache, taken out of `inputs` whatever it was called there.

    The tokens' places in the cache, which transformers below 5.4 counts without the virtual ones, are taken out too:
    a model that keeps keys then counts what its cache holds. State-space models want them, and only to see whether a
    sequence begins.
    """
    if cache_name(model) is not None:
        inputs.pop("cache_position", None)
    given = [inputs.pop(name) for name in STATE_NAMES if name in inputs]
    name = cache_name(model, STATE_NAMES) or CACHE_NAMES[0]
    return name, next((cache for cache in given if cache is not None), None)


def checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with a self-attention over the prefix, checkpointed or not: some models withhold the cache from all
    of them when only every second one is."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else model
    return [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer) and cache_name(m) is not None]


def under_checkpointing(model: nn.Module) -> bool:
    """Whether a forward now would be checkpointed."""
    modules = (reference() for reference in read_off(_checkpointing, model, _able_to_checkpoint))
    return any(m is not None and m.gradient_checkpointing and m.training for m in modules)


def _able_to_checkpoint(model: nn.Module) -> list[weakref.ref[nn.Module]]:
    return [weakref.ref(m) for m in model.modules() if hasattr(m, "gradient_checkpointing")]


@contextmanager
def checkpoint_safe(model: nn.Module, cache: Any) -> Iterator[Any]:
    """A version of `cache` that checkpointed layers can read, and the model set to hand it to them.

    transformers takes caches away from checkpointed layers, because a layer that is computed again would append again.
    This one does not change when it is read.

    Raises:
        ValueError: the model's layers are not transformers' checkpointing layers.
    """
    layers = checkpointable_layers(model)
    if not layers:
        raise ValueError(
            f"PREFIX_TUNING does not work with gradient checkpointing of {type(model).__name__}: its layers take no "
            "cache while they are checkpointed. Switch gradient checkpointing off, or use prompt tuning."
        )
    cache = replayed(cache)
    kept = getattr(cache, "self_attention_cache", cache)
    originals, leaves = _leaves(kept) if any(_reentrant(m) for m in layers) else ([], [])

    def handed(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name = cache_name(layer)
        position = _arguments(layer).index(name)
        args = list(args)
        if position < len(args):
            args[position] = cache
        else:
            kwargs = {**kwargs, name: cache}
        if originals:
            args[0] = _Collect.apply(args[0], leaves, *originals)
        return tuple(args), kwargs

    with ExitStack() as stack:
        for layer in layers:
            if layer.gradient_checkpointing:
                # around what is computed again, where a layer's hooks are in some releases of transformers only
                stack.enter_context(_checkpointing_with(layer, functools.partial(handed, layer)))
            else:
                stack.enter_context(layer.register_forward_pre_hook(handed, with_kwargs=True))
        yield cache
        if not kept.reads:
            raise ValueError(f"{type(model).__name__} did not read the prefix under gradient checkpointing")


def _checkpointing_with(
    layer: nn.Module, handed: Callable[[tuple, dict], tuple[tuple, dict]]
) -> AbstractContextManager[None]:
    """A context in which the checkpointed `layer` gets what `handed` makes of its inputs, which lack the cache."""
    before = layer._gradient_checkpointing_func

    def checkpoint(run: functools.partial, *args: Any) -> Any:
        args, given = handed(args, run.keywords)
        return before(functools.partial(run, **given), *args)

    # where there is the second, no warning that the cache was taken away
    return replacing(layer, _gradient_checkpointing_func=checkpoint, _can_checkpoint_with_cache=True)


def _reentrant(layer: nn.Module) -> bool:
    if not layer.gradient_checkpointing:
        return False
    arguments = getattr(layer._gradient_checkpointing_func, "keywords", None) or {}
    return arguments.get("use_reentrant", True)


def _leaves(cache: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the prefix from its graph: a re-entrant backward runs once for every layer and would free the part of the
    graph that they share. Returns the tensors before and after the cut."""
    originals, leaves = [], []
    for layer in cache.layers:
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                leaf = tensor.detach().requires_grad_()
                setattr(layer, name, leaf)
                originals.append(tensor)
                leaves.append(leaf)
    return originals, leaves
