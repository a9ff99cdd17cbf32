"""A GPU that is not there: Triton launches on CPU tensors go the whole way of a launch, except that nothing runs.

What is real: the launchers, `JITFunction.run`, Triton's compiler (unless left out), its launcher in C and what that one
asks of the driver's library. What is not: that library, which is built from a few lines of C that say yes to
everything; the device; and the result, which is whatever memory held. For measuring the host's time
(`bench/host_gpu_path.py`) and for comparing launches (`tests/kernels/test_launch.py`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CAPABILITY = 90
CHIP = f"sm_{CAPABILITY}"

#: The driver of `tools/fake_gpu`, and what else Triton's launcher asks for.
_DRIVER = Path(__file__).resolve().parent.parent / "tools" / "fake_gpu" / "driver.c"
_YES = (
    "cuInit cuCtxSetCurrent cuCtxSetLimit cuCtxGetLimit cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig "
    "cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled cuTensorMapEncodeIm2col"
).split()


@functools.cache
def _library() -> Path:
    """The folder of a libcuda.so.1 that does nothing, loaded into this process."""
    source = _DRIVER.read_text() + "".join(f"int {name}() {{ return 0; }}\n" for name in _YES)
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"peftfast-stub-cuda-{digest}"
    if not (folder / "libcuda.so.1").exists():
        work = Path(tempfile.mkdtemp())
        (work / "stub.c").write_text(source)
        options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", *options, "stub.c", "-o", "libcuda.so.1"], cwd=work, check=True)
        folder.mkdir(exist_ok=True)
        (work / "libcuda.so.1").replace(folder / "libcuda.so.1")
        shutil.rmtree(work)
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    return folder


class Utils:
    """What a driver is asked for while a kernel is loaded, where Triton's own is not built."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        return 0, 16, 0, 0, 1024

    def unload_module(self, module: int) -> None: ...


class Driver:
    """Stands where Triton's driver does.

    Args:
        launcher: what Triton is to launch with, a class like `CudaLauncher`; None: its own, built from its own C.
    """

    def __init__(self, launcher: Callable[..., Any] | None = None) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", CAPABILITY, 32)
        self.device, self.stream = -1, 0  # -1 is what CPU tensors call their device
        self.launcher_cls, self.utils = launcher, Utils()

    def use_launcher_in_c(self) -> None:
        """Needs gcc, and this driver to be the active one."""
        from triton import knobs
        from triton.backends.nvidia import driver

        knobs.nvidia.libcuda_path = str(_library())
        driver.libcuda_dirs.cache_clear()
        driver.library_dirs.cache_clear()
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def active(launcher: Callable[..., Any] | None = None) -> Iterator[Driver]:
    """A stub driver is Triton's; what makes CPU tensors go to it is `pretended`."""
    from triton.runtime.driver import driver

    before = driver._active
    made = Driver(launcher)
    driver.set_active(made)
    try:
        if launcher is None:
            made.use_launcher_in_c()
        yield made
    finally:
        driver._active = before


@contextmanager
def pretended() -> Iterator[None]:
    """CPU tensors take the path of a GPU's: they say that they are on one, and the chip is `CHIP`."""
    from peftfast_kernels import OPS, op

    for made in OPS.values():
        made.launch  # noqa: B018 all modules are there before names in them are replaced
    gpu = torch.device("cuda", 0)
    chip_of = functools.cache(lambda device: CHIP)
    undo: list[tuple[Any, str, Any]] = []

    def put(holder: Any, name: str, value: Any) -> None:
        undo.append((holder, name, vars(holder).get(name)))
        (object.__setattr__ if isinstance(holder, op.Op) else setattr)(holder, name, value)

    for name, module in list(sys.modules.items()):
        if name.startswith("peftfast_kernels") and hasattr(module, "chip_of"):
            put(module, "chip_of", chip_of)
    for made in OPS.values():
        put(made, "device_of", lambda *args, **kwargs: gpu)
    put(op, "has_triton_gpu", lambda device: True)
    put(torch.Tensor, "is_cpu", property(lambda tensor: False))
    put(torch.Tensor, "is_cuda", property(lambda tensor: True))
    try:
        yield
    finally:
        for holder, name, value in reversed(undo):
            if value is None:
                delattr(holder, name)
            else:
                (object.__setattr__ if isinstance(holder, op.Op) else setattr)(holder, name, value)
