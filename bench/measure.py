"""Timing that can be believed: contestants take turns in one process, on warm clocks, with a cold L2 before each call.

On a GPU a call is timed by CUDA events after the host has had time to enqueue it, so that the figure is the GPU's own
time (`ahead`), or without that head start, as a program that waits for its host sees it. On a CPU it is wall time.
"""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
for _path in (ROOT, ROOT / "kernels"):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

#: Larger than the L2 of any chip there is (B200: 126 MB).
FLUSH_BYTES = 256 << 20
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger_kernel")


class Sample(NamedTuple):
    """Microseconds of one contestant."""

    median: float
    q1: float
    q3: float
    rounds: int


class Clock:
    """Times calls on one device.

    Args:
        device: "cuda" or "cpu".
        seconds: how long a comparison may take; it stops early once it has `most` rounds.
    """

    def __init__(self, device: str, seconds: float = 0.3, least: int = 5, most: int = 25) -> None:
        self.device, self.seconds, self.least, self.most = device, seconds, least, most
        self.on_gpu = device.startswith("cuda")
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def warm_up(self, seconds: float = 2.0) -> None:
        """Keep the chip busy until its clocks have settled."""
        gc.collect()
        gc.freeze()  # what the imports made takes a tenth of a second to look through, longer than most comparisons
        atexit.register(gc.unfreeze)
        if not self.on_gpu:
            return
        x = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                torch.mm(x, x)
            torch.cuda.synchronize()

    def interleaved(self, calls: Mapping[str, Callable[[], object]], ahead: bool = True) -> dict[str, Sample]:
        """Median and quartiles of every contestant. The order alternates from round to round, so that a slow moment
        or a rising temperature hits all of them."""
        names, head = list(calls), {}
        for name in names:  # compilation, caches
            calls[name]()
            self._synchronize()
            started = time.perf_counter()
            calls[name]()
            head[name] = head_start(time.perf_counter() - started) if ahead else 0
        self._synchronize()
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        times: dict[str, list[float]] = {name: [] for name in names}
        start = time.perf_counter()
        try:
            while len(times[names[0]]) < self.most:
                for name in names:
                    times[name].append(self._one(calls[name], head[name]))
                names.reverse()
                if len(times[names[0]]) >= self.least and time.perf_counter() - start > self.seconds:
                    break
        finally:
            if was_enabled:
                gc.enable()
        return {name: _sample(values) for name, values in times.items()}

    def _one(self, call: Callable[[], object], head: int) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - start)
        self._flush.zero_()
        if head:
            torch.cuda._sleep(head)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end)

    def peak_bytes(self, call: Callable[[], object]) -> float:
        """Bytes above what was allocated before, at the highest point of one call; nan on a CPU."""
        if not self.on_gpu:
            return float("nan")
        self._synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self._synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def head_start(host: float) -> int:
    """Cycles that a GPU sleeps while the host, which takes so many seconds, enqueues a call: twice as long, and half a
    millisecond at least. A shorter sleep would count the host's time as that of whoever takes many launches."""
    return int(2e9 * min(max(2 * host, 5e-4), 2e-2))


def _sample(values: list[float]) -> Sample:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return Sample(statistics.median(values), quartiles[0], quartiles[2], len(values))


def turns(
    calls: Mapping[Any, Callable[[], object]], rounds: int, warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:  # fmt: skip
    """Seconds of every call in each of so many rounds. The calls of a round take turns, so that a slow moment of the
    machine hits all of them, in an order drawn anew, so that none always finds the caches as a certain other one left
    them. The rounds before that are not counted, and no garbage is collected meanwhile."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    order, draw = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds + warmup):
            draw.shuffle(order)
            for name in order:
                start = clock()
                calls[name]()
                if i >= warmup:
                    times[name].append(clock() - start)
    finally:
        gc.enable()
    return times


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of times from the same rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def print_table_head(*columns: str, text: int = 1) -> None:
    """The head of a table in Markdown, whose first `text` columns are no numbers."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * text}{'---:|' * (len(columns) - text)}")


def print_row(*cells: object, digits: int = 3) -> None:
    print(f"| {' | '.join(f'{c:.{digits}f}' if isinstance(c, float) else str(c) for c in cells)} |", flush=True)


class Deadline:
    """A budget of seconds, of which every part of a run gets a share."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.perf_counter()

    @property
    def used(self) -> float:
        return time.perf_counter() - self.start

    def over(self, share: float = 1.0) -> bool:
        """Whether more than this share of the budget is gone."""
        return self.used > share * self.seconds


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the deviation, relative to that of the truth; inf where anything is not finite."""
    wide = truth.dtype if truth.is_floating_point() else torch.float32
    value, truth = value.detach().to(wide), truth.detach().to(wide)
    if not torch.isfinite(value).all():
        return float("inf")
    scale = truth.square().mean().sqrt().item()
    return (value - truth).square().mean().sqrt().item() / (scale or 1.0)


def no_worse(error: float, peers: float, dtype: torch.dtype, slack: float = 1.1) -> bool:
    """The gate: an error at most `slack` times the peer's, or below a quarter ulp of a half-precision result (three of
    an fp32 one, which is what summing in another order does). Never infinite, whatever the peer's."""
    floor = torch.finfo(dtype).eps * (3 if dtype == torch.float32 else 0.25)
    return error <= slack * max(peers, floor) and error < float("inf")


def versions() -> dict[str, str]:
    """Everything that must be known to repeat a figure."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda or torch.version.hip or "none")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    from peftfast.version import __version__

    return {"peftfast": __version__, **found}


def print_versions(*more: object) -> None:
    """A line with all versions, and what else is to be known of a table."""
    print(", ".join([*(f"{name} {version}" for name, version in versions().items()), *map(str, more)]), end="\n\n")


@contextmanager
def watched(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Calls `give_up`, in a thread of its own, where what is inside takes longer: a process that waits for a kernel
    which does not end cannot be told anything, and can only be replaced."""
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_lost(device: str) -> bool:
    """Whether an error was one after which CUDA answers nothing but errors in this process."""
    if not device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} thread(s)"
