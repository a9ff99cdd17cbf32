"""A base model with prompt-learning adapters, as PeftModel sees it: the counterpart of the tuner around weight
adapters. The base model stays as it is; virtual tokens enter through its inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.base.offload import device_of
from peftfast.config import PeftConfig, PromptLearningConfig, plain_name
from peftfast.errors import PeftWarning, warn
from peftfast.files.beside import KeepsBeside
from peftfast.many.router import check_names, copies_of_a_sample, resolve, together
from peftfast.method import method_for
from peftfast.prompts.prefix_cache import (
    STATE_NAMES,
    cache_name,
    counting,
    empty_cache,
    holds_tokens,
    length_without,
    replacing,
)
from peftfast.prompts.prompt import (
    BasePromptEncoder,
    Inputs,
    PromptEncoders,
    PromptMethod,
    Prompts,
    RoutedPrompts,
    backbone_of,
    word_embeddings_name,
)
from peftfast.rows.invoked import CACHE_NAMES, cache_in
from peftfast.rows.routing import BASE, batch_of
from peftfast.rules import integer
from peftfast.sharding import is_fsdp2_in_use, is_stepped_by_deepspeed
from peftfast.wrapping.adding import add_adapter
from peftfast.wrapping.injection import Injection
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.model_merger import say_if_untied

Source = tuple[PromptMethod, Prompts, PromptLearningConfig]  # who makes virtual tokens, from what, for which config


class PromptInventory(Inventory):
    """The prompt encoders of a model, and the modules trained beside them.

    Attributes:
        encoders: adapter name -> encoder; the PeftModel has it as `prompt_encoder`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.encoders = PromptEncoders()

    def set_adapter(self, names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or none."""
        names = self.check_known(names)
        if len(names) > 1:
            raise ValueError(
                f"Only one prompt can be active at a time, got {names}; rows of a batch can have different ones: "
                "model(..., adapter_names=[...])"
            )
        super().set_adapter(names, inference_mode)

    def _activate(self, names: list[str], inference_mode: bool = False) -> None:
        for name, encoder in self.encoders.items():
            encoder.requires_grad_(name in names and not inference_mode)
        super()._activate(names, inference_mode)

    def set_requires_grad(self, names: str | Sequence[str], requires_grad: bool = True) -> None:
        kind = next((plain_name(cfg.peft_type) for cfg in self.configs.values()), "these")
        raise TypeError(
            f"Setting `requires_grad` is not supported for prompt learning methods like {kind}. "
            "set_adapter(name, inference_mode=...) freezes and unfreezes."
        )

    def is_stepped_by_deepspeed(self) -> bool:
        return any(map(is_stepped_by_deepspeed, self.encoders.parameters()))

    def successor(self, others: list[str]) -> str:
        """The oldest one, as in PEFT, where adapters of weights are followed by the alphabetically first."""
        return others[0]

    def _forget(self, name: str, remaining: list[str]) -> None:
        super()._forget(name, remaining)
        if name in self.encoders:
            del self.encoders[name]

    def eval(self) -> None:
        super().eval()
        self.encoders.eval()

    def unload(self, merged: bool = False, names: list[str] | None = None) -> nn.Module:
        self.encoders.clear()
        return super().unload(merged, names)


def encode(inventory: PromptInventory, name: str, cfg: PeftConfig, strict: bool, options: dict[str, Any]) -> None:
    """Give an adapter its prompt encoder, and copies of modules that train beside it. Prompts are small: they are made
    where the model is, whatever low_cpu_mem_usage says."""
    if cfg.num_virtual_tokens is None:
        raise ValueError(f"{type(cfg).__name__} needs num_virtual_tokens, the length of the prompt")
    model, method = inventory.model, method_for(cfg)
    method.fill_sizes(cfg, model)
    endings = tuple(cfg.modules_to_save or ())
    words = word_embeddings_name(model)
    encoder = method.encoder(cfg, model).to(device_of(model.get_submodule(words)))
    encoder.words = words
    saved = [n for n in inventory.names if n.endswith(endings)]
    Injection(inventory, name, cfg, method, targets=[], saved=saved).apply()
    encoder.requires_grad_(False)
    inventory.encoders[name] = encoder.train(model.training)


class PromptTuner(KeepsBeside):
    """What PeftModel asks of a tuner, for prompts. Not a module: `model` and `inventory.encoders` are the PeftModel's.

    Args:
        model: the base model; frozen, otherwise unchanged.
        peft_config: of the first adapter, which becomes active.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PromptLearningConfig,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        *,
        strict: bool = False,
        autocast_adapter_dtype: bool = True,
        initialise: bool = True,
    ) -> None:
        self.model = model
        self.inventory = PromptInventory(model)
        self.add(adapter_name, peft_config, strict=strict)
        self.inventory.set_adapter([adapter_name], inference_mode=peft_config.inference_mode)

    def install(self, wrapper: nn.Module) -> None:
        """Take one's place in a PeftModel: the base model stays itself, the encoders stand beside it."""
        wrapper.base_model = self.model
        wrapper.prompt_encoder = self.inventory.encoders
        wrapper.__dict__["_prompts"] = self
        wrapper.register_load_state_dict_pre_hook(_only_once)

    # ---- as a tuner --------------------------------------------------------------------------------------------------
    def add(self, adapter_name: str, config: PeftConfig, **options: Any) -> None:
        """Add an adapter, frozen and inactive; options as of `add_adapter`."""
        add_adapter(self.inventory, adapter_name, config, by=encode, **options)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.inventory.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.inventory.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self.inventory.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.inventory.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        self.inventory.delete(adapter_name)

    def unload(self) -> nn.Module:
        model = self.inventory.unload()
        say_if_untied(model)
        return model

    # ---- forward -----------------------------------------------------------------------------------------------------
    def source(self, adapter_names: Sequence[str] | None = None, batch: Tensor | None = None) -> Source | None:
        """Where the next batch's virtual tokens come from; None: there are none.

        Args:
            adapter_names: one for every row of `batch`.
        """
        if adapter_names is not None:
            check_names(adapter_names, self.peft_config, batch)
        if not self.inventory.enabled:
            return None
        if adapter_names is None:
            if not self.inventory.active:
                return None
            name = self.inventory.active[0]
            cfg = self.peft_config[name]
            return method_for(cfg), self.inventory.encoders[name], cfg
        return self._routed(adapter_names)

    def _routed(self, names: Sequence[str]) -> Source | None:
        distinct = list(dict.fromkeys(names))
        if distinct == [BASE]:
            return None
        lengths = {n: 0 if n == BASE else self.peft_config[n].num_virtual_tokens for n in distinct}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The rows of a batch need prompts of one length, got {lengths}. Put rows with prompts of different "
                f"lengths, or without one ({BASE!r}), into batches of their own, or see peftfast.resize_prompt."
            )
        cfg = self.peft_config[distinct[0]]
        present = [*self.peft_config] if self._trains_together() else distinct
        encoders = {n: self.inventory.encoders[n] for n in present}
        return method_for(cfg), RoutedPrompts(encoders, names), cfg

    def _trains_together(self) -> bool:
        """Whether every process has to give a gradient to what one of them gives one to, see `together`."""
        if not (self.model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return False
        return is_fsdp2_in_use() or self.inventory.is_stepped_by_deepspeed()

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **inputs: Any) -> Any:
        """The base model's forward on inputs with virtual tokens."""
        source = self.source(adapter_names, batch_of(args, inputs))
        if source is not None and args:
            raise TypeError("A model with prompts takes its inputs by name: model(input_ids=..., attention_mask=...)")
        with self._routed_copies(adapter_names, args, inputs):
            if source is None:
                output = self.model(*args, **inputs)
            else:
                method, encoder, cfg = source
                with method.around(self.model, method.attach(encoder, cfg, inputs, self.model)) as attached:
                    output = self.model(**attached)
            self.inventory.control.follow(output)
            return output

    def _routed_copies(
        self,
        adapter_names: Sequence[str] | None,
        args: Sequence[Any],
        inputs: Inputs,
        copies: tuple[int, ...] = (1,),
    ) -> AbstractContextManager[None]:
        """While this is open, modules that are saved beside the prompts are those of `adapter_names`, row by row."""
        if adapter_names is None or not self.inventory.extras:
            return nullcontext()
        routing = resolve(self.inventory, adapter_names, args, inputs, copies)
        return self.inventory.control.use(together(self.inventory, routing) if self._trains_together() else routing)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Inputs:
        """The base model's, with the virtual tokens in."""
        inputs = self.model.prepare_inputs_for_generation(*args, **kwargs)
        source = self.source()
        return inputs if source is None else self._prepared(source, inputs, kwargs)

    def _prepared(self, source: Source, inputs: Inputs, given: Inputs) -> Inputs:
        method, encoder, cfg = source
        for name in ("attention_mask", "decoder_attention_mask"):
            mask, tokens = inputs.get(name), given.get(name)
            if isinstance(mask, dict) or getattr(mask, "ndim", 2) == 4:
                # made for a cache of fixed length, without the virtual tokens; the model makes its own from this
                inputs = {**inputs, name: tokens}
            elif mask is not None and tokens is not None and holds_tokens(cache_in(inputs)):
                # one that is as long as a cache of fixed length (BLOOM's) has places for the virtual tokens by now
                inputs = {**inputs, name: mask[:, : max(tokens.shape[1], mask.shape[1] - cfg.num_virtual_tokens)]}
        if inputs.get("use_cache") is False:
            # every step sees all tokens again; a cache that comes back is that of the step before
            inputs = {k: v for k, v in inputs.items() if k not in STATE_NAMES}
        return method.attach(encoder, cfg, inputs, self.model, generating=True)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate` with virtual tokens, in every decoding mode."""
        source = self.source(adapter_names, batch_of(args, kwargs))
        with self._routed_copies(adapter_names, args, kwargs, copies_of_a_sample(self.model, args, kwargs)):
            return self._generate(source, args, kwargs)

    def _generate(self, source: Source | None, args: Sequence[Any], kwargs: Inputs) -> Any:
        if source is None:
            return self.model.generate(*args, **kwargs)
        method, encoder, cfg = source
        if getattr(self.model.config, "is_encoder_decoder", False):
            if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
                raise ValueError("input_ids must be provided for Peft model generation")
            if method.in_encoder:
                if kwargs.pop("encoder_outputs", None) is not None:
                    warn("`encoder_outputs` should not be passed to `generate` when using prompt tuning. Ignoring it.")
                kwargs = method.attach(encoder, cfg, kwargs, self.model)
                return self.model.generate(*args, **kwargs)
        with self._prepared_by(source, cache_in(kwargs)):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _prepared_by(self, source: Source, given: Any) -> Iterator[None]:
        """`generate` takes the inputs of every step from the model's `prepare_inputs_for_generation`; for as long as
        it runs, that puts the virtual tokens in.

        Args:
            given: the cache of a generation before, by whose length `generate` knows which tokens are new.
        """
        original = self.model.prepare_inputs_for_generation
        caches, before = ExitStack(), ExitStack()
        if holds_tokens(given):
            before.enter_context(length_without(given, source[2].num_virtual_tokens))

        @functools.wraps(original)  # generate reads the signature
        def prepare(*args: Any, **kwargs: Any) -> Inputs:
            before.close()
            inputs = self._prepared(source, original(*args, **kwargs), kwargs)
            cache = cache_in(inputs)
            if cache is None and inputs.get("use_cache") and self.model._supports_default_dynamic_cache():
                # transformers below 5.4 leaves it to the model to make one, which could not be counted in
                cache = inputs[cache_name(self.model) or CACHE_NAMES[0]] = empty_cache(self.model)
            if hasattr(cache, "crop") and "crop" not in cache.__dict__:
                caches.enter_context(counting(cache, source[2].num_virtual_tokens))
            return inputs

        with replacing(self.model, prepare_inputs_for_generation=prepare), caches, before:
            yield

    # ---- what PeftModel answers for prompts --------------------------------------------------------------------------
    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active adapter's virtual tokens: embeddings `[batch_size, rows, token_dim]`, or, for prefix tuning, a
        cache that holds them."""
        source = self.source()
        if source is None:
            raise ValueError("No prompt is active")
        method, encoder, cfg = source
        return method.shown(encoder.prompts(batch_size), cfg, self.model)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """`[rows, width]`, what the adapter's file holds."""
        return self.encoder(adapter_name).prompt_embeddings.detach().cpu()

    def encoder(self, adapter_name: str) -> BasePromptEncoder:
        self.inventory.check_known(adapter_name)
        return self.inventory.encoders[adapter_name]

    @property
    def prompt_tokens(self) -> dict[str, Tensor]:
        return {
            name: torch.arange(cfg.num_virtual_tokens * cfg.num_transformer_submodules)
            for name, cfg in self.peft_config.items()
        }

    @property
    def word_embeddings(self) -> nn.Module:
        return self.model.get_submodule(word_embeddings_name(self.model))

    @property
    def transformer_backbone_name(self) -> str | None:
        return backbone_of(self.model)[0]

    def attribute(self, name: str) -> Any:
        """What a PeftModel with prompts answers for a name it does not know itself."""
        if name in _OWN:
            return getattr(self, name)
        if name in _OF_WEIGHTS and not hasattr(self.model, name):
            kind = next((plain_name(c.peft_type) for c in self.peft_config.values()), "prompt")
            raise AttributeError(
                f"{name}: {kind} adapters are virtual tokens in the model's inputs, not "
                "weights; there is nothing to merge, unmerge or combine. get_base_model() is the unchanged base model."
            )
        return getattr(self.model, name)


def _only_once(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *details: Any) -> None:
    """Leave out the word embeddings that PEFT's state dicts have a second time, beside the base model's."""
    state_dict.pop(f"{prefix}word_embeddings.weight", None)


_OWN = (
    "get_prompt",
    "get_prompt_embedding_to_save",
    "prompt_tokens",
    "transformer_backbone_name",
    "word_embeddings",
)
_OF_WEIGHTS = (
    "add_weighted_adapter",
    "merge_adapter",
    "merge_and_unload",
    "unload",
    "unmerge_adapter",
)


# ---- functions for users ---------------------------------------------------------------------------------------------
def prompts_of(model: nn.Module) -> PromptTuner:
    """What manages the prompts of a PeftModel; TypeError where it has none."""
    tuner = model.__dict__.get("_prompts")
    if tuner is None:
        raise TypeError(f"{type(model).__name__} has no prompt-learning adapters")
    return tuner


def _resized(rows: Tensor, old: int, new: int) -> Tensor:
    """`[parts * old, width]` to `[parts * new, width]`: the first tokens of each part, or the part repeated."""
    parts = rows.view(rows.shape[0] // old, old, rows.shape[1])
    return parts[:, torch.arange(new, device=rows.device) % old].reshape(-1, rows.shape[1])


def resize_saved_prompt(cfg: PeftConfig, tensors: Mapping[str, Tensor], num_virtual_tokens: int) -> dict[str, Tensor]:
    """The tensors of a file with the prompt cut or extended as `resize_prompt` does; `cfg` follows."""
    num_virtual_tokens = integer(1).enforce(num_virtual_tokens, "num_virtual_tokens")
    if not cfg.is_prompt_learning or "prompt_embeddings" not in tensors:
        raise ValueError(f"num_virtual_tokens is the length of a prompt; the adapter is {plain_name(cfg.peft_type)}")
    rows = _resized(tensors["prompt_embeddings"], cfg.num_virtual_tokens, num_virtual_tokens)
    cfg.num_virtual_tokens = num_virtual_tokens
    return {**tensors, "prompt_embeddings": rows}


def resize_prompt(model: nn.Module, num_virtual_tokens: int, adapter_name: str | None = None) -> None:
    """Cut a prompt to its first tokens, or extend it by repeating it from the start.

    A prompt that comes out of a network becomes a plain one, since the network makes a fixed number of tokens.

    Args:
        model: a PeftModel with prompt-learning adapters.
        num_virtual_tokens: the new length.
        adapter_name: None: the active one.

    Raises:
        TypeError: no prompt-learning model, or no integer. ValueError: a length below 1, or no such adapter.
    """
    tuner = prompts_of(model)
    num_virtual_tokens = integer(1).enforce(num_virtual_tokens, "num_virtual_tokens")
    name = model.active_adapter if adapter_name is None else adapter_name
    encoder, cfg = tuner.encoder(name), tuner.peft_config[name]
    if encoder.has_network:
        warn(f"The prompt encoder of adapter {name!r} is replaced by its output, resized.", PeftWarning)
    rows = encoder.prompt_embeddings.detach()
    encoder.replace_rows(_resized(rows, cfg.num_virtual_tokens, num_virtual_tokens))
    cfg.num_virtual_tokens = num_virtual_tokens


def nearest_tokens(
    model: nn.Module, tokenizer: Any = None, adapter_name: str | None = None, k: int = 5
) -> list[list[tuple[Any, float]]]:
    """The vocabulary's tokens nearest to every virtual token, by cosine of their embeddings.

    Args:
        model: a PeftModel with a prompt- or P-tuning adapter; the keys of prefix tuning are no embeddings.
        tokenizer: None: token ids instead of tokens.
        adapter_name: None: the active one.
        k: how many.

    Returns:
        For every virtual token, `(token, cosine)` from the nearest on.

    Raises:
        TypeError: no prompt-learning model, or `k` is no integer. ValueError: `k` is below 1, no such adapter, or one
            that is not made of input embeddings.
    """
    tuner = prompts_of(model)
    k = integer(1).enforce(k, "k")
    name = model.active_adapter if adapter_name is None else adapter_name
    rows = tuner.encoder(name).prompt_embeddings.detach()
    table = tuner.word_embeddings
    with torch.no_grad():
        vocabulary = table(torch.arange(table.num_embeddings, device=device_of(table))).float()
        if vocabulary.shape[1] != rows.shape[1]:
            raise ValueError(
                f"Adapter {name!r} ({plain_name(tuner.peft_config[name].peft_type)}) is not made of input "
                f"embeddings: it has width {rows.shape[1]}, the vocabulary {vocabulary.shape[1]}"
            )
        cosines = nn.functional.normalize(rows.float(), dim=-1) @ nn.functional.normalize(vocabulary, dim=-1).T
        values, ids = cosines.topk(min(k, vocabulary.shape[0]))
    shown = ids.tolist() if tokenizer is None else [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
    return [list(zip(tokens, row, strict=True)) for tokens, row in zip(shown, values.tolist(), strict=True)]
