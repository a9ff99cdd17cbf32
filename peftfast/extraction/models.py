"""A plain LoRA of what two models differ in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from peftfast.errors import AdapterMismatchWarning, enumerate_some, warn
from peftfast.extraction.factors import Change, as_lora, check_rank, matrix, svd
from peftfast.keys import PREFIX, starts_of
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.methods.lora.config import LoraConfig
from peftfast.ops.finite import is_finite
from peftfast.quantization.originals import Originals
from peftfast.sites import Site, make_site
from peftfast.sites.site import has_site
from peftfast.wrapping.parents import read_by_parent
from peftfast.wrapping.targets import set_targets, shortest_suffixes


@torch.no_grad()
def extract_lora(
    base: nn.Module, tuned: nn.Module | str | os.PathLike | Mapping[str, Tensor], rank: int | float
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA that makes `tuned` of `base`, as nearly as its rank allows: for models that were trained in full, and
    those that adapters have been merged into.

    Every module that can carry a LoRA and whose weight differs gets one. What differs elsewhere, norms, biases and
    weights that are read past an adapter, is kept whole, as modules_to_save. How much of the change the ranks keep is
    logged. What only `tuned` has is left out, with a warning.

    Args:
        base: without adapters; of a quantised one, what quantising lost is part of the change.
        tuned: a model of the same modules without adapters, not quantised; its state dict; or a folder with
            `model.safetensors`, whole or sharded.
        rank: of every module, less where its weight has less; or a share in (0, 1] of the squared singular values that
            each module's rank must keep.

    Returns:
        Config and tensors in fp32, as `convert_to_lora` gives them.

    Raises:
        ValueError: a rank that is none; adapters in one of the two; nothing differs, or everything is kept whole; a
            tensor has another shape in `tuned` (of a resized vocabulary: resize the base first) or values that are not
            finite; a bias beside a quantised weight differs. KeyError: a tensor of `base` is missing in `tuned`.
        TypeError, FileNotFoundError: `tuned` is nothing of the above.
    """
    rank = check_rank(rank)
    for model in (base, tuned):
        if isinstance(model, nn.Module) and any(isinstance(m, (BaseTunerLayer, StandIn)) for m in model.modules()):
            raise ValueError("extract_lora compares models without adapters; merge_and_unload() or unload() them first")
    source = Originals(tuned, getattr(base, "base_model_prefix", ""))
    sites, whole, tied = _differences(base, source)
    if not sites and not whole:
        raise ValueError("The two models do not differ in any tensor, so there is nothing to extract")
    sites = sites or _unchanged(base, source, whole)

    def changes() -> Iterator[Change]:
        for name, (site, tensor) in sites.items():
            if name in tied:
                continue
            change = matrix(site, tensor).to(device=site.weight.device, dtype=torch.float32) - site.weight.dense(
                torch.float32
            )
            yield Change(name, site, svd(change.t() if site.looks_up else change, rank), torch.float32, {})

    config, tensors = as_lora(changes(), rank, None, limited=True)
    for head, table in tied.items():  # one change under two names: the head's factors are the table's, exchanged
        config.ensure_weight_tying = True
        for own, theirs in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            tensors[f"{PREFIX}{head}.{own}"] = tensors[f"{PREFIX}{table}.{theirs}"].t().contiguous()
    names = [name for name, _ in base.named_modules() if name]
    config.modules_to_save = sorted(whole) or None
    set_targets(config, list(sites), names, shortest_suffixes(sites, names))
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.fan_in_fan_out = any(site.weight.transposed for site, _ in sites.values())
    for name in (n for n in names if n.endswith(tuple(whole))):
        for key in base.get_submodule(name).state_dict():
            tensors[f"{PREFIX}{name}.{key}"] = source.tensor(f"{name}.{key}").detach().clone()
    if left := source.never_asked():
        warn(
            f"The tuned model has tensors that the base has none of, and that the adapter leaves out: "
            f"{enumerate_some(left)}. If it has more layers or another head, take a base that has them too.",
            AdapterMismatchWarning,
        )
    return config, tensors


def _differences(base: nn.Module, source: Originals) -> tuple[dict[str, tuple[Site, Tensor]], set[str], dict[str, str]]:
    """Modules with another weight, that weight with them; those that have to be kept whole; and of the first, heads
    that have the weight of a table in both models, with the table's name."""
    sites: dict[str, tuple[Site, Tensor]] = {}
    whole: set[str] = set()
    tied: dict[str, str] = {}
    known: dict[int, str] = {}  # where a Parameter that several modules share was met first
    for name, module in base.named_modules():
        if not whole.isdisjoint(starts_of(name)):  # inside one
            continue
        site = None if name and read_by_parent(base, name) else _site_of(module)
        own = {**module._parameters, **{k: b for k, b in module._buffers.items() if k in module.state_dict()}}
        for key, tensor in own.items():
            if tensor is None:
                continue
            full = f"{name}.{key}" if name else key
            first = known.setdefault(id(tensor), full)
            theirs = source.tensor(full, first)
            if site is not None and key == "weight":
                if _differ(site.weight.dense(), matrix(site, theirs), full):
                    sites[name] = (site, theirs)
                    table = first.rpartition(".")[0]
                    if table != name and table in sites and sites[table][0].looks_up and not site.looks_up:
                        if torch.equal(theirs, sites[table][1]):
                            tied[name] = table
            elif not (site is not None and site.weight.quantization and key != "bias") and _differ(
                tensor, theirs, full
            ):
                if site is not None and site.weight.quantization:
                    raise ValueError(f"{full} differs, and {name} is quantised, so it cannot be kept whole")
                if not name:
                    raise ValueError(
                        f"{type(base).__name__} itself has a Parameter that differs, which no adapter can hold: {full}"
                    )
                whole.add(name)
                sites.pop(name, None)
                break
    tied = {head: table for head, table in tied.items() if head in sites and table in sites}
    return sites, whole, tied


def _unchanged(base: nn.Module, source: Originals, whole: set[str]) -> dict[str, tuple[Site, Tensor]]:
    """A module for a LoRA that changes nothing, as a config has to name one. ValueError: all are kept whole."""
    found = {}
    for name, module in base.named_modules():
        if name and not name.endswith(tuple(whole)) and whole.isdisjoint(starts_of(name)):
            site = None if read_by_parent(base, name) else _site_of(module)
            if site is not None:
                found[name] = site
    if not found:
        raise ValueError(f"No module is left for a LoRA to be in; all are kept whole: {enumerate_some(whole)}")
    name = min(found, key=lambda n: found[n].looks_up)  # the first linear layer, if there is one
    return {name: (found[name], source.tensor(f"{name}.weight"))}


def _site_of(module: nn.Module) -> Site | None:
    """Where a LoRA of any rank can be in this module; None: it cannot."""
    if (
        not has_site(module)
        or getattr(module, "groups", 1) > 1
        or not isinstance(getattr(module, "weight", None), Tensor)
    ):
        return None
    try:
        return make_site(module)
    except TypeError:  # embeddings that are more than their tables
        return None


def _differ(ours: Tensor, theirs: Tensor, name: str) -> bool:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{name} is {list(ours.shape)} in the base and {list(theirs.shape)} in the tuned model; a vocabulary that "
            "was resized needs base.resize_token_embeddings first"
        )
    if theirs.is_floating_point() and not is_finite(theirs):
        raise ValueError(f"{name} of the tuned model has values that are not finite")
    # a model that was only stored in another dtype is the same model
    return not torch.equal(ours.detach().to(theirs.dtype), theirs.detach().to(ours.device))
