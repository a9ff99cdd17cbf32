"""Runs every operation's kernels as they were compiled for a chip, instruction by instruction, without a GPU.

    python tools/emulate.py [--chip sm_90] [--match lora_gemm] [--eager] [--traffic] [--cases 3]

Each case of each operation is launched on host memory: Triton compiles its kernels for the chip, and their PTX is run
by `tools/ptx`, which also looks for accesses outside of tensors, misaligned ones, races in shared memory and copies and
matrix products that nobody waits for. Results are compared with fp64, as a GPU's are by tests/kernels. Exits with 1 if
one is wrong. What it cannot show: time, and what the assembler makes of the PTX.
"""

import argparse
import contextlib
import functools
import importlib
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
for path in (ROOT, ROOT / "kernels", ROOT / "tools"):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
os.environ.pop("TRITON_INTERPRET", None)  # decided when Triton is imported

import torch  # noqa: E402
from aot import compile_source  # noqa: E402
from ptx.multiprocessor import run  # noqa: E402
from ptx.program import parse  # noqa: E402
from ptx.traffic import Traffic  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.measure import no_worse, relative_error  # noqa: E402
from bench.operands import Size  # noqa: E402
from bench.operands import arguments as operands  # noqa: E402
from peftfast_kernels import OPS, device_masks, use_backend  # noqa: E402
from peftfast_kernels.launch import Launch  # noqa: E402
from peftfast_kernels.variants import MODULES, Source, Variant  # noqa: E402

for module in MODULES:
    importlib.import_module(f"peftfast_kernels.{module}")

CHIPS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: Layers large enough for every tile, small enough for a host; a row, a strip, a tile, several of them.
SIZES = (
    Size(1, 512, 1024, 16, BF16, "nf4"),
    Size(16, 1024, 2048, 16, BF16, "nf4", 0.1),
    Size(64, 1024, 1024, 64, BF16, "nf4", wide=True),
    Size(100, 512, 1024, 16, FP16, "int8", 0.1),
    Size(300, 768, 640, 16, BF16, "nf4", 0.1, 3),
    Size(300, 768, 640, 16, BF16, "dense", 0.1, 3),
    Size(260, 512, 512, 256, BF16, "dense", adapters=2, wide=True),
    Size(70, 200, 328, 8, FP32, "dense", 0.1),
)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Emulator:
    """Stands in for a GPU of this chip."""

    def __init__(self, chip: str, eager: bool = False, traffic: Any = None) -> None:
        self.chip, self.eager, self.traffic = chip, eager, traffic
        self.programs: dict[Any, Any] = {}
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> None:
        modules = [
            m for name, m in sys.modules.items() if name.startswith("peftfast_kernels.") and hasattr(m, "chip_of")
        ]
        patches = [mock.patch.object(module, "chip_of", lambda device: self.chip) for module in modules]
        patches.append(mock.patch.object(Launch, "__call__", lambda launch, *pointers: self.launch(launch, pointers)))
        patches.append(mock.patch("peftfast_kernels.op.is_interpreting", lambda: True))  # so that CPU tensors may
        for context in (*patches, device_masks(), use_backend("triton")):
            self._contexts.enter_context(context)

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def launch(self, launch: Any, pointers: tuple) -> None:
        kernel = launch.kernel
        source, options, values = _described(launch, dict(zip(kernel.arg_names, pointers, strict=False)))
        key = (kernel.__name__, repr(source), repr(sorted(options.items())))
        if key not in self.programs:
            compiled = compile_source(kernel, source, options, self.chip)
            self.programs[key] = parse(compiled.asm["ptx"]), compiled.metadata
        program, metadata = self.programs[key]
        storages = [t.untyped_storage() for one in pointers for t in _each(one)]
        ranges = {(one.data_ptr(), one.data_ptr() + one.nbytes()) for one in storages if one.nbytes()}
        values += [b"\0" * 8] * (len(program.parameters) - len(values))  # Triton's own scratch
        grid = (*launch.grid, 1, 1)[:3]
        threads = 32 * metadata.num_warps
        run(program, values, grid, threads, metadata.shared, ranges, eager=self.eager, traffic=self.traffic)


def _described(launch: Any, pointers: dict[str, Any]) -> tuple[Source, dict[str, Any], list[bytes]]:
    """What is compiled for a launch, how, and its arguments as a GPU gets them."""
    kinds = {
        name: tuple(TYPES[t.dtype] for t in value) if isinstance(value, tuple) else TYPES[value.dtype]
        for name, value in pointers.items()
    }
    planned = Variant(launch.kernel.__name__, launch, kinds)
    source, values = planned.source, []
    for i, parameter in enumerate(launch.kernel.params):
        given = pointers.get(parameter.name, launch.arguments.get(parameter.name))
        for j, value in enumerate(_each(given)):
            place = (i, j) if isinstance(given, tuple) and not parameter.is_constexpr else (i,)
            if place in source.constants:
                continue
            if isinstance(value, Tensor):
                values.append(struct.pack("<Q", value.data_ptr()))
                if value.data_ptr() % 16:  # for a launch that is planned they are multiples
                    source.hints.pop(place, None)
            else:
                values.append(struct.pack("<f" if isinstance(value, float) else "<i", value))
    return source, planned.options, values


def problem_of(op: Any, kwargs: dict[str, Any]) -> str:
    """What is wrong with the launch of an operation, as a sentence; nothing if it is right."""
    try:
        results = _each(op.launch(**kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    plain, truths = _each(op.reference(**kwargs)), _each(op.reference(**_in_double(kwargs)))
    for i, (result, native, truth) in enumerate(zip(results, plain, truths, strict=True)):
        if not truth.is_floating_point():
            if not torch.equal(result, truth):
                return f"output {i} is another"
        elif truth.numel():
            error, peers = (relative_error(one.to(result.dtype), truth) for one in (result, native))
            if not no_worse(error, peers, result.dtype, slack=2):
                return f"output {i}: error {error:.1e}, of the same product rounded once {peers:.1e}"
    return ""


def _each(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _in_double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_double(one) for key, one in value.items()}
    if type(value) is list:
        return [_in_double(one) for one in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def work(sizes: bool) -> Iterator[tuple[str, Any, Callable[[], dict[str, Any]]]]:
    """Name, operation and how its arguments are made: of its own cases, or at the sizes above."""
    for name, op in OPS.items():
        if not sizes:
            for case in op.cases():
                yield f"{name}-{case.id}", op, functools.partial(case.make, "cpu")
            continue
        for size in SIZES:
            yield f"{name}-{size_name(size)}", op, functools.partial(operands, name, size, "cpu")


def size_name(size: Size) -> str:
    dtype = str(size.dtype).removeprefix("torch.") + "-wide" * size.wide
    return f"{size.format}-M{size.m}-N{size.n}-K{size.k}-R{size.r}-p{size.dropout}-{dtype}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="sm_90", choices=CHIPS, help="whose instructions are known")
    parser.add_argument("--match", default="", help="a regular expression: only cases in whose name it is found")
    parser.add_argument("--sizes", action="store_true", help="at sizes of layers instead of the operations' own cases")
    parser.add_argument(
        "--eager", action="store_true", help="copies and products take place at once, not at the latest"
    )
    parser.add_argument("--traffic", action="store_true", help="what accesses to memory cost, by line of the source")
    options = parser.parse_args(arguments)
    traffic = Traffic() if options.traffic else None
    failed = count = 0
    start = time.perf_counter()
    with Emulator(options.chip, options.eager, traffic):
        for name, op, make in work(options.sizes):
            if not re.search(options.match, name):
                continue
            begun, kwargs = time.perf_counter(), make()
            if not op.accepts(**kwargs):
                print(f"{name:72}           left to torch")
                continue
            problem = problem_of(op, kwargs)
            count, failed = count + 1, failed + bool(problem)
            print(f"{name:72} {time.perf_counter() - begun:6.1f} s  {problem or 'ok'}", flush=True)
    if not count:
        parser.error(f"no case matches {options.match!r}")
    print(f"{count} cases on {options.chip}, {failed} with problems, {time.perf_counter() - start:.0f} s")
    if traffic is not None:
        print(traffic.table())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
