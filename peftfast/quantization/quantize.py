"""Quantising a dense model in place, and what belongs to a quantised base: dense copies, errors, LoftQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.adapter import Adapter
from peftfast.base.dense import is_conv1d
from peftfast.base.weight import BaseWeight, Quantizer, base_weight, comes_from, quantizer
from peftfast.embeddings import SEQ_CLS_HEAD_NAMES, output_embeddings
from peftfast.errors import close_matches, enumerate_some
from peftfast.keys import ends_of
from peftfast.layers.layer import BaseTunerLayer
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import base_of, outer_modules
from peftfast.methods.lora.loftq import best_factors, loftq_factors
from peftfast.methods.lora.lora import factors
from peftfast.quantization.originals import Originals
from peftfast.rules import integer, optional, torch_dtype
from peftfast.sites.linear import is_quantised, linear_with
from peftfast.sites.site import is_untouched
from peftfast.wrapping.inventory import Inventory
from peftfast.wrapping.listing import Listing
from peftfast.wrapping.parents import needs_dense
from peftfast.wrapping.targets import name_ends


class QuantizationReport(dict[str, float]):
    """Module name -> relative error |stored - W| / |W| (Frobenius); prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{name:<{width}}  {error:8.4%}" for name, error in self.items()]
        if self:
            lines.append(f"{f'mean of {len(self)}':<{width}}  {sum(self.values()) / len(self):8.4%}")
        return "\n".join(lines)


# ---- dense to quantised ----------------------------------------------------------------------------------------------
def quantize_model(
    model: nn.Module, quantize: str = "nf4", *, skip: Iterable[str] | None = None, **options: Any
) -> QuantizationReport:
    """Replace the linear layers of a dense model by quantised ones, in place and on the device where they are.

    The result is what transformers' `from_pretrained(quantization_config=BitsAndBytesConfig(...))` gives, and is saved
    and reloaded by transformers as such.

    Args:
        model: a base model, or a model with adapters, whose base layers are then quantised.
        quantize: "nf4", "fp4" or "int8".
        skip: names or suffixes of names of modules to leave dense. None: the output head, classification heads,
            whatever shares its weight with another module, what transformers keeps in fp32 (T5's `wo`), and layers
            of which other modules read the weight, or its dtype to cast to.
        options: of 4 bits: `compute_dtype` (None: the model's), `double_quant`, `blocksize`, `quant_storage`; of
            int8: `threshold` for outlier columns.

    Returns:
        The relative error of every weight; also kept as `model.quantization_report`.

    Raises:
        ImportError: bitsandbytes is missing. ValueError: unknown format, nothing to quantise, a name in `skip` that
            matches nothing, values that an option cannot have, layers that hooks have taken over. TypeError: unknown
            options, or values of another type. Nothing was changed.
    """
    plan = plan_quantization(model, quantize, skip, options)
    report, listing = QuantizationReport(), Listing(plan.base)
    plan.places.reverse()
    while plan.places:  # a dense layer's memory is free before the next one is packed
        name, layer, module = plan.places.pop()
        weight = base_weight(module).dense()
        new = plan.kind.module(weight, module.bias, **plan.options)
        new.train(module.training)
        new.source_cls = type(module)  # as transformers says it, for the way back
        report[name] = _relative_error(base_weight(new).dense(torch.float32), weight.float())
        _put(listing, name, layer, new)
    _mark_quantised(plan.base, plan.kind.config(**plan.options), plan.skipped)
    plan.base.quantization_report = report
    return report


class QuantizationPlan(NamedTuple):
    """What `quantize_model` will do; made without changing anything."""

    base: nn.Module
    kind: Quantizer
    options: dict[str, Any]
    places: list[tuple[str, BaseTunerLayer | None, nn.Module]]
    skipped: set[str]


def plan_quantization(
    model: nn.Module, quantize: str, skip: Iterable[str] | None, options: Mapping[str, Any]
) -> QuantizationPlan:
    """Check everything that `quantize_model` refuses; arguments and errors as there."""
    kind, base = quantizer(quantize), _inner(model)
    for name in options:
        if name not in kind.options:
            raise TypeError(
                f"quantize={quantize!r} has no option {name!r}.{close_matches(name, kind.options)} "
                f"Its options are {', '.join(kind.options)}"
            )
    options = {name: kind.options[name].enforce(value, name) for name, value in options.items() if value is not None}
    if "compute_dtype" in kind.options and isinstance(getattr(base, "dtype", None), torch.dtype):
        options.setdefault("compute_dtype", base.dtype)
    kind.module(torch.ones(2, 64), None, **options)  # values are refused here, not at the first layer
    places = list(_dense_linears(base))
    skipped = _skipped(base, places, skip)
    places = [place for place in places if place[0] not in skipped]
    if not places:
        raise ValueError(
            f"{type(base).__name__} has no dense linear layer left to quantise (skipped: {sorted(skipped)})"
        )
    _check_held(base, places, "quantised")
    busy = [name for name, _, module in places if not is_untouched(module)]
    if busy:
        raise ValueError(
            f"These layers have hooks or are offloaded and cannot be replaced: {enumerate_some(busy)}. Quantise before "
            "dispatching the model, or name them in `skip`."
        )
    _check_not_merged((name, layer) for name, layer, _ in places)
    return QuantizationPlan(base, kind, options, places, skipped)


def _check_not_merged(layers: Iterable[tuple[str, BaseTunerLayer | None]]) -> None:
    merged = [name for name, layer in layers if layer is not None and layer.merged]
    if merged:
        raise ValueError(f"Adapters are merged into {enumerate_some(merged)}; unmerge first")


def _inner(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel or a tuner; others as they are. TypeError for what is no module."""
    model = base_of(model)
    inventory = getattr(model, "inventory", None)  # which a tuner has, and reads names from its base model otherwise
    return inventory.model if isinstance(inventory, Inventory) else model


def _relative_error(held: Tensor, weight: Tensor) -> float:
    """|held - W| / |W|, 0 where a W of zeros is held as such."""
    return float((held - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _base_modules(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer | None, nn.Module]]:
    """(name without wrappers, the adapter layer around it or None, the module) of all modules of the base model."""
    for name, module in outer_modules(model, lambda m: isinstance(m, (BaseTunerLayer, StandIn))):
        if isinstance(module, BaseTunerLayer):
            if module.site.adapts_output:  # a Parameter that is adapted by itself stays what it is
                yield name, module, module.get_base_layer()
        elif not isinstance(module, StandIn):  # modules trained in full stay dense
            yield name, None, module


def _dense_linears(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer | None, nn.Module]]:
    for name, layer, module in _base_modules(model):
        if type(module) is nn.Linear or is_conv1d(module):
            yield name, layer, module


def _skipped(model: nn.Module, places: list[tuple[str, Any, nn.Module]], skip: Iterable[str] | None) -> set[str]:
    names = {name for name, _, _ in places}
    if skip is not None:
        if isinstance(skip, str):
            raise TypeError(f"skip must be a list of names, got the string {skip!r}")
        chosen = set()
        for wanted in skip:
            found = {n for n in names if wanted in ends_of(n)}
            if not found:
                known = names if "." in wanted else name_ends(names)
                raise ValueError(f"skip: no linear layer is named {wanted!r}.{close_matches(wanted, known)}")
            chosen |= found
        return chosen
    head = output_embeddings(model)
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    owners: dict[int, int] = {}
    for _, _, module in _base_modules(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {
        name
        for name, _, module in places
        if module is head
        or owners[id(module.weight)] > 1
        or name in (*SEQ_CLS_HEAD_NAMES, "qa_outputs", "lm_head")
        or any(f".{part}." in f".{name}." for part in kept)
        or needs_dense(model, name)
    }


def _put(listing: Listing, name: str, layer: BaseTunerLayer | None, module: nn.Module) -> None:
    if layer is not None:
        layer.base_layer = module
    else:
        listing.replace(name, module)


def _check_held(base: nn.Module, places: Iterable[tuple[str, Any, nn.Module]], made: str) -> None:
    if any(module is base for _, _, module in places):
        raise ValueError(
            f"The model is itself a linear layer ({type(base).__name__}), and nothing holds it that could be given the "
            f"{made} one: put it into a module"
        )


def _mark_quantised(model: nn.Module, config: Mapping[str, Any], skipped: Iterable[str]) -> None:
    """Tell transformers and the trainers what the model is now."""
    if not comes_from(type(model), "transformers", "PreTrainedModel"):
        setattr(model, "is_loaded_in_4bit" if config.get("load_in_4bit") else "is_loaded_in_8bit", True)
        return  # only the flag that others ask for
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    settings = BitsAndBytesConfig(**config, llm_int8_skip_modules=sorted(skipped) or None)
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, settings.quant_method
    model.hf_quantizer.postprocess_model(model)


def name_dense_layers(model: nn.Module) -> None:
    """Tell transformers which linear layers of a quantised model are dense by now, so that it loads what it saves."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if not hasattr(settings, "llm_int8_skip_modules"):
        return
    places = list(_dense_linears(model))
    known = set(settings.llm_int8_skip_modules or _skipped(model, places, None))
    if {name for name, _, _ in places} - known:
        settings.llm_int8_skip_modules = sorted({*known, *(name for name, _, _ in places)})


# ---- quantised to dense ----------------------------------------------------------------------------------------------
def dequantize_model(
    model: nn.Module,
    originals: str | Path | Mapping[str, Tensor] | nn.Module | None = None,
    dtype: torch.dtype | str | None = None,
) -> list[str]:
    """Replace the quantised linear layers of a model by dense ones, in place; adapters stay where they are.

    Args:
        originals: take weights from here (a folder with safetensors, tensors by name, or a model) instead of
            dequantising; they are not what the adapters were trained against.
        dtype: of the dense weights; None: the model's, else the one the layer computed in.

    Returns:
        Names of the replaced modules.

    Raises:
        ValueError: nothing is quantised, adapters are merged, or original weights of other shapes. FileNotFoundError,
            KeyError: original weights that are not there. TypeError: an argument of another kind. Nothing was changed.
    """
    with dequantized(model, originals, dtype) as names:
        return names


@contextmanager
@torch.no_grad()
def dequantized(model: nn.Module, originals: Any = None, dtype: torch.dtype | str | None = None) -> Iterator[list[str]]:
    """`dequantize_model`, undone if it or the block raises."""
    dtype = optional(torch_dtype(floating=True)).enforce(dtype, "dtype")
    base = _inner(model)
    places = [(n, layer, m) for n, layer, m in _base_modules(base) if is_quantised(m)]
    if not places:
        raise ValueError(f"{type(base).__name__} has no quantised linear layers")
    _check_held(base, places, "dense")
    _check_not_merged((name, layer) for name, layer, _ in places)
    unknown = [name for name, _, module in places if not base_weight(module).known]
    if unknown and originals is None:
        raise ValueError(
            f"The weights of {enumerate_some(unknown)} are in a format that only their modules read; pass `originals`, "
            "the weights before quantisation"
        )
    source = None if originals is None else _originals(base, originals, [(n, base_weight(m)) for n, _, m in places])
    listing, begun = Listing(base), []
    try:
        for name, layer, module in places:
            stored = base_weight(module)
            kept = dtype or _dense_dtype(base, stored)
            weight = stored.dense(kept) if source is None else source.weight(name, module).to(stored.device, kept)
            begun.append((name, layer, module))
            _put(listing, name, layer, linear_with(weight, module))
        yield [name for name, _, _ in places]
    except BaseException:
        for place in begun:
            _put(listing, *place)
        raise
    if not any(is_quantised(module) for _, _, module in _base_modules(base)):
        _unmark_quantised(base)


def _originals(model: nn.Module, source: Any, places: Iterable[tuple[str, BaseWeight]]) -> Originals:
    """What has a weight of the right shape for all of these modules."""
    found = Originals(source, getattr(model, "base_model_prefix", ""))
    for name, stored in places:
        shape = tuple(found.weight(name, stored.module).shape)
        if shape != stored.shape:
            raise ValueError(f"{name}: the original weight has shape {list(shape)}, the module {list(stored.shape)}")
    return found


def _dense_dtype(model: nn.Module, stored: BaseWeight) -> torch.dtype:
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) and own.is_floating_point else stored.compute_dtype


def _unmark_quantised(model: nn.Module) -> None:
    marks = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")
    for name in (*marks, "quantization_report"):
        model.__dict__.pop(name, None)
    config = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            module.config._is_quantized = False


# ---- LoftQ -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | Mapping[str, Tensor] | nn.Module | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
    *,
    iterations: int = 0,
) -> dict[str, tuple[float, float]]:
    """Set the factors of a LoRA on a quantised base to the best approximation of what quantising lost (Li et al., arXiv
    2310.08659), from the weights before quantisation.

    Args:
        peft_model: a model with LoRA layers on quantised weights.
        model_path: the original weights: a folder with safetensors, tensors by name, or a model; None: the folder that
            the model was loaded from.
        callback: called after each module with (model, name); False puts the module's factors back.
        iterations: also requantise the base, in turn with the factors, this many times; 0 leaves the base alone.

    Returns:
        By module name, the relative error |Q + s B A - W| / |W| before and after.

    Raises:
        ValueError: no such layers, merged adapters, no path, or original weights of other shapes. FileNotFoundError,
            KeyError: original weights that are not there. Nothing was changed.
    """
    base = _inner(peft_model)
    iterations = integer(0).enforce(iterations, "iterations")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is a function of the model and a module's name, got {callback!r}")
    places = [
        (name, layer)
        for name, layer, module in _base_modules(base)
        if layer is not None and adapter_name in layer.adapters and is_quantised(module)
    ]
    if not places:
        raise ValueError(f"No LoRA layer with adapter {adapter_name!r} on a quantised weight found on the model")
    for name, layer in places:
        adapter = layer.adapters[adapter_name]
        for slot, whole in layer.site.low_rank_slots(adapter.setting("r")).items():
            if tuple(adapter[slot].shape) != whole.shape:
                raise ValueError(
                    f"{name}: LoftQ makes factors such as {slot} {list(whole.shape)}, this adapter keeps "
                    f"{list(adapter[slot].shape)}"
                )
    _check_not_merged(places)
    weights = [(name, layer.site.weight) for name, layer in places]
    source = _originals(base, _folder(base) if model_path is None else model_path, weights)
    errors = {}
    for name, layer in places:
        adapter, stored = layer.adapters[adapter_name], layer.site.weight
        weight = source.weight(name, stored.module).to(stored.device, torch.float32)
        a, b = factors(adapter)
        snapshot = stored.snapshot() if iterations and callback else None
        before = (_loss(layer, adapter, weight), a.clone(), b.clone())
        rank = adapter.setting("r")
        if iterations:

            def store(target: Tensor, stored: BaseWeight = stored) -> Tensor:
                stored.assign(target)
                return stored.dense(torch.float32)

            new_a, new_b = loftq_factors(weight, rank, adapter.scale, iterations, store)
        else:
            new_a, new_b = best_factors(weight - stored.dense(torch.float32), rank, adapter.scale)
        a.copy_(new_a)
        b.copy_(new_b)
        errors[name] = (before[0], _loss(layer, adapter, weight))
        if callback is not None and not callback(peft_model, name):
            a.copy_(before[1])
            b.copy_(before[2])
            if snapshot is not None:
                stored.restore(snapshot)
            errors[name] = (before[0], before[0])
    return errors


def _loss(layer: BaseTunerLayer, adapter: Adapter, weight: Tensor) -> float:
    a, b = (f.float() for f in factors(adapter))
    held = layer.site.with_delta(layer.site.weight.dense(torch.float32), a, b, float(adapter.scale))
    return _relative_error(held, weight)


def _folder(model: nn.Module) -> Path:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError("The model does not say where it was loaded from; pass model_path, the original weights")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
