"""Triton's kernels as they were compiled, run on the host by `tools/ptx`: what the driver gets, launches included."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import traceback
from typing import Any

from ptx import multiprocessor
from ptx.program import Program, parse
from ptx.traffic import Traffic

RUNNER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))
ILLEGAL_ADDRESS = 700  # CUDA's number for it


def install(*, eager: bool, traffic: bool) -> None:
    """For this process from now on."""
    from triton.compiler.compiler import CompiledKernel

    programs: dict[int, Program] = {}  # of a function's handle
    load = CompiledKernel._init_handles

    def loaded(self: Any) -> None:
        load(self)
        if self.function not in programs:
            programs[self.function] = parse(self.asm["ptx"])

    CompiledKernel._init_handles = loaded
    driver, runtime = ctypes.CDLL("libcuda.so.1"), ctypes.CDLL(os.environ["LD_PRELOAD"])
    runtime.fake_gpu_block.restype = ctypes.c_size_t
    counted = Traffic() if traffic else None
    if counted is not None:
        atexit.register(lambda: print(counted.table(), file=sys.stderr))

    @RUNNER
    def run(function: int, sizes: Any, arguments: Any) -> int:
        try:
            program = programs[function]
            sizes_of = [end - start for start, end in program.parameters.values()]
            given = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes_of)]
            blocks = _blocks(runtime, *(int.from_bytes(given[place], "little") for place in program.pointers))
            grid, threads = tuple(sizes[:3]), sizes[3] * sizes[4] * sizes[5]
            multiprocessor.run(program, given, grid, threads, sizes[6], blocks, eager=eager, traffic=counted)
        except Exception as error:  # nothing may be raised through the driver, whose caller raises this
            driver.fake_gpu_complain("".join(traceback.format_exception_only(error)).strip().encode())
            return ILLEGAL_ADDRESS
        return 0

    install.runner = run  # kept, since the driver does not  # type: ignore[attr-defined]
    driver.fake_gpu_run_by(run)


def _blocks(runtime: Any, *pointers: int) -> set[tuple[int, int]]:
    """(start, end) of the blocks of memory that these point into."""
    found = set()
    for pointer in pointers:
        start = ctypes.c_void_p()
        size = runtime.fake_gpu_block(ctypes.c_void_p(pointer), ctypes.byref(start))
        if start.value and size:
            found.add((start.value, start.value + size))
    return found
