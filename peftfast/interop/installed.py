"""Which libraries are installed, by the names under which `peft.import_utils` says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

from packaging import version


def _says(package: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return importlib.util.find_spec(package) is not None

    return is_available


is_aqlm_available = _says("aqlm")
is_bnb_available = _says("bitsandbytes")
is_bnb_4bit_available = is_bnb_available  # no release without is left that a torch of today goes with
is_diffusers_available = _says("diffusers")
is_eetq_available = _says("eetq")
is_gptqmodel_available = _says("gptqmodel")
is_hqq_available = _says("hqq")
is_inc_available = _says("neural_compressor")
is_optimum_available = _says("optimum")
is_te_available = _says("transformer_engine")
is_torchao_available = _says("torchao")


def is_te_pytorch_available() -> bool:
    return is_te_available() and importlib.util.find_spec("transformer_engine.pytorch") is not None


def is_torchao_ge_v0_18_0() -> bool:
    if not is_torchao_available():
        return False
    return version.parse(importlib.metadata.version("torchao")) >= version.parse("0.18.0")


def is_torch_tpu_available(check_device: bool = True) -> bool:
    if importlib.util.find_spec("torch_xla") is None:
        return False
    if check_device:
        import torch_xla.core.xla_model

        try:
            torch_xla.core.xla_model.xla_device()
        except RuntimeError:
            return False
    return True


def is_xpu_available(check_device: bool = False) -> bool:
    import torch

    return torch.xpu.is_available()
