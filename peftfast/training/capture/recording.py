"""One CUDA graph: run a few times as it is, then recorded, then replayed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from peftfast.layers.layer import BaseTunerLayer
from peftfast.ops.host_bound import host_bound_up_to


def has_graphs(device: torch.device) -> bool:
    """Whether work on this device can be recorded."""
    return device.type == "cuda"


def tuner_of(model: nn.Module) -> Any:
    """What manages the adapters of a PeftModel, wrapped for several processes or not; None for other models."""
    return getattr(getattr(model, "module", model), "_tuner", None)


#: torch's allocator goes on asking them whether a stream is theirs.
_failed: list[Any] = []


class Recording:
    """A function without arguments and results, whose tensors all lie still.

    Args:
        model: what the function calls.
        warmup: how many calls run as they are before the recording is made.
        pool: of memory, shared by recordings that are never replayed at the same time.
        before: called right before the recording is made.
    """

    def __init__(
        self,
        function: Callable[[], None],
        model: nn.Module,
        device: torch.device,
        warmup: int,
        pool: Any = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.function, self.model, self.warmup, self.pool, self.before = function, model, warmup, pool, before
        self.calls = 0
        self.graph: Any = None
        self.held: list[Any] = []
        self._stream = torch.cuda.Stream(device) if has_graphs(device) else None

    def __call__(self) -> bool:
        """Run or replay; whether it was a replay."""
        self.calls += 1
        if self._stream is None:
            self.function()
            return False
        with host_bound_up_to(0):  # a replay does not wait for the host
            return self._run_or_replay()

    def _run_or_replay(self) -> bool:
        if self.graph is None and self.calls <= self.warmup:
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self.function()
            current.wait_stream(self._stream)
            return False
        if self.graph is None:
            self._record()
        self.graph.replay()
        return True

    def _record(self) -> None:
        self.before()
        graph = torch.cuda.CUDAGraph()
        try:
            self._record_into(graph, self.function, self.pool)
        except Exception as e:
            _failed.append(graph)
            with suppress(Exception):
                # Until a recording succeeds, torch below 2.14 takes its generator for one in a recording: draws raise.
                self._record_into(torch.cuda.CUDAGraph(), lambda: torch.zeros(1, device=self._stream.device))
            raise RuntimeError(
                "This cannot be captured as a CUDA graph, because something in it waits for the device, decides on the "
                "host, or awaits gradients on the default stream, as DistributedDataParallel does unless it was made "
                f"inside `with torch.cuda.stream(torch.cuda.Stream())`: {e}"
            ) from e
        self.graph, self.held = graph, _kept(self.model)

    def _record_into(self, graph: Any, function: Callable[[], Any], pool: Any = None) -> None:
        # The outer context is for failures, after which the inner one leaves its stream as the current one.
        # thread_local: a loader's pinning thread may allocate meanwhile
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._stream.device)),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()


def _kept(model: nn.Module) -> list[Any]:
    """What the library keeps between forwards and may drop while a recording still reads it: compute copies of the
    factors, and what layers remember."""
    casts = getattr(tuner_of(model), "_casts", None)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    kept = [(dict(layer.store), dict(layer.derived), layer.control.kept(layer)) for layer in layers]
    return [None if casts is None else casts._copies.by_id, kept]
