"""A LoRA in place of changed weights: of what other adapters change, and of what two models differ in."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.config import PeftConfig, PeftType
from peftfast.errors import enumerate_some
from peftfast.files.fingerprint import fingerprint
from peftfast.files.io import save_adapter
from peftfast.files.state import adapter_entries, wrapped_modules
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.method import Adapter
from peftfast.methods.lora_combine import padded, svd_of_sum
from peftfast.methods.lora_config import LoraConfig
from peftfast.quantization.originals import Originals
from peftfast.sites import Site, make_site
from peftfast.sites.site import has_site
from peftfast.wrapping.targets import make_matcher, shortest_suffixes

logger = logging.getLogger("peftfast")

PREFIX = "base_model.model."  # of every key in a file
#: Fields that say which modules an adapter is in, and what else of the model it keeps.
_WHERE = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication",
    "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "revision", "task_type",
)  # fmt: skip

#: u [N, q], s [q], vh [q, K] with u diag(s) vh the change of a weight.
Svd = tuple[Tensor, Tensor, Tensor]


# ---- of adapters -----------------------------------------------------------------------------------------------------
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
    size. modules_to_save and trained tokens come along. The scaling is inside the factors: it is 1.

    Args:
        rank: of every module; or a share in (0, 1] of the squared singular values that each module's rank must keep.
        compile_kwargs: arguments of `torch.compile` for the decomposition.

    Returns:
        Config and tensors as they are in files, for `get_peft_model` and `set_peft_model_state_dict`.

    Raises:
        TypeError: there are no adapters here, or some that add no matrix to a weight (IA3, prompts).
        ValueError: a rank that is none, or larger than a weight; an adapter that trains biases of the base.
    """
    _check_rank(rank)
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
    decomposed = _svd if compile_kwargs is None else torch.compile(_svd, **compile_kwargs)

    def changes() -> Iterator[_Change]:
        from tqdm.auto import tqdm

        for key, layer in tqdm(layers.items(), disable=not progressbar, desc="Converting to LoRA"):
            adapter = layer.adapters[adapter_name]
            dtype = adapter[adapter.pair[0]].dtype
            bias = {f"{slot}.bias": adapter[f"{slot}.bias"] * adapter.scale for slot in adapter.pair
                    if f"{slot}.bias" in adapter}  # fmt: skip
            yield _Change(key.removeprefix(PREFIX), layer.site, _svd_of(adapter, layer, decomposed), dtype, bias)

    config, tensors = _as_lora(changes(), rank, cfg)
    if cfg is None:
        _target(config, [key.removeprefix(PREFIX) for key in layers], [n for n, _ in model.named_modules()])
    inside = tuple(f"{key}." for key in layers)
    for entry in adapter_entries(model, adapter_name) if cfg is not None else ():
        if not entry.file.startswith(inside):
            tensors[entry.file] = getattr(entry.owner, entry.attribute).detach().clone()
    return config, tensors


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """`convert_to_lora`, written to the folder `path`."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    save_adapter(Path(path), config, tensors, auto_mapping=None, base=fingerprint(base))


def _convertible(model: nn.Module, name: str) -> dict[str, BaseTunerLayer]:
    """The layers that have the adapter, by their names in files."""
    found = {key: module for key, module in wrapped_modules(model) if isinstance(module, BaseTunerLayer)}
    if not found:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")
    layers = {key: layer for key, layer in found.items() if name in layer.adapters}
    if not layers:
        present = sorted({a for layer in found.values() for a in layer.adapters})
        raise ValueError(f"Adapter {name!r} not found. Adapters present: {present}")
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
    if getattr(cfg, "bias", "none") != "none":
        raise ValueError(f"The adapter's config sets bias={cfg.bias}, this is not supported right now.")
    if cfg.peft_type == PeftType.LORA and not cfg.use_dora:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=4,
        )


def _svd_of(adapter: Adapter, layer: BaseTunerLayer, decomposed: Callable[[Tensor], Svd]) -> Svd:
    pair = adapter.method.as_product(adapter)
    if pair is not None:
        a, b = (f.flatten(1).to(torch.promote_types(f.dtype, torch.float32)) for f in pair)
        return svd_of_sum([(a, b)], [1.0])
    shape = layer.site.weight.shape
    change = layer.get_delta_weight(adapter.name)
    change = change.t() if change.dim() == 2 and change.shape != shape else change.reshape(shape)
    return decomposed(change.t() if is_table(layer.site) else change)


# ---- of two models ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def extract_lora(
    base: nn.Module, tuned: nn.Module | str | os.PathLike | Mapping[str, Tensor], rank: int | float
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA that makes `tuned` of `base`, as nearly as its rank allows: for models that were trained in full, and
    those that adapters have been merged into.

    Every module that can carry a LoRA and whose weight differs gets one. What differs elsewhere, norms and biases, is
    kept whole, as modules_to_save. How much of the change the ranks keep is logged.

    Args:
        base: without adapters; of a quantised one, what quantising lost is part of the change.
        tuned: a model of the same modules without adapters, not quantised; its state dict; or a folder with
            `model.safetensors`, whole or sharded.
        rank: of every module, less where its weight has less; or a share in (0, 1] of the squared singular values that
            each module's rank must keep.

    Returns:
        Config and tensors in fp32, as `convert_to_lora` gives them.

    Raises:
        ValueError: a rank that is none; adapters in one of the two; nothing differs; a tensor of `base` is missing in
            `tuned` or has another shape there (of a resized vocabulary: resize the base first); values that are not
            finite. TypeError, FileNotFoundError: `tuned` is nothing of the above.
    """
    _check_rank(rank)
    for model in (base, tuned):
        if isinstance(model, nn.Module) and any(isinstance(m, (BaseTunerLayer, StandIn)) for m in model.modules()):
            raise ValueError("extract_lora compares models without adapters; merge_and_unload() or unload() them first")
    source = Originals(tuned, getattr(base, "base_model_prefix", ""))
    sites, whole, tied = _differences(base, source)
    if not sites and not whole:
        raise ValueError("The two models do not differ in any tensor, so there is nothing to extract")

    def changes() -> Iterator[_Change]:
        for name, (site, tensor) in sites.items():
            if name in tied:
                continue
            change = _matrix(site, tensor, torch.float32) - site.weight.dense(torch.float32)
            yield _Change(name, site, _svd(change.t() if is_table(site) else change), torch.float32, {})

    config, tensors = _as_lora(changes(), rank, None, limited=True)
    for head, table in tied.items():  # one change under two names: the head's factors are the table's, exchanged
        config.ensure_weight_tying = True
        for own, theirs in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            tensors[f"{PREFIX}{head}.{own}"] = tensors[f"{PREFIX}{table}.{theirs}"].t().contiguous()
    names = [name for name, _ in base.named_modules() if name]
    config.modules_to_save = sorted(whole) or None
    if sites:
        _target(config, list(sites), names)
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.fan_in_fan_out = any(getattr(site.weight, "transposed", False) for site, _ in sites.values())
    for name in (n for n in names if any(n.endswith(saved) for saved in whole)):
        for key in base.get_submodule(name).state_dict():
            tensors[f"{PREFIX}{name}.{key}"] = source.tensor(f"{name}.{key}").detach().clone()
    return config, tensors


def _differences(
    base: nn.Module, source: Originals
) -> tuple[dict[str, tuple[Site, Tensor]], list[str], dict[str, str]]:
    """Modules with another weight, that weight with them; those that have to be kept whole; and of the first, heads
    that have the weight of a table in both models, with the table's name."""
    sites: dict[str, tuple[Site, Tensor]] = {}
    whole: list[str] = []
    tied: dict[str, str] = {}
    known: dict[int, str] = {}  # where a Parameter that several modules share was met first
    for name, module in base.named_modules():
        if any(name.startswith(f"{saved}.") for saved in whole):
            continue
        site = make_site(module) if has_site(module) and _carries(module) else None
        own = {**module._parameters, **{k: b for k, b in module._buffers.items() if k in module.state_dict()}}
        for key, tensor in own.items():
            if tensor is None:
                continue
            full = f"{name}.{key}" if name else key
            first = known.setdefault(id(tensor), full)
            theirs = source.tensor(full, first)
            if site is not None and key == "weight":
                if _differ(site.weight.dense(), _matrix(site, theirs, None), full):
                    sites[name] = (site, theirs)
                    table = first.rpartition(".")[0]
                    if table != name and table in sites and is_table(sites[table][0]) and not is_table(site):
                        if torch.equal(theirs, sites[table][1]):
                            tied[name] = table
            elif not (site is not None and site.weight.quantization and key != "bias") and _differ(
                tensor, theirs, full
            ):
                whole.append(name)
                break
        if whole and whole[-1] == name:
            sites = {n: s for n, s in sites.items() if n != name and not n.startswith(f"{name}.")}
            if not name:
                raise ValueError(
                    f"{type(base).__name__} itself has a Parameter that differs, which no adapter can hold: {full}"
                )
    tied = {head: table for head, table in tied.items() if head in sites and table in sites}
    return sites, whole, tied


def _carries(module: nn.Module) -> bool:
    """Whether a LoRA of any rank can be in this module."""
    return getattr(module, "groups", 1) == 1 and isinstance(getattr(module, "weight", None), Tensor)


def _matrix(site: Site, stored: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the layout of the site's module as W [N, K]."""
    shape = site.weight.shape
    if stored.numel() != shape[0] * shape[1]:
        return stored
    matrix = stored.t() if getattr(site.weight, "transposed", False) else stored.reshape(shape)
    return matrix.to(device=site.weight.device, dtype=dtype or matrix.dtype)


def _differ(ours: Tensor, theirs: Tensor, name: str) -> bool:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{name} is {list(ours.shape)} in the base and {list(theirs.shape)} in the tuned model; a vocabulary that "
            "was resized needs base.resize_token_embeddings first"
        )
    if theirs.is_floating_point() and not torch.isfinite(theirs).all():
        raise ValueError(f"{name} of the tuned model has values that are not finite")
    # a model that was only stored in another dtype is the same model
    return not torch.equal(ours.detach().to(theirs.dtype), theirs.detach().to(ours.device))


# ---- both ------------------------------------------------------------------------------------------------------------
class _Change(NamedTuple):
    """What is to become factors in one module."""

    name: str  # of the module in the base model
    site: Site
    svd: Svd
    dtype: torch.dtype  # of the factors
    bias: Mapping[str, Tensor]  # of the up factor's module, by slot


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"rank must be an int, or a float in (0, 1], got {rank!r} of type {type(rank).__name__}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        )
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if rank < 0:
        raise ValueError(f"rank must be at least 1, got {rank}")


def is_table(site: Site) -> bool:
    """Whether the site's weight is looked up: its factors make the transpose of W."""
    return "lora_embedding_A" in site.low_rank_slots(1)


def _svd(change: Tensor) -> Svd:
    return torch.linalg.svd(change, full_matrices=False)


def _enough(s: Tensor, share: float) -> int:
    """The smallest rank that keeps `share` of the squared singular values."""
    energy = torch.cumsum(s.double() ** 2, 0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(s))


def _as_lora(
    changes: Iterable[_Change], rank: int | float, cfg: PeftConfig | None, limited: bool = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Config and tensors. `limited`: ranks are at most what a weight can have."""
    general = rank if isinstance(rank, int) else 1
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    kept: list[float] = []
    biased = False
    for name, site, (u, s, vh), dtype, bias in changes:
        most = min(site.weight.shape)
        r = _enough(s, rank) if isinstance(rank, float) else min(rank, most) if limited else rank
        total = float((s.double() ** 2).sum())
        kept.append(float((s[:r].double() ** 2).sum()) / total if total else 1.0)
        pair = (padded(vh[:r], 0, r), padded(u[:, :r] * s[:r], 1, r))
        for (slot_name, slot), factor in zip(site.low_rank_slots(r).items(), pair, strict=True):
            key = f"{PREFIX}{name}.{slot_name}" + (".weight" if slot.holder is not None else "")
            tensors[key] = factor.reshape(slot.shape).to(dtype).contiguous()
        for slot, value in bias.items():
            biased = True
            tensors[f"{PREFIX}{name}.{slot}"] = value.detach().to(dtype)
        if r != general or isinstance(rank, float):
            ranks[name] = r
    if kept:
        logger.info("peftfast: %d modules, %.4f to %.4f of the change kept", len(kept), min(kept), max(kept))
    # the first name that a module's ends with counts, so longer ones stand first
    pattern = dict(sorted(ranks.items(), key=lambda item: -item[0].count(".")))
    fields = {} if cfg is None else {n: getattr(cfg, n) for n in _WHERE if getattr(cfg, n, None) is not None}
    config = LoraConfig(
        r=general, lora_alpha=general, rank_pattern=pattern, alpha_pattern=dict(pattern), lora_bias=biased, **fields
    )
    return config, tensors


def _target(config: LoraConfig, wanted: list[str], names: Iterable[str]) -> None:
    """Let the config's targets be these modules and no others."""
    names, only = [n for n in names if n], set(wanted)
    config.target_modules = shortest_suffixes(wanted, [n for n in names if n not in only])
    if {n for n in names if make_matcher(config)(n)} != only:  # a name that another's ends with
        config.target_modules = "|".join(re.escape(n) for n in wanted)
    missed = only - {n for n in names if make_matcher(config)(n)}
    if missed:
        raise ValueError(
            f"{enumerate_some(sorted(missed))} would be kept whole as well, because modules_to_save="
            f"{config.modules_to_save} matches by the ends of names"
        )
