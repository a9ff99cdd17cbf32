"""Which base model an adapter was trained on: facts of its architecture and a sample of its weights, a few kilobytes in
the metadata of the adapter's file.

The sample is the same whether adapters are attached, switched or merged, and it leaves out weights that an
initialisation (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) has changed. Numbers are compared, not hashes, so a base stored in
bf16, int8 or 4 bits still counts as the one in fp32; what that storage cannot tell apart, the comparison cannot either.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfast.base.dense import was_conv1d
from peftfast.base.weight import base_weight
from peftfast.files.renamed import current_names, module_at
from peftfast.keys import strip_wrappers
from peftfast.layers.layer import BaseTunerLayer, without_adapters
from peftfast.layers.stand_in import StandIn
from peftfast.layers.walk import outer_modules
from peftfast.method import rewrites
from peftfast.prompts.prompt import PromptEncoders

#: Key of the metadata.
METADATA_KEY = "peftfast.base"

WEIGHTS = 10  # how many weights are sampled
VALUES = 16  # of each
ROWS = 64  # from its first rows, which resizing a vocabulary keeps
LARGEST_DECODED = 1 << 24  # quantised weights above this many elements are not decoded for a sample

#: Fields of a transformers config that change what the layers compute; everything else is storage or convenience.
FACTS = (
    "model_type",
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "n_embd", "n_inner", "n_layer", "n_head", "d_model", "d_ff", "d_kv", "num_layers", "num_heads",
    "num_decoder_layers",
    "hidden_act", "hidden_activation", "activation_function", "feed_forward_proj",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta",
    "num_experts", "num_local_experts", "num_experts_per_tok",
)  # fmt: skip

#: Largest relative distance between two samples of the same weight, by storage.
QUANTISED = {"int8": 0.15, "nf4": 0.5, "fp4": 0.6, "fp8": 0.2, "torchao": 0.5, "hqq": 0.6}
_STEP = {torch.float64: 2.0**-24, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Sample(NamedTuple):
    """A few values of one weight.

    Attributes:
        shape: of the weight, as it lies where it is not packed. storage: a dtype or the name of a quantised format.
    """

    shape: list[int]
    storage: str
    values: list[float]


def fingerprint(model: nn.Module) -> str:
    """What `differences` compares, as JSON. Empty where weights are not at hand (meta device, sharded)."""
    weights = dict(_weights(model))
    chosen = _spread(sorted(weights))
    samples = {name: sample for name in chosen if (sample := _sample(weights[name])) is not None}
    if not samples:
        return ""
    packed = {
        name: [s.shape, s.storage, struct.pack(f">{len(s.values)}f", *s.values).hex()] for name, s in samples.items()
    }
    return json.dumps({"version": 1, "facts": _facts(model), "weights": packed}, separators=(",", ":"))


def differences(saved: str, model: nn.Module, adapter_name: str) -> list[str]:
    """In what the base model differs from the one with the fingerprint `saved`; each a readable phrase.

    Args:
        adapter_name: whose file says so. Modules of which it has copies of its own may be anything in the base.

    Raises:
        ValueError: `saved` is not a fingerprint.
    """
    facts, samples = _read(saved)
    if facts is None:
        return []
    found = []
    here = _facts(model)
    for name, value in facts.items():
        if name in here and here[name] != value:
            found.append(f"{name} was {value!r} and is {here[name]!r}")
    samples = {strip_wrappers(name): sample for name, sample in samples.items()}
    names = current_names(model, samples)
    for name, sample in samples.items():
        module = module_at(model, names.get(name, name))
        if isinstance(module, StandIn) and module.replaces(adapter_name):
            continue
        if module is None or not _has_weight(module):
            found.append(f"there is no {name!r} here")
            continue
        own = _sample(module)
        if own is None:
            continue
        if own.shape[1:] != sample.shape[1:] or (len(own.shape) == 1 and own.shape != sample.shape):
            found.append(f"{name!r} was {sample.shape} and is {own.shape}")
        elif not _same(sample, own):
            found.append(f"the weights of {name!r} are others")
    return found


def _read(saved: str) -> tuple[dict[str, Any] | None, dict[str, Sample]]:
    try:
        data = json.loads(saved)
        if data["version"] != 1:
            return None, {}
        samples = {
            name: Sample(list(shape), storage, list(struct.unpack(f">{len(text) // 8}f", bytes.fromhex(text))))
            for name, (shape, storage, text) in data["weights"].items()
        }
        return dict(data["facts"]), samples
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as e:
        raise ValueError(f"not a fingerprint of a base model: {e}") from e


def _facts(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None:
        return {}
    data = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    inner = data.get("text_config")
    data = {**data, **inner} if isinstance(inner, Mapping) else data
    return {k: data[k] for k in FACTS if isinstance(data.get(k), (int, float, str))}


def _spread(names: list[str]) -> list[str]:
    """At most WEIGHTS of the names, from the first to the last at equal distances."""
    if len(names) <= WEIGHTS:
        return names
    return [names[i * (len(names) - 1) // (WEIGHTS - 1)] for i in range(WEIGHTS)]


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What stands where the base has a module with a weight, by that module's name without adapters."""
    # layers first: whatever else they are asked for, PEFT's class is found for them as well (interop/counterpart.py)
    for name, module in outer_modules(model, lambda m: isinstance(m, (BaseTunerLayer, StandIn, PromptEncoders))):
        if _has_weight(module):
            yield strip_wrappers(name), module


def _has_weight(module: nn.Module) -> bool:
    return isinstance(without_adapters(module)._parameters.get("weight"), Tensor)


def _sample(module: nn.Module) -> Sample | None:
    """Of the weight of a module of the base, or of the one in what stands there."""
    layer = module if isinstance(module, BaseTunerLayer) else None
    module = without_adapters(module)
    weight = module._parameters["weight"]
    if layer is not None and any(rewrites(a.method, a.cfg) for a in layer.adapters.values()):
        return None
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "full_tensor"):
        return None
    try:
        held = base_weight(module) if weight.dim() > 1 else None
    except (TypeError, ValueError):  # nobody knows what its weight means
        return None
    merged = layer is not None and layer.merged
    if held is not None and held.quantization is not None:
        if merged or not held.known or held.shape[0] * held.shape[1] > LARGEST_DECODED:
            return None
        kind, matrix = held.quantization, held.dense(torch.float32)
        matrix = matrix.t() if was_conv1d(module) else matrix  # as it lies where it is not packed
    else:
        stored = weight.detach()
        if merged:
            stored = layer.merger.originals().get(weight)
        if not isinstance(stored, Tensor) or stored.shape != weight.shape:
            return None
        kind, matrix = str(stored.dtype).removeprefix("torch."), stored
    shape, matrix = list(matrix.shape), matrix[:ROWS].reshape(-1)
    places = torch.arange(VALUES, device=matrix.device) * (matrix.numel() - 1) // max(VALUES - 1, 1)
    return Sample(shape, kind, matrix[places].float().tolist())


def _same(a: Sample, b: Sample) -> bool:
    if a.values == b.values:  # as they are where nothing was done to the base
        return True
    limits = [QUANTISED[s.storage] for s in (a, b) if s.storage in QUANTISED]
    x, y = (torch.tensor(s.values, dtype=torch.float64, device="cpu") for s in (a, b))  # whatever the default is
    if x.shape != y.shape:
        return False
    if limits:
        return bool((x - y).norm() <= max(limits) * torch.maximum(x.norm(), y.norm()))
    step = max(_STEP.get(getattr(torch, s.storage, None), 2.0**-3) for s in (a, b))
    return bool(((x - y).abs() <= 2 * step * torch.maximum(x.abs(), y.abs()) + 2.0**-24).all())
