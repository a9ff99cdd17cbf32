"""What a prompt-learning method is: it owns a small encoder and says how virtual tokens enter the model's inputs."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from peftfast.autocast import autocast_dtype
from peftfast.config import PromptLearningConfig, TaskType
from peftfast.embeddings import input_embeddings
from peftfast.errors import PeftWarning, warn
from peftfast.sharding import copy_whole, is_distributed, put_together, reaching, whole_shape
from peftfast.watch import ContentWatch, TensorWatch, read_off

Inputs = dict[str, Any]  # the keyword arguments of the base model's forward


class Prompts(Protocol):
    """Where the virtual tokens of a batch come from: an encoder, or several encoders routed by row.

    Attributes:
        words: name of the word embeddings in the base model.
    """

    words: str | None

    def prompts(self, batch_size: int) -> Tensor:
        """`[batch_size, rows, width]`."""
        ...


class PromptMethod(Protocol):
    """Stateless. Registered with `method.register_method`, like the methods that adapt weights."""

    peft_type: ClassVar[str]
    prefix: ClassVar[str]  # PEFT's name prefix, which adapter names should not be contained in
    in_encoder: ClassVar[bool]  # in an encoder-decoder model the virtual tokens are the encoder's

    def claims(self, cfg: PromptLearningConfig) -> bool:
        """Whether this method is what `cfg` asks for."""
        ...

    def fill_sizes(self, cfg: PromptLearningConfig, model: nn.Module) -> None:
        """Fill what `cfg` leaves open from the model; ValueError if this kind of prompt does not fit the model."""
        ...

    def encoder(self, cfg: PromptLearningConfig, model: nn.Module) -> BasePromptEncoder:
        """The trainable module, kept as `prompt_encoder.<adapter>`. The sizes in `cfg` are filled in."""
        ...

    def attach(
        self, encoder: Prompts, cfg: PromptLearningConfig, inputs: Inputs, model: nn.Module, *, generating: bool = False
    ) -> Inputs:
        """Inputs with the virtual tokens in: embeddings prepended, or a filled key/value cache; masks, labels and
        positions extended to match. Training, generation and every task go through this one function.

        A cache that already holds tokens holds the virtual ones too: then only masks and positions are extended.

        Args:
            inputs: of the base model's forward; not changed.
            generating: called for a step of `generate`, which makes position ids of its own.
        """
        ...

    def around(self, model: nn.Module, inputs: Inputs) -> AbstractContextManager[Inputs]:
        """What has to be in place while the model runs on attached inputs; gives the inputs to run it with."""
        ...

    def shown(self, prompt: Tensor, cfg: PromptLearningConfig, model: nn.Module) -> Any:
        """What `get_prompt` answers, from a batch of encoder outputs."""
        ...


class BasePromptEncoder(nn.Module):
    """Virtual tokens of one adapter: rows of `embedding`, or what a small network (`networks`) makes of them.

    Attributes:
        networks: names of the sub-modules that the rows go through, empty when the rows are the prompt.
        words: see `Prompts`; None of one that was pickled without it.
    """

    networks: tuple[str, ...] = ()
    words: str | None = None
    embedding: nn.Embedding

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[torch.dtype | None, ContentWatch, Tensor] | None = None

    @property
    def has_network(self) -> bool:
        return any(name in self._modules for name in self.networks)

    def forward(self, indices: Tensor) -> Tensor:
        """`[batch, rows]` indices to `[batch, rows, width]`."""
        x = self.embedding(indices)
        for name in self.networks:
            if name in self._modules:
                x = self._modules[name](x)
                x = x[0] if isinstance(x, tuple) else x  # a recurrent network answers with its state as well
        return x

    @property
    def prompt_embeddings(self) -> Tensor:
        """`[rows, width]`: what the file holds."""
        if self.has_network and any(is_distributed(p) for p in self.parameters()):
            return self.prompt_of({name: put_together(p.detach()) for name, p in self.named_parameters()})
        return self.virtual_tokens() if self.has_network else self.embedding.weight

    def prompt_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """`prompt_embeddings` of these Parameters, by their names here, instead of one's own. No hook is called: a
        process that has gathered them may be the only one that asks."""
        alone = copy.deepcopy(self)
        for module in alone.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                hooks.clear()
        with torch.no_grad():
            for name, parameter in list(alone.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                setattr(alone.get_submodule(owner), leaf, nn.Parameter(tensors[name].to(parameter.device)))
            return alone.prompt_embeddings

    def virtual_tokens(self) -> Tensor:
        """`[rows, width]`: the virtual tokens. What a network makes is computed once and kept while no gradient is
        wanted and neither parameters, modules nor what autocast wants change, nor any is hooked; any forward with
        gradients forgets it."""
        if not self.has_network:
            return self._compute()
        wants_grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if wants_grad or self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            self._kept = None
            return self._compute()
        kept = self._kept
        if kept is None or kept[0] is not autocast_dtype(kept[2]) or not kept[1].holds():
            with torch.inference_mode(False), torch.no_grad():  # a tensor that later forwards with gradients may use
                tokens = self._compute()
            content = TensorWatch.of(self.parameters())
            if content is None:
                return tokens
            modules = list(self.modules())
            held = [(own, *item) for m in modules for own in (m._parameters, m._modules) for item in own.items()]
            watch = ContentWatch(held, content, modules)
            if not watch.holds():  # hooks have had a hand in this, and may be gone in the next call
                return tokens
            self._kept = kept = autocast_dtype(tokens), watch, tokens
        return kept[2]

    def _compute(self) -> Tensor:
        # through the modules' own forward, where sharding engines gather their weights
        rows = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        return self(rows.unsqueeze(0))[0]

    def prompts(self, batch_size: int) -> Tensor:
        return self.virtual_tokens().unsqueeze(0).expand(batch_size, -1, -1)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Make these rows the prompt. A network cannot be recovered from its output and is dropped, with a warning.

        Raises:
            ValueError: the shape is not that of this prompt.
        """
        expected = whole_shape(self.prompt_embeddings)
        if prompt_embeddings.dim() != 2 or prompt_embeddings.shape != expected:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected {tuple(expected)}, got {tuple(prompt_embeddings.shape)}."
            )
        if self.has_network:
            warn(
                "The file holds what the prompt encoder's network computed, not the network itself. The adapter is now "
                "this plain prompt; further training would train its rows directly.",
                PeftWarning,
            )
        self.replace_rows(prompt_embeddings)

    @torch.no_grad()
    def replace_rows(self, rows: Tensor) -> None:
        """Make `rows` `[rows, width]` the prompt, without a network."""
        for name in self.networks:
            self._modules.pop(name, None)
        self._kept = None
        weight = self.embedding.weight
        if rows.shape == whole_shape(weight):
            copy_whole(weight, rows)
            return
        new = rows.to(weight).clone().contiguous()
        self.embedding.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
        self.embedding.num_embeddings, self.embedding.embedding_dim = new.shape

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class PromptEncoders(nn.ModuleDict):
    """Adapter name -> encoder; stands in a PeftModel as `prompt_encoder`."""


class RoutedPrompts:
    """Row by row another adapter's prompt.

    Args:
        encoders: by the adapters' names; those that do not occur get a gradient of zero.
        names: the adapter of every row of the user's batch; beams of a row follow one another.
    """

    def __init__(self, encoders: Mapping[str, BasePromptEncoder], names: Sequence[str]) -> None:
        used = list(dict.fromkeys(names))
        self.encoders, self.used, self.words = encoders, used, encoders[used[0]].words
        self.rows = [used.index(name) for name in names]

    def prompts(self, batch_size: int) -> Tensor:
        if batch_size % len(self.rows):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.rows)} and {batch_size} respectively."
            )
        tokens = {name: encoder.virtual_tokens() for name, encoder in self.encoders.items()}
        table = torch.stack([tokens[name] for name in self.used])
        left = [t for name, t in tokens.items() if name not in self.used and t.requires_grad]
        table = reaching(table, left) if left else table
        rows = torch.tensor(self.rows, device=table.device).repeat_interleave(batch_size // len(self.rows))
        return table.index_select(0, rows)


# ---- inputs ----------------------------------------------------------------------------------------------------------
def batch_size_of(inputs: Inputs) -> int:
    """Rows of the batch; ValueError if no input says."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "attention_mask"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    encoded = inputs.get("encoder_outputs")
    if encoded is not None:
        return encoded[0].shape[0]
    raise ValueError("Prompt learning needs input_ids or inputs_embeds")


def widen_mask(mask: Any, count: int) -> Any:
    """An attention mask with `count` visible columns in front: `[B, T]`, or `[B, H, Q, K]` boolean or additive."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {name: widen_mask(m, count) for name, m in mask.items()}
    visible = 0 if mask.dim() == 4 and mask.is_floating_point() else 1
    return torch.cat((mask.new_full((*mask.shape[:-1], count), visible), mask), dim=-1)


#: Tasks whose PEFT class passes token types on; the others drop them.
_WITH_TOKEN_TYPES = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def drop_token_types(cfg: PromptLearningConfig, inputs: Inputs) -> None:
    """Remove token types, with a warning, where PEFT does."""
    if inputs.get("token_type_ids") is not None and cfg.task_type not in _WITH_TOKEN_TYPES:
        warn("Token type ids are not supported for parameter efficient tuning. Ignoring token type ids")
        del inputs["token_type_ids"]


# ---- the base model --------------------------------------------------------------------------------------------------
def text_config_of(config: Any) -> dict[str, Any]:
    """A model's config as a dict; for a multimodal model, that of its language model."""
    data = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return data.get("text_config") or data


def backbone_of(model: nn.Module) -> tuple[str | None, nn.Module]:
    """Name and module of the transformer inside a model with a head; (None, the model) if it has none."""
    from transformers import PreTrainedModel

    for name, module in model.named_children():
        if isinstance(module, PreTrainedModel):
            return name, module
    return None, model


def word_embeddings_name(model: nn.Module) -> str:
    """The name of the module that turns token ids into embeddings. Reading a model's config for it takes a while."""
    known = "embeddings.word_embeddings"
    with suppress(AttributeError):
        model.get_submodule(known)
        return known
    vocabulary = text_config_of(getattr(model, "config", None)).get("vocab_size")
    prefix, backbone = backbone_of(model)
    for name, parameter in backbone.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) > 0 and shape[0] == vocabulary:
            name = name.removesuffix(".weight").removesuffix(".original_module")
            return name if prefix is None else f"{prefix}.{name}"
    if "inputs_embeds" in inspect.signature(model.forward).parameters:  # a table of more rows than the vocabulary has
        table = input_embeddings(model)
        for name, module in model.named_modules():
            if module is table and isinstance(module, nn.Embedding):
                return name
    raise ValueError(
        f"No word embeddings found in {type(model).__name__}: it has no `{known}` and no parameter with "
        f"vocab_size={vocabulary} rows"
    )


#: Base model -> name of the module in it that has an embedding of every token for every layer, "" where none has.
_per_layer: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _per_layer_name(model: nn.Module) -> str:
    return next((n for n, m in model.named_modules() if hasattr(m, "embed_tokens_per_layer")), "")


def per_layer_inputs(inputs: Inputs, embeds: Tensor, count: int, model: nn.Module) -> Tensor | None:
    """What Gemma 3n and 4 make of `input_ids` besides `embeds`: an embedding of every token for every layer, with rows
    in front for `count` virtual tokens, which have those of padding, as images and sound have there. None for models
    that have no such table."""
    name = read_off(_per_layer, model, _per_layer_name)
    backbone = model.get_submodule(name) if name else None
    if backbone is None or not getattr(backbone, "hidden_size_per_layer_input", None):
        return inputs.get("per_layer_inputs")
    ids, rows = inputs.get("input_ids"), inputs.get("per_layer_inputs")
    padding = getattr(backbone.config, "pad_token_id", None) or 0
    if rows is None and ids is not None:
        for kind in ("image", "video", "audio"):
            placeholder = getattr(model.config, f"{kind}_token_id", None)
            ids = ids if placeholder is None else ids.masked_fill(ids == placeholder, padding)
        rows = backbone.get_per_layer_inputs(ids)
    elif rows is None and "inputs_embeds" in inspect.signature(backbone.get_per_layer_inputs).parameters:
        rows = backbone.get_per_layer_inputs(None, embeds)  # Gemma 4 finds the ids that the embeddings are of
    if rows is None:
        return None
    virtual = backbone.get_per_layer_inputs(torch.full((len(embeds), count), padding, device=embeds.device))
    return torch.cat((virtual, rows), dim=1)


def fill_sizes(cfg: PromptLearningConfig, config: Any) -> None:
    """Fill the sizes that `cfg` leaves open from the base model's config, by PEFT's rules.

    Raises:
        ValueError: a size that the config does not say either.
    """
    data = text_config_of(config)

    def first(field: str, *names: str) -> int:
        for name in names:
            if data.get(name) is not None:
                return data[name]
        raise ValueError(
            f"Please specify `{field}` in `peft_config`: the config of the base model has none of {', '.join(names)}"
        )

    if cfg.num_layers is None:
        layers = getattr(config, "num_hidden_layers", None)
        cfg.num_layers = first("num_layers", "num_hidden_layers", "num_layers", "n_layer") if layers is None else layers
    if cfg.token_dim is None:
        cfg.token_dim = first("token_dim", "hidden_size", "n_embd", "d_model")
    if cfg.num_attention_heads is None:
        cfg.num_attention_heads = first(
            "num_attention_heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"
        )
    if cfg.num_transformer_submodules is None:
        cfg.num_transformer_submodules = 2 if cfg.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if hasattr(cfg, "encoder_hidden_size") and cfg.encoder_hidden_size is None:
        cfg.encoder_hidden_size = cfg.token_dim
