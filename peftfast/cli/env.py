"""print versions and devices, to paste into a bug report"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

from peftfast.version import __version__

PACKAGES = (
    "triton",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "numpy",
    "peft",
    "accelerate",
    "bitsandbytes",
    "trl",
    "datasets",
    "diffusers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> list[tuple[str, str]]:
    """(what, value), in the order of printing."""
    import torch

    rows = [
        ("peftfast", __version__),
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("torch", torch.__version__),  # with the build, which the distribution's own version may leave out
        *((package, version_of(package)) for package in PACKAGES),
        ("CPU", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        ("torch threads", str(torch.get_num_threads())),
        ("CUDA built for", str(torch.version.cuda or "no CUDA")),
        ("ROCm built for", str(torch.version.hip or "no ROCm")),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"GPU {index}",
                f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}",
            )
        )
    for index in range(torch.xpu.device_count()):
        gpu = torch.xpu.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, fp64: {gpu.has_fp64}"))
    if not torch.cuda.device_count() + torch.xpu.device_count():
        rows.append(("GPU", "Apple MPS" if torch.backends.mps.is_available() else "none found"))
    rows += sorted((k, v) for k, v in os.environ.items() if k.startswith(("PEFTFAST_", "TRITON_INTERPRET")))
    return rows


def run(args: argparse.Namespace) -> int:
    rows = facts()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0
