"""Gradient checkpointing of a small Llama on CPU: peak memory and step time of peftfast beside PEFT.

    python bench/checkpointing.py [--hidden 256] [--layers 6] [--tokens 512] [--rounds 7]

Step times: both models in one process, taking turns; median and median of the pairwise ratios. Peak memory: what the
resident size of a fresh process rises by during a training step (VmHWM after it is reset, so Linux only), the median
over --processes processes that alternate between the libraries. Losses are compared first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measure import median_ratio, print_row, print_table_head, print_versions, turns
from train_step import compare, make_step, random_ids, small_llama, twins

MODES = {"off": None, "reentrant": True, "non-reentrant": False}


def steps_of(args: argparse.Namespace, mode: str) -> dict[str, Callable[[], float]]:
    models = twins(small_llama(args.hidden, args.layers, torch.float32), args.r, 0.0)
    ids = random_ids(args.tokens)
    for model in models.values():
        if MODES[mode] is not None:
            # PEFT's users call this by hand or through their trainer; for peftfast it is enough as it is
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": MODES[mode]})
            model.enable_input_require_grads()
        model.train()
    return {name: make_step(model, ids) for name, model in models.items()}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest since the last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def rise(args: argparse.Namespace, mode: str, library: str) -> int:
    """Bytes by which one training step raises the resident size, after one step has warmed everything up."""
    step = steps_of(args, mode).pop(library)
    gc.collect()
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the step runs in pages that the first one left resident
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    step()
    return resident("VmHWM") - start


def rises(args: argparse.Namespace, mode: str) -> dict[str, float]:
    found: dict[str, list[int]] = {"peft": [], "peftfast": []}
    for _ in range(args.processes):
        for library, values in found.items():
            done = subprocess.run(
                [sys.executable, __file__, "--child", library, "--mode", mode, *args.passed],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            values.append(int(done.stdout))
    return {library: statistics.median(values) / 2**20 for library, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 6, "tokens": 512, "r": 16, "threads": 1, "rounds": 7, "processes": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mode", choices=list(MODES), help="this mode only")
    parser.add_argument("--child", choices=["peft", "peftfast"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.passed = [word for name in sizes for word in (f"--{name}", str(getattr(args, name)))]
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.child:
        print(rise(args, args.mode, args.child))
        return
    print_versions(" ".join(args.passed), "fp32", "all-linear")
    print_table_head(
        "mode", "PEFT, ms", "peftfast, ms", "peftfast / PEFT", "PEFT, MiB", "peftfast, MiB", "peftfast / PEFT"
    )
    for mode in [args.mode] if args.mode else MODES:
        steps = steps_of(args, mode)
        compare(steps, 1e-5)
        times = turns(steps, args.rounds)
        medians = [1e3 * statistics.median(times[n]) for n in ("peft", "peftfast")]
        memory = rises(args, mode)
        ratio = median_ratio(times["peftfast"], times["peft"])
        print_row(mode, *medians, ratio, *memory.values(), memory["peftfast"] / memory["peft"])


if __name__ == "__main__":
    main()
