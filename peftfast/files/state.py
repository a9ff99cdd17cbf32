"""What belongs to an adapter, by the names of the live model and by the names of the file, in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig
from peftfast.embeddings import EMBEDDING_LAYER_NAMES, input_embeddings, output_embeddings
from peftfast.errors import AdapterLoadError, PeftWarning, close_matches, enumerate_some, warn
from peftfast.files.entry import Entry
from peftfast.keys import in_base, starts_of, strip_wrappers
from peftfast.layers.layer import BaseTunerLayer, without_adapters
from peftfast.layers.saved_modules import ModulesToSaveWrapper, TrainableTokensWrapper
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import base_modules, name_of, outer_modules
from peftfast.method import method_for
from peftfast.prompts.prompt import PromptEncoders
from peftfast.sharding import gathered, put_together, to_shards, whole_shape
from peftfast.sites.site import is_bias
from peftfast.wrapping.inventory import find_inventory

_FACTOR = re.compile(r"lora_(embedding_)?[AB](\.weight)?$")


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Adapter layers and wrappers of saved modules, by their names in `model`, without what is inside them."""
    listed = _listed(model)
    if listed is not None:
        yield from listed
        return
    for name, module in outer_modules(model, _is_wrapped):
        if _is_wrapped(module):
            yield strip_wrappers(name), module
            for where, layer in module.inside().items() if isinstance(module, BaseTunerLayer) else ():
                yield strip_wrappers(f"{name}.{where}"), layer


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, StandIn, PromptEncoders))


def _listed(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The same from the inventory, which costs nothing per adapter; None where there is none or where something else
    (a sharding engine's wrapper) stands in a listed place by now."""
    inventory, prefix = find_inventory(model)
    prompts = any(isinstance(child, PromptEncoders) for child in model._modules.values())
    if inventory is None or prompts or not inventory.stands():
        return None
    return [(prefix + strip_wrappers(key), wrapper) for key, wrapper in inventory.wrappers()]


def adapter_entries(model: nn.Module, adapter_name: str) -> list[Entry]:
    """Every tensor of an adapter in `model`: factors, modules saved beside it, trained token rows."""
    entries = []
    for key, module in wrapped_modules(model):
        if isinstance(module, BaseTunerLayer):
            entries.extend(layer_entries(key, module, adapter_name))
        elif isinstance(module, PromptEncoders):
            entries.extend(_prompt_entries(key, module, adapter_name))
        else:
            entries.extend(_wrapper_entries(key, module, adapter_name))
    return entries


def layer_entries(key: str, layer: BaseTunerLayer, adapter_name: str) -> Iterator[Entry]:
    adapter = layer.adapters.get(adapter_name)
    if adapter is None:
        return
    for slot_name, slot in adapter.slots.items():
        if not slot.saved:
            continue
        container = getattr(layer, slot_name)
        if slot.holder is None:
            live = f"{key}.{slot_name}.{adapter_name}"
            yield Entry(f"{key}.{slot_name}", live, container, adapter_name, layer=layer)
            continue
        holder = container[adapter_name]
        for leaf in (*slot.parameters(), *(slot.buffers or ())):
            file = f"{key}.{slot_name}" if slot.bare_in_file else f"{key}.{slot_name}.{leaf}"
            yield Entry(file, f"{key}.{slot_name}.{adapter_name}.{leaf}", holder, leaf, layer=layer)


def _wrapper_entries(key: str, wrapper: StandIn, adapter_name: str) -> Iterator[Entry]:
    for file, live in wrapper.adapter_state_dict_load_map(adapter_name).items():
        path, _, attribute = live.rpartition(".")
        layer = getattr(wrapper, "token_adapter", None)
        yield Entry(f"{key}.{file}", f"{key}.{live}", wrapper.get_submodule(path), attribute, layer=layer)


def _prompt_entries(key: str, encoders: PromptEncoders, adapter_name: str) -> Iterator[Entry]:
    """One tensor without the model's prefix: the prompt, or what the encoder's network makes of its parameters."""
    if adapter_name in encoders:
        encoder = encoders[adapter_name]
        leaf = "prompt_embeddings" if encoder.has_network else "embedding.weight"
        live = f"{key}.{adapter_name}.{leaf}"
        yield Entry("prompt_embeddings", live, encoder, "prompt_embeddings", encoder.load_prompt_embeddings)


def trains_rows(cfg: PeftConfig) -> bool:
    """Whether an adapter has rows of embeddings, which travel without the rest of the tables."""
    fields = ("trainable_token_indices", "token_indices")
    return any(getattr(cfg, name, None) is not None for name in fields)


def rows_said_twice(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Keys of rows that a tied head shares -> the key under which they are saved. PEFT saves them under both where a
    vocabulary was resized."""
    keys = {m.token_adapter: key for key, m in wrapped_modules(model) if isinstance(m, TrainableTokensWrapper)}
    sources = {key: layer.merger.sources.get(adapter_name) for layer, key in keys.items()}
    slot = "token_adapter.trainable_tokens_delta"
    return {f"{key}.{slot}": f"{keys[source]}.{slot}" for key, source in sources.items() if source is not None}


# ---- out of the model -----------------------------------------------------------------------------------
def adapter_state_dict(
    model: nn.Module,
    cfg: PeftConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool = False,
    *,
    complete: bool = True,
) -> dict[str, Tensor]:
    """The adapter's tensors under the names of the file.

    Args:
        state_dict: take the tensors from here (gathered from a sharded model) instead of from the model.
        save_embedding_layers: with the base's embedding and head weights.
        complete: False: what of the adapter is in `state_dict`.

    Raises:
        AdapterLoadError: `state_dict` lacks something.
    """
    given = None if state_dict is None else {strip_wrappers(k): v for k, v in state_dict.items()}
    if given is None:
        to_shards(model)
    entries = adapter_entries(model, adapter_name)
    if given is not None and not complete:
        there = [entry for entry in entries if _has(given, entry)]
        # views of other layers' factors, which no state dict holds, are part of the whole only
        whole = sum(entry.is_kept or entry.store is not None for entry in entries)
        entries = entries if len(there) >= whole else there
    result = {entry.file: _value(entry, given, adapter_name) for entry in entries}
    bias = getattr(cfg, "bias", "none")
    source = given or {}
    if given is None and (bias != "none" or save_embedding_layers):  # else the whole model is listed for nothing
        source = {strip_wrappers(k): v for k, v in model.state_dict(keep_vars=True).items()}
    if source:
        source = _unmerged(model, source)
    if bias != "none":
        result |= _biases(model, bias, adapter_name, source)
    if save_embedding_layers:
        result |= _embeddings(model, cfg, adapter_name, source)
    result = gathered(result)  # also detaches
    method = method_for(cfg)
    return method.to_file(cfg, result) if hasattr(type(method), "to_file") else result


def _unmerged(model: nn.Module, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A model's tensors without the adapters that are inside: whoever loads them puts the adapters on top."""
    originals: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            originals |= module.merger.originals()
    if not originals:
        return source
    names = {strip_wrappers(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    inside = {name: originals[p] for name, p in names.items() if p in originals and name in source}
    return {**source, **inside}


def _value(entry: Entry, given: Mapping[str, Tensor] | None, adapter_name: str) -> Tensor:
    """A tensor of an adapter, of those gathered from a sharded model if there are any."""
    if given is None:
        return entry.tensor()
    if entry.live in given:
        return given[entry.live]
    network = getattr(entry.owner, "has_network", False)  # what is saved is made of tensors, and none of them
    own = _network(entry, given) if network else {}
    if own:
        return entry.owner.prompt_of(own)
    tensor = None if network else entry.tensor()
    if network or isinstance(tensor, nn.Parameter):
        raise AdapterLoadError(
            f"The given state_dict has no {entry.live!r}, which adapter {adapter_name!r} needs."
            f"{close_matches(entry.live, given)}"
        )
    return tensor  # a view of another layer's factor, which no state dict holds


def _biases(model: nn.Module, bias: str, adapter_name: str, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's biases that are saved with an adapter, by the config's `bias`."""
    wrapped = list(wrapped_modules(model))
    adapted = {key: module for key, module in wrapped if isinstance(module, BaseTunerLayer)}
    # what adapters have themselves, and what a copy of theirs stands in for
    others = {f"{key}.{place}" for key, module in wrapped for place in (*module.adapter_layer_names, "original_module")}
    found = {}
    for key, tensor in source.items():
        if not is_bias(key) or not others.isdisjoint(starts_of(key)):
            continue
        holder, _, rest = key.rpartition(".base_layer.")
        layer = adapted.get(holder)
        own = layer is not None and adapter_name in layer.adapters
        if bias == "all" or (own and rest == "bias"):
            # a file has to load by itself, without the layers of other adapters
            found[key if layer is None or own else without_places(key)] = tensor
    return found


def _embeddings(
    model: nn.Module, cfg: PeftConfig, adapter_name: str, source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base's embeddings and head, as they are saved with an adapter."""
    modules = embedding_modules(model)
    if targets_embeddings(model, cfg, adapter_name) and not trains_rows(cfg):
        # an adapted embedding travels with its adapter; where none is, they were resized, and both do
        modules = {key: module for key, module in modules.items() if _adapts(module, adapter_name)}
    # an embedding may be a module around an adapted one (a ViT's around a convolution)
    adapters = {entry.live for name in model.peft_config for entry in adapter_entries(model, name)}
    base = {k: v for k, v in source.items() if k not in adapters}
    found = {}
    for name, module in modules.items():
        place = next((place for kind, place in _BASE_INSIDE.items() if isinstance(module, kind)), "")
        own = bool(place) and adapter_name in module._get_available_adapters()
        inside, saved = f"{name}.{place}", f"{name}.{place if own else ''}"
        found |= {saved + k.removeprefix(inside): v for k, v in base.items() if k.startswith(inside)}
    return found


def _network(entry: Entry, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a prompt encoder with a network, by their names in it."""
    inside = entry.live.removesuffix(entry.attribute)
    return {k.removeprefix(inside): v for k, v in given.items() if k.startswith(inside)}


def is_in(state_dict: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> bool:
    """Whether any tensor of an adapter is among those gathered from a sharded model: DeepSpeed leaves out what is
    frozen."""
    given = {strip_wrappers(k): v for k, v in state_dict.items()}
    return any(_has(given, entry) for entry in adapter_entries(model, adapter_name))


def _has(given: Mapping[str, Tensor], entry: Entry) -> bool:
    """Whether a tensor, or what it is made of, is among these."""
    return entry.live in given or bool(getattr(entry.owner, "has_network", False) and _network(entry, given))


#: Where the base module's tensors are inside what replaced it.
_BASE_INSIDE: dict[type, str] = {
    BaseTunerLayer: "base_layer.",
    TrainableTokensWrapper: "token_adapter.base_layer.",
    ModulesToSaveWrapper: "original_module.",
}


_INSIDE = re.compile(r"\.(base_layer|token_adapter|original_module)(?=\.)")


def without_places(key: str) -> str:
    """A base tensor's name without where it is inside what replaced its module, which differs from model to model."""
    return _INSIDE.sub("", key)


def targets_embeddings(model: nn.Module, cfg: PeftConfig, adapter_name: str) -> bool:
    """Whether the config's targets name an embedding or head, in the way in which PEFT looks for it, and the adapter is
    on one: it is not where the config leaves it out again, by its layers or as a module that is trained in full."""
    targets = getattr(cfg, "target_modules", None)
    if isinstance(targets, str):
        names = [n for n, _ in base_modules(model) if n.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
        named = any(re.fullmatch(targets, in_base(n)) for n in names)
    else:
        named = any(name in (targets or ()) for name in EMBEDDING_LAYER_NAMES)
    if not named:
        return False
    modules = embedding_modules(model).values()
    return not modules or any(_adapts(module, adapter_name) for module in modules)


def _adapts(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, BaseTunerLayer) and adapter_name in module.adapters


def embedding_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Input and output embedding of a transformers model, as they stand in `model` now, by name."""
    found: dict[str, nn.Module] = {}
    for module in (input_embeddings(model), output_embeddings(model)):
        name = name_of(model, module)
        if name:
            found[strip_wrappers(name)] = module
    return found


def without_own_embeddings(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file without the embeddings and head of the base that are saved beside adapters of them, where they
    are the model's own, in its dtype."""
    own = {}
    for name, module in embedding_modules(model).items() if tensors else ():
        parameters = without_adapters(module).named_parameters()
        own |= {f"{in_base(name)}.{k}": p for k, p in parameters if not p.is_meta}

    def is_own(key: str, tensor: Tensor) -> bool:
        here = own.get(without_places(in_base(key)))
        if here is None or whole_shape(here) != tensor.shape:
            return False
        here = put_together(here.detach())
        return torch.equal(here, tensor.to(here))

    return {key: tensor for key, tensor in tensors.items() if not is_own(key, tensor)}


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save what has no values, or what a sharded engine has taken apart, an empty factor being a lost
    adapter; warn of what looks like it."""
    without = [k for k, t in tensors.items() if t.is_meta]
    if without:
        raise AdapterLoadError(
            f"These tensors are on the meta device and have no values yet: {enumerate_some(without)}. Load the adapter "
            "(load_adapter), or initialise it, before it is saved"
        )
    # a rank of zero has two dimensions; what an engine leaves behind has one
    empty = [k for k, t in tensors.items() if t.numel() == 0 and t.dim() < 2]
    if empty:
        raise AdapterLoadError(
            f"These tensors are empty: {enumerate_some(empty)}. The model's parameters are sharded and were not "
            "gathered; pass the gathered tensors as state_dict="
        )
    flat = [k for k, t in tensors.items() if t.dim() == 1 and _FACTOR.search(k)]
    if flat:
        warn(
            f"These factors are flat where they should be matrices: {enumerate_some(flat)}. They look like DeepSpeed "
            "ZeRO-3 / FSDP shards that were not gathered, and no model will load them; pass the gathered tensors as "
            "state_dict=",
            PeftWarning,
        )
