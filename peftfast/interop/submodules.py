"""Helpers that other libraries import from `peft.utils`."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, attribute name) of the module `key` in `model`."""
    parent_name, _, attribute = key.rpartition(".")
    return model.get_submodule(parent_name), model.get_submodule(key), attribute


def infer_device() -> str:
    """The type of accelerator that torch finds, "cpu" if it finds none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def is_bnb_available() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
