"""How the tensors of a file fit an adapter in a model: everything that does not, in one report, before anything is
changed; then the loading itself."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.config import PeftConfig, plain_name
from peftfast.errors import AdapterLoadError, AdapterMismatchWarning, PeftWarning, every_name, warn
from peftfast.files.entry import Entry
from peftfast.files.experts import migrate_experts
from peftfast.files.fingerprint import METADATA_KEY as BASE_KEY
from peftfast.files.fingerprint import differences
from peftfast.files.metadata import CONFIG_KEY
from peftfast.files.renamed import SLOT
from peftfast.files.state import (
    adapter_entries,
    embedding_modules,
    layer_entries,
    rows_said_twice,
    without_places,
    wrapped_modules,
)
from peftfast.keys import PREFIX, in_base, strip_wrappers
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.mergeable import check_decodable
from peftfast.layers.walk import base_of
from peftfast.method import reads_base
from peftfast.ops.finite import is_finite
from peftfast.sharding import copy_whole, is_distributed, to_shards, whole_shape
from peftfast.sites.site import bias_of, is_bias


@dataclass
class Fit:
    """How a set of tensors fits an adapter in a model; nothing has been changed yet.

    Attributes:
        found: (entry, tensor) pairs that will be loaded. base: same for base tensors saved with the adapter.
        missing: file keys the adapter has and the file has not. unexpected: the other way round, `foreign` included.
        unset: names in the model of what will not be loaded.
        foreign: of these, the ones for modules that the base model does not have.
        mismatched: "key: shape in the file, shape here". advice: how the base model comes to the shapes of the file.
        mistyped: as mismatched for kinds of numbers. broken: keys with NaN or infinite values, or with values that the
            dtype here cannot hold. fixed: "key why" of tensors that cannot be written.
        doubts: what else speaks against this adapter on this model (another base, another task, a changed config).
    """

    adapter_name: str
    found: list[tuple[Entry, Tensor]] = field(default_factory=list)
    base: list[tuple[str, Tensor]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    advice: str = ""
    mistyped: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def compare(self, key: str, tensor: Tensor, entry: Entry | None, here: Tensor, finite: bool) -> None:
        """Note how a tensor of the file fits what is `here`: the adapter's `entry`, or a tensor of the base."""
        shape = whole_shape(here)
        if shape != tensor.shape:
            self.mismatched.append(
                f"{key}: copying a param with shape {tuple(tensor.shape)} from checkpoint, the shape in current model "
                f"is {tuple(shape)}"
            )
            if entry is not None:
                self.unset.append(entry.live)
            return
        if not is_alike(here, tensor):
            self.mistyped.append(f"{key}: {tensor.dtype} in the file, {here.dtype} here")
            return
        why = None if entry is None else entry.refusal(tensor)
        if why is not None:
            self.fixed.append(f"{key} {why}")
            return
        if finite and not holds(here.dtype, tensor):
            self.broken.append(key)
        if entry is None:
            self.base.append((key, tensor))
        else:
            self.found.append((entry, tensor))

    def wrong(self) -> list[str]:
        """What cannot be right, whoever wrote the file; one line each."""
        lines = []
        if self.mismatched:
            lines.append(f"size mismatch for {every_name(self.mismatched)}{self.advice}")
        if self.mistyped:
            lines.append(f"numbers of another kind in {every_name(self.mistyped)}")
        if self.broken:
            lines.append(f"NaN or infinite values in {every_name(self.broken)}")
        if self.fixed:
            lines.append(f"tensors that cannot be written: {every_name(self.fixed)}")
        if self.foreign:
            lines.append(f"the base model has no such modules: {every_name(self.foreign)}")
        if self.missing and not (self.found or self.base or self.mismatched or lines):
            count = len(self.unexpected)
            what = f"None of the {count} tensors in the file belongs to" if count else "There are no tensors for"
            lines.append(f"{what} this adapter, which needs {every_name(self.missing)}")
        return lines

    def odd(self) -> list[str]:
        """What PEFT lets pass, one line each."""
        lines = []
        if self.missing:
            lines.append(f"Found missing adapter keys while loading the checkpoint: {every_name(self.missing)}.")
        rest = set(self.foreign)
        unexpected = [k for k in self.unexpected if k not in rest]
        if unexpected:
            lines.append(f"Found unexpected keys while loading the checkpoint: {every_name(unexpected)}.")
        return lines + self.doubts

    def check(self, strict: bool | str, ignore_mismatched_sizes: bool = False, *, only_tensors: bool = False) -> None:
        """Refuse what cannot be right; say, or with strict=True refuse, what PEFT lets pass; "off" says nothing.

        Args:
            ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
            only_tensors: for callers that are handed the names that did not fit, and decide themselves.

        Raises:
            AdapterLoadError: naming every offender.
        """
        if strict not in (True, False, "off"):
            raise ValueError(f"strict must be True, False or 'off', got {strict!r}")
        if strict == "off":
            return
        wrong, odd = self.wrong(), self.odd()
        if only_tensors:
            wrong, odd = wrong[: sum(map(bool, (self.mismatched, self.mistyped, self.broken, self.fixed)))], []
        if self.mismatched and ignore_mismatched_sizes:
            wrong = wrong[1:]
            odd.append(f"Some weights were not loaded because their shapes differ: {every_name(self.mismatched)}.")
        if wrong or (strict is True and odd):
            raise AdapterLoadError(
                f"Error(s) in loading adapter {self.adapter_name!r}; nothing was changed:\n  "
                + "\n  ".join(wrong + odd)
            )
        if odd:
            warn("\n".join(odd), AdapterMismatchWarning)

    def incompatible_keys(self) -> Any:
        """As `nn.Module.load_state_dict` and PEFT return it: what is missing by its name in the model, in which
        integrations look for the adapter's."""
        return torch.nn.modules.module._IncompatibleKeys(self.unset, self.unexpected)

    def fill_gaps(self, model: nn.Module, *, empty: bool, everywhere: bool = False) -> None:
        """Initialise the layers that would be left without values, where the file lacks a usable tensor.

        Args:
            empty: the adapter was created without values; otherwise only tensors on the meta device have none.
            everywhere: all layers, because initialising changes the base as well.
        """
        if not self.missing and not self.mismatched and not everywhere:
            return
        loaded = {(id(entry.owner), entry.attribute) for entry, _ in self.found}
        gaps: list[tuple[BaseTunerLayer, Adapter, list[Entry]]] = []
        for key, module in wrapped_modules(model):
            layer = module if isinstance(module, BaseTunerLayer) else getattr(module, "token_adapter", None)
            adapter = None if layer is None else layer.adapters.get(self.adapter_name)
            if adapter is None:
                continue
            entries = list(layer_entries(key, layer, self.adapter_name))
            complete = all(
                (id(entry.owner), entry.attribute) in loaded or not (empty or entry.tensor().is_meta)
                for entry in entries
            )
            if complete and not (everywhere and self.adapter_name not in layer.merger.sources):
                continue
            if layer.site.weight.device.type != "meta":
                gaps.append((layer, adapter, entries))
        for layer, adapter, _ in gaps:  # all of them before one writes to its base weight
            if reads_base(adapter.cfg):
                what = f"load adapter {self.adapter_name}, which starts from the base weights"
                check_decodable(layer, what, "Load it before fully_shard.")
            if hasattr(type(adapter.method), "check_init"):
                try:
                    adapter.method.check_init(layer.site, adapter.cfg, {"r": adapter.setting("r")})
                except (TypeError, ValueError) as e:
                    raise type(e)(f"{adapter.key}: {e}") from e
        for layer, adapter, entries in gaps:
            for entry in entries:
                current = entry.tensor()
                if current.is_meta:
                    entry.replace(torch.empty_like(current, device=layer.site.weight.device))
            layer.initialise(adapter)

    def apply(self, model: nn.Module, assign: bool = False) -> None:
        """Copy the tensors in; tensors on the meta device are replaced."""
        to_shards(model)
        with torch.no_grad():
            for entry, tensor in self.found:
                current = entry.tensor() if entry.store is None and entry.is_kept else None
                if current is not None and (current.is_meta or assign):
                    device = torch.device("cpu") if entry.layer is None else entry.layer.site.weight.device
                    device = torch.device("cpu") if device.type == "meta" else device
                    entry.replace(tensor.to(device=device, dtype=current.dtype, copy=True))
                else:
                    entry.write(tensor)
            targets = dict(model.named_parameters(remove_duplicate=False)) if self.base else {}
            targets = {strip_wrappers(k): v for k, v in targets.items()}
            for key, tensor in self.base:
                copy_whole(targets[key], tensor)
        layers = [layer for layer in dict.fromkeys(entry.layer for entry, _ in self.found) if layer is not None]
        for layer in layers:
            layer.changed(self.adapter_name)
        if any(layer.merged and self.adapter_name in layer.merged_adapters for layer in layers):
            warn(
                f"Adapter {self.adapter_name} is merged, so its new weights have no effect until it is unmerged.",
                PeftWarning,
            )


def fit_state_dict(
    model: nn.Module, cfg: PeftConfig, tensors: Mapping[str, Tensor], adapter_name: str, finite: bool = True
) -> Fit:
    """Compare tensors, under file names, with what the adapter has in the model.

    Args:
        tensors: keys with or without the `base_model.model.` in front, as the model itself has it or not; those of the
            model's own state dict, with the adapter's name in them, too.
        finite: look for NaN and infinite values.
    """
    fit = Fit(adapter_name)
    entries = {entry.file: entry for entry in adapter_entries(model, adapter_name)}
    tensors = aligned(tensors, entries)
    tensors = migrate_experts(tensors, entries, cfg, base_of(model))
    known = set(entries)
    base: dict[str, Tensor] | None = None
    twice: dict[str, str] = {}
    places: dict[str, str] = {}  # base tensors may have been, or be here, inside layers of other adapters
    embeddings: dict[str, nn.Module] = {}
    merged: list[BaseTunerLayer] = []
    for key, tensor in tensors.items():
        entry = entries.pop(key, None)
        if entry is None:
            if base is None:
                twice = rows_said_twice(model, adapter_name)
                embeddings = embedding_modules(model)
                base = {strip_wrappers(k): v for k, v in model.named_parameters(remove_duplicate=False)}
                places = {without_places(k): k for k in base}
                merged = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and m.merged]
            if key.replace(".modules_to_save.", ".") in known:
                continue  # with bias="all" PEFT writes the biases of kept modules twice
            if key in twice and twice[key] in tensors and torch.equal(tensor, tensors[twice[key]]):
                continue
            if key not in base:
                key = places.get(without_places(key), key)
            here = base.get(key)
            if here is None or not _may_travel(key, embeddings):
                fit.unexpected.append(key)
                continue
            inside, before = _under(here, merged)
            if before is not None and before.shape == tensor.shape and torch.equal(before, tensor.to(before)):
                continue
            if inside:
                fit.fixed.append(f"{key} is another than here, where it has {', '.join(inside)} inside (unmerge first)")
                continue
        else:
            if entry.is_view:
                continue  # the factor is loaded under its own name
            here = entry.tensor()
        fit.compare(key, tensor, entry, here, finite)
        if whole_shape(here) != tensor.shape:
            fit.advice = fit.advice or _advice(key, tensor, whole_shape(here), model)
    fit.missing = list(entries)
    fit.unset += [entry.live for entry in entries.values()]
    biases = [key for key, _ in fit.base if not key.startswith(tuple(f"{name}." for name in embeddings))]
    if biases and getattr(cfg, "bias", "none") == "none":
        fit.doubts.append(f"The file has biases that its config (bias='none') does not mention: {every_name(biases)}.")
    if fit.unexpected:
        names = {strip_wrappers(name) for name, _ in model.named_modules()}
        fit.foreign = [key for key in fit.unexpected if _is_foreign(key, names)]
    return fit


def _under(here: nn.Parameter, merged: Iterable[BaseTunerLayer]) -> tuple[list[str], Tensor | None]:
    """The adapters inside a Parameter of the base, and what it is without them, if that was kept."""
    for layer in merged if not is_distributed(here) else ():
        if any(p is here for p in layer.merger.parameters()):
            before = layer.merger.originals().get(here)
            if before is None or not torch.equal(before.to(here), here):
                return layer.merged_adapters, before
    return [], None


def judge(fit: Fit, cfg: PeftConfig, base: nn.Module, metadata: Mapping[str, str], changes: Iterable[str]) -> None:
    """Add to a report what speaks against the adapter besides its tensors: it was trained on another base, its config
    was changed, it was made for another task.

    Args:
        base: the base model, with or without adapters in it. metadata: of the safetensors file.
        changes: `metadata.config_changes`.
    """
    if BASE_KEY in metadata:
        try:
            found = differences(metadata[BASE_KEY], base, fit.adapter_name)
        except ValueError as e:
            fit.doubts.append(f"The adapter's record of its base model cannot be read: {e}.")
        else:
            if found:
                fit.doubts.append(f"The adapter was trained on another base model: {'; '.join(found)}.")
    else:
        logging.getLogger("peftfast").info(
            "adapter %r, not checked: which base model it was trained on; its file does not say (PEFT writes no such "
            "record)",
            fit.adapter_name,
        )
    fit.doubts.extend(changes)
    bias = getattr(cfg, "bias", "none")
    if bias != "none" and not fit.base and any(_has_bias(entry.layer) for entry, _ in fit.found):
        fit.doubts.append(
            f"The config says bias={bias!r}, but the file has no biases; the base model's are used. (PEFT 0.7 to 0.20 "
            "did not save them with bias='lora_only'.)"
        )
    fit.doubts.extend(_task_doubts(cfg, base, metadata))


def _has_bias(layer: BaseTunerLayer | None) -> bool:
    return layer is not None and bias_of(layer.base_layer) is not None


def _task_doubts(cfg: PeftConfig, base: nn.Module, metadata: Mapping[str, str]) -> list[str]:
    """Whether the base model's class or the arguments of its forward say that it cannot serve the config's task."""
    if cfg.task_type is None:
        return []
    task = plain_name(cfg.task_type)
    kind = type(base).__name__
    head = next((t for suffix, t in _HEADS.items() if kind.endswith(suffix)), None)
    if head is not None:
        known = task in _HEADS.values() or task == "SEQ_2_SEQ_LM"
        return [f"The adapter is for task {task}, the model {kind} is for {head}."] if known and task != head else []
    try:
        taken = inspect.signature(base.forward).parameters
    except (TypeError, ValueError):
        return []
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return []
    # every task's forward hands its first argument on by one of these names; images and audio have their own
    if taken.keys() & {"input_ids", "inputs_embeds", getattr(base, "main_input_name", "input_ids")}:
        return []
    try:
        before = json.loads(metadata[CONFIG_KEY]).get("task_type")
    except (KeyError, ValueError, AttributeError):
        before = task
    was = "" if before == task else f" (it was {before} when the weights were saved)"
    return [
        f"The adapter is for task {task}{was}, but the model {kind} is for none (task_type=None): its forward takes "
        f"({', '.join(taken)}), and {task} needs input_ids."
    ]


#: End of a transformers class name -> the task its head is for, where that is certain.
_HEADS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether both are real numbers, or complex ones, or whole ones."""
    return one.is_floating_point() == other.is_floating_point() and one.is_complex() == other.is_complex()


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether all values are finite, also in `dtype`."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return is_finite(tensor, dtype if dtype.itemsize > 1 else None)


def _is_foreign(key: str, modules: set[str]) -> bool:
    """Whether an adapter's tensor is for a module that the model does not have."""
    found = SLOT.search(key)
    return found is not None and key[: found.start()] not in modules


def aligned(tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Keys as in this model's own file: with the prefix that the model has, without the adapter's name."""
    tensors = {strip_wrappers(k): v for k, v in tensors.items()}
    if any(entry.store is not None for entry in entries.values()):  # prompts: the base model is not wrapped
        return {k if k in entries or k.startswith("base_model.") else f"base_model.{k}": v for k, v in tensors.items()}
    wants = any(k.startswith(PREFIX) for k in entries)
    tensors = {PREFIX * wants + in_base(k): v for k, v in tensors.items()}
    by_live = {strip_wrappers(entry.live): entry.file for entry in entries.values()}
    return {k if by_live.get(k, k) in tensors else by_live[k]: v for k, v in tensors.items()}


def _advice(key: str, tensor: Tensor, here: torch.Size, model: nn.Module) -> str:
    """How to make the base model one of which this weight, a row a token or a label, has the shape of the file's."""
    if tensor.dim() != 2 or here[1:] != tensor.shape[1:]:
        return ""
    if any(key in (f"{name}.weight", f"{name}.base_layer.weight") for name in embedding_modules(model)):
        return f"; resize the base model first: model.resize_token_embeddings({len(tensor)})"
    if here[0] == getattr(getattr(model, "config", None), "num_labels", None):
        return f"; load the base model with as many labels: from_pretrained(..., num_labels={len(tensor)})"
    return ""


def _may_travel(key: str, embeddings: Iterable[str]) -> bool:
    """Whether a base tensor of this name can have been saved with an adapter: a trained bias, a resized embedding."""
    return is_bias(key) or any(key.startswith(f"{name}.") for name in embeddings)
