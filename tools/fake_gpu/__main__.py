"""Runs Python with a GPU that is not there: PyTorch's CUDA build goes all the way to the driver, where nothing happens.

    python tools/fake_gpu SCRIPT or -m MODULE [arguments]             kernels do nothing: host time, launches, memory
    python tools/fake_gpu --compute SCRIPT or -m MODULE [arguments]   results are right, and slow: do GPU paths work?
    python tools/fake_gpu --compiled SCRIPT or -m MODULE [arguments]  also by what Triton compiled: do its kernels?

``--chip sm_86`` makes it another chip than sm_90, in what Triton compiles and how much shared memory a kernel may use.

For instance

    python tools/fake_gpu bench/host_gpu_path.py --only linear
    python tools/fake_gpu bench/peak_memory.py
    python tools/fake_gpu --compute -m pytest tests/kernels
    python tools/fake_gpu --compute --everywhere -m pytest tests/lora     what names no device is there

Needs a CUDA build of PyTorch and gcc, on Linux; no GPU and no driver. What is real: Python, PyTorch's dispatcher,
autograd engine and caching allocator, Triton's compiler and launcher. What is not: CUDA's runtime and driver, and
cuBLAS (`runtime.c`, `driver.c`). So times of the host leave out what those take, and times of the device mean nothing.
With ``--compute`` torch's operations are computed on the host, in the same memory (`compute.py`), and Triton's kernels
by its interpreter; with ``--compiled`` these run as they were compiled and launched, PTX instruction by instruction
(`compiled.py`, `tools/ptx`; ``--eager`` and ``--traffic`` as of `tools/emulate.py`). cuDNN, its attention included, is
switched off. Replays of CUDA graphs do nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Libraries of PyTorch that call CUDA.
CALLERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
#: What the real runtime answers without a device.
LEFT_ALONE = {"cudaGetErrorString", "cudaGetErrorName", "cudaRuntimeGetVersion"}


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"fake_gpu: {package} is not installed")
    return Path(spec.submodule_search_locations[0])


def _symbols_asked_for(libraries: Path) -> set[str]:
    """Names in CUDA's runtime and cuBLAS that PyTorch's libraries are linked against."""
    found: set[str] = set()
    for name in CALLERS:
        if not (libraries / name).exists():
            raise SystemExit(f"fake_gpu: {libraries} has no {name}; this PyTorch is not a CUDA build")
        listed = subprocess.run(["objdump", "-T", libraries / name], check=True, capture_output=True, text=True).stdout
        found |= {line.split()[-1] for line in listed.splitlines() if "libcudart" in line or "libcublas" in line}
    return found


def _defined_in(source: str) -> set[str]:
    return set(re.findall(r"^\w[\w \*]*?\b\**((?:__)?cu\w+)\(", source, re.MULTILINE))


def _answers(names: set[str]) -> str:
    return "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(names))


def _as_chip(chip: str | None) -> list[str]:
    """Definitions for the compiler that make the GPU this chip."""
    if chip is None:
        return []
    sys.path.insert(0, str(HERE.parent.parent / "kernels"))
    from peftfast_kernels.configs import SHARED_MEMORY

    known = [name for name in SHARED_MEMORY if name.startswith("sm_")]
    if chip not in known:
        raise SystemExit(f"fake_gpu: --chip {chip!r}: one of {', '.join(known)}")
    major, minor = divmod(int(chip[3:]), 10)
    return [f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DSHARED={SHARED_MEMORY[chip]}"]


def build(chip: str | None = None) -> Path:
    """The folder of the two libraries, built once for each chip and each state of their sources and of PyTorch."""
    defined = _as_chip(chip)
    libraries = _folder_of("torch") / "lib"
    asked = _symbols_asked_for(libraries)
    headers = next(_folder_of("nvidia").glob("*/include/cuda_runtime_api.h")).parent  # of the CUDA that torch brings
    compilers = _folder_of("triton") / "backends" / "nvidia" / "include"  # what those include, from nvcc's package
    runtime, driver = (HERE / name for name in ("runtime.c", "driver.c"))
    declared = set(re.findall(r"CUDAAPI\s+(cu\w+)\s*\(", (headers / "cuda.h").read_text()))
    declared |= {name + version for name in declared for version in ("_v2", "_v3", "_v4")}
    sources = {
        "runtime.c": runtime.read_text(),
        "runtime_answers.c": _answers(asked - LEFT_ALONE - _defined_in(runtime.read_text())),
        "driver.c": driver.read_text() + _answers(declared - _defined_in(driver.read_text())),
    }
    digest = hashlib.sha256("".join([*defined, *sources.values()]).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"fake-gpu-{digest}"
    if not (folder / "libcuda.so.1").exists():
        folder.mkdir(exist_ok=True)
        for name, text in sources.items():
            (folder / name).write_text(text)
        gcc = ["gcc", "-O2", "-shared", "-fPIC", "-w", *defined]
        made = ["runtime.c", "runtime_answers.c", f"-I{headers}", f"-I{compilers}", "-o", "libruntime.so"]
        subprocess.run([*gcc, *made], cwd=folder, check=True)
        subprocess.run([*gcc, "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"], cwd=folder, check=True)
    return folder


def main(argv: list[str]) -> None:
    options, chip = [], None
    while argv and argv[0] in ("--compute", "--compiled", "--eager", "--traffic", "--everywhere", "--chip"):
        option = argv.pop(0)
        if option == "--chip":
            chip = argv.pop(0) if argv else ""
        else:
            options.append(option)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if not sys.platform.startswith("linux"):
        raise SystemExit("fake_gpu: LD_PRELOAD, which this needs, is Linux's")
    folder = build(chip)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(folder / "libruntime.so"),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),  # what is compiled here links against a driver that does nothing
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "site"), os.environ.get("PYTHONPATH")])),
        "FAKE_GPU": " ".join(["on", *options]),
    }
    if "--compiled" in options:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor has a block of its own, with an end
    elif "--compute" in options:
        environment["TRITON_INTERPRET"] = "1"
    os.execve(sys.executable, [sys.executable, *argv], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
