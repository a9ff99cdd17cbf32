"""How transformers' own `model.load_adapter` turns the keys of an adapter file into names of the model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

import peftfast.methods  # noqa: F401  (registers every method)
from peftfast.method import METHODS

#: peft_type -> how the names of its parameters begin
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, str] = {method.peft_type: method.prefix for method in METHODS}


def build_peft_weight_mapping(weight_conversions: list | None, adapter_name: str, peft_config: Any = None) -> list:
    """transformers' list of renamings for loading an adapter called `adapter_name`.

    Args:
        weight_conversions: the base model's own. Its renamings hold for an adapter's keys too; its conversions of whole
            weights (fusing experts) do not, for an adapter file has no such weight.
        peft_config: whose `peft_type` chooses the prefix of the parameters.
    """
    from transformers.core_model_loading import WeightRenaming

    peft_type = getattr(peft_config, "peft_type", None)
    known = PEFT_TYPE_TO_PREFIX_MAPPING
    prefixes = [known[peft_type]] if peft_type in known else sorted(set(known.values()))
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        *(WeightRenaming(rf"({re.escape(p)}[^\.]*)", rf"\1.{adapter_name}") for p in prefixes),
        *(conversion for conversion in weight_conversions or () if isinstance(conversion, WeightRenaming)),
    ]


def refuse_tensor_parallel(model: nn.Module, state_dict: dict[str, Any], adapter_name: str) -> None:
    """`_maybe_shard_state_dict_for_tp`, which `load_adapter` of some releases of transformers (5.8 and 5.15 among them)
    calls for every model: nothing, where no layer with adapters is spread over devices.

    Raises:
        NotImplementedError: one is.
    """
    for name, module in model.named_modules():
        if name.endswith(".base_layer") and getattr(module, "_hf_tp_plan", None) is not None:
            raise NotImplementedError(f"{name} is spread over devices: adapters are not loaded into such a model here")
