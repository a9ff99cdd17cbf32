"""Instructions that the host carries out in a call, counted by Valgrind: the same from run to run within a percent,
whatever else the machine does. Needs Valgrind with its headers, and gcc, on Linux.

What an instruction takes differs: those of Python's interpreter and of a dispatcher, which follow pointers, take longer
than those of a loop over numbers. AVX-512 is not known to Valgrind, so libraries take their other paths.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_SOURCE = """
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_ZERO_STATS; CALLGRIND_START_INSTRUMENTATION; }
void end(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""
_FOLDER = "PEFTFAST_BENCH_CALLGRIND"  # in the environment of a process that Valgrind runs


def run_in_valgrind() -> None:
    """Run this process's command inside Valgrind, in its place, unless it is there."""
    if _FOLDER in os.environ:
        return
    with tempfile.TemporaryDirectory(prefix="callgrind-") as folder:
        options = ["--tool=callgrind", "--instr-atstart=no", "-q", f"--callgrind-out-file={folder}/out"]
        command = ["valgrind", *options, sys.executable, *sys.argv]
        environment = {**os.environ, _FOLDER: folder, "PYTHONHASHSEED": "0"}
        try:
            raise SystemExit(subprocess.run(command, env=environment).returncode)
        except FileNotFoundError:
            raise SystemExit("--instructions needs valgrind, which is not on this machine's PATH") from None


class Counter:
    """Counts what a call takes, in a process that Valgrind runs."""

    def __init__(self) -> None:
        self._folder, self._count = Path(os.environ[_FOLDER]), 0
        source, library = self._folder / "counter.c", self._folder / "counter.so"
        source.write_text(_SOURCE)
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", source, "-o", library], check=True)
        self._library = ctypes.CDLL(str(library))

    def __call__(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Instructions a call, the mean of `repeats`, once caches are filled."""
        for _ in range(30):
            call()
        gc.collect()
        gc.disable()
        self._library.begin()
        for _ in range(repeats):
            call()
        self._library.end()
        gc.enable()
        self._count += 1
        written = (self._folder / f"out.{self._count}").read_text()
        return int(re.findall(r"^(?:totals|summary): (\d+)", written, re.MULTILINE)[-1]) / repeats
