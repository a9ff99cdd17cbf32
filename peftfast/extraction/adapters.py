"""A plain LoRA in place of an adapter: of another method, or of a higher rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, PeftType
from peftfast.errors import check_present, enumerate_some, warn
from peftfast.extraction.factors import Change, Svd, as_lora, check_rank, energy_of, matrix, svd
from peftfast.files.fingerprint import fingerprint
from peftfast.files.io import check_folder, save_adapter, vocabulary_changed
from peftfast.files.state import adapter_entries, adapter_state_dict, wrapped_modules
from peftfast.keys import PREFIX
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.walk import base_of
from peftfast.method import changes_base
from peftfast.methods.lora.combine import svd_of_sum
from peftfast.methods.lora.config import LoraConfig
from peftfast.wrapping.targets import set_targets, shortest_suffixes


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A plain LoRA that changes the weights as adapter `adapter_name` of `model` does, or as nearly as its rank allows:
    AdaLoRA and DoRA for servers that know neither, a LoRA of a lower rank.

    What has factors (LoRA, AdaLoRA) is decomposed through them, in no time; DoRA's change takes an SVD of the weight's
    size. modules_to_save, trained tokens and resized embeddings come along. The scaling is inside the factors: it is 1.

    Args:
        rank: of every module; or a share in (0, 1] of the squared singular values that each module's rank must keep.
        compile_kwargs: arguments of `torch.compile` for the decomposition.

    Returns:
        Config and tensors as they are in files, for `get_peft_model` and `set_peft_model_state_dict`.

    Raises:
        TypeError: there are no adapters here, or some that add no matrix to a weight (IA3, prompts).
        ValueError: a rank that is none, or larger than a weight; an adapter that trains biases of the base, or whose
            initialisation changed the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA). RuntimeError: DoRA beside merged
            adapters.
    """
    rank = check_rank(rank)
    layers = _convertible(model, adapter_name)
    cfg = getattr(model, "peft_config", {}).get(adapter_name)
    _check_config(cfg)
    if isinstance(rank, int):
        for layer in layers.values():
            if rank > min(layer.site.weight.shape):
                raise ValueError(
                    f"The chosen rank {rank} is larger than the weight shape ({min(layer.site.weight.shape)}), please "
                    "choose a lower rank."
                )
    decomposed = partial(svd if compile_kwargs is None else torch.compile(svd, **compile_kwargs), rank=rank)

    def changes() -> Iterator[Change]:
        from tqdm.auto import tqdm

        for key, layer in tqdm(layers.items(), disable=not progressbar, desc="Converting to LoRA"):
            adapter = layer.adapters[adapter_name]
            dtype = adapter[adapter.pair[0]].dtype
            bias = {f"{slot}.bias": adapter[f"{slot}.bias"] * adapter.scale for slot in adapter.pair
                    if f"{slot}.bias" in adapter}  # fmt: skip
            yield Change(key.removeprefix(PREFIX), layer.site, _svd_of(adapter, layer, decomposed), dtype, bias)

    config, tensors = as_lora(changes(), rank, cfg)
    if cfg is None:
        wanted, names = [key.removeprefix(PREFIX) for key in layers], [n for n, _ in model.named_modules() if n]
        set_targets(config, wanted, names, shortest_suffixes(wanted, names))
    else:
        inside = tuple(f"{key}." for key in layers)
        factors = {entry.file for entry in adapter_entries(model, adapter_name) if entry.file.startswith(inside)}
        saved = adapter_state_dict(model, cfg, adapter_name, None, vocabulary_changed(model, cfg))
        tensors |= {key: tensor.clone() for key, tensor in saved.items() if key not in factors}
    return config, tensors


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written to the folder `path`.

    Raises:
        ValueError: as there, or `path` is a file.
    """
    check_folder(path)
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    save_adapter(Path(path), config, tensors, auto_mapping=None, base=fingerprint(base_of(model)))


def _convertible(model: nn.Module, name: str) -> dict[str, BaseTunerLayer]:
    """The layers that have the adapter, by their names in files."""
    found = {key: module for key, module in wrapped_modules(model) if isinstance(module, BaseTunerLayer)}
    if not found:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    check_present(name, {a for layer in found.values() for a in layer.adapters})
    layers = {key: layer for key, layer in found.items() if name in layer.adapters}
    unsupported = [key for key, layer in layers.items() if not layer.supports_lora_conversion(name)]
    if unsupported:
        kinds = sorted({layers[key]._get_name() for key in unsupported})
        raise TypeError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(kinds)} "
            f"({enumerate_some(unsupported)})."
        )
    return {key if key.startswith(PREFIX) else PREFIX + key: layer for key, layer in layers.items()}


def _check_config(cfg: PeftConfig | None) -> None:
    if cfg is None:
        return
    if changes_base(cfg):
        raise ValueError(
            f"init_lora_weights={cfg.init_lora_weights!r} has changed the base weights, which a plain LoRA starts from "
            "unchanged. Save the adapter with path_initial_model_for_weight_conversion= and convert that"
        )
    if getattr(cfg, "bias", "none") != "none":
        raise ValueError(f"The adapter's config sets bias={cfg.bias}, this is not supported right now.")
    if cfg.peft_type == PeftType.LORA and cfg.variant is None:
        warn("Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.")


def _svd_of(adapter: Adapter, layer: BaseTunerLayer, decomposed: Callable[[Tensor], Svd]) -> Svd:
    pair = adapter.method.as_product(adapter)
    if pair is not None:
        a, b = (f.flatten(1).to(torch.promote_types(f.dtype, torch.float32)) for f in pair)
        u, s, vh = svd_of_sum([(a, b)], [1.0])
        return Svd(u, s, vh, energy_of(s))
    change = matrix(layer.site, layer.get_delta_weight(adapter.name))
    return decomposed(change.t() if layer.site.looks_up else change)
