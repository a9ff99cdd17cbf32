"""A tiny model in NF4 without a checkpoint in between."""

from __future__ import annotations

import torch
from torch import nn


def quantise(model: nn.Module, storage: torch.dtype = torch.uint8) -> nn.Module:
    """Every linear layer but the head as bitsandbytes' Linear4bit, on the CPU."""
    from bitsandbytes.nn import Linear4bit
    from portable_bitsandbytes import evaluate_exactly

    evaluate_exactly()  # here, because worker processes come this way too
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.float32,
                quant_type="nf4", quant_storage=storage,
            )  # fmt: skip
            packed.load_state_dict(module.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, packed.to("cpu"))
    for _, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.quant_state is None:
            module.weight = module.weight._quantize("cpu")
    return model
