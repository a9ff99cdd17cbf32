"""What a captured training step and captured decoding have in common: one model on one device, compared with what it
was before every call, and what to do when it is another one."""

from __future__ import annotations

import logging
from numbers import Integral
from typing import Any

import torch
from torch import nn

from peftfast.config import require_module
from peftfast.method import method_for
from peftfast.rules import optional, torch_dtype
from peftfast.training.capture import recording
from peftfast.training.capture.freshness import Snapshot

logger = logging.getLogger("peftfast")

ON_CHANGE = ("error", "recapture")


def check_count(name: str, value: Any, reason: str = "") -> None:
    """ValueError unless the argument `name` is an integer of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1{reason}; got {value!r}")


class Captured:
    """A model with something of it recorded.

    Args:
        autocast: dtype of autocast inside; None: none, whatever the surroundings say.
        warmup: how many calls run as they are before a recording is made.
        on_change: one of `ON_CHANGE`.
        mixed: every sample has its own adapter.
    """

    def __init__(
        self, model: nn.Module, autocast: torch.dtype | str | None, warmup: int, on_change: str, mixed: bool = False
    ) -> None:
        require_module(model)
        check_count("warmup", warmup, ", because capture cannot do what is done only once")
        if on_change not in ON_CHANGE:
            raise ValueError(f"on_change must be one of {', '.join(ON_CHANGE)}, got {on_change!r}")
        self.autocast = optional(torch_dtype(floating=True)).enforce(autocast, "autocast")
        self.model, self.warmup, self.on_change, self.mixed = model, warmup, on_change, mixed
        self.device = _device_of(model)
        self.tuner = recording.tuner_of(model)
        self._graphs = recording.has_graphs(self.device)

    def _start(self) -> None:
        """Forget what is recorded; the model as it is now is what will be."""
        for name, cfg in (getattr(self.tuner, "peft_config", None) or {}).items():
            why = getattr(method_for(cfg), "uncapturable", None)
            if why is not None:
                raise ValueError(f"A model with adapter {name} cannot be captured: {why}")
        self._snapshot = Snapshot(self.model, self.mixed)

    def _change(self) -> str | None:
        """What is not as it was when this started, in words."""
        return self._snapshot.change()

    def _follow(self) -> None:
        """Refuse a model that has changed, or start anew with it."""
        change = self._change()
        if change is None:
            return
        if self.on_change == "error":
            raise RuntimeError(
                f"The model is not the one that was captured: {change} changed. Capture it again, or once and for all "
                "with on_change='recapture'."
            )
        logger.info("peftfast: capturing again, because %s changed", change)
        self._start()

    def _autocast(self) -> Any:
        # without the cache: what an outer autocast has cached is not there any more at a replay
        dtype = self.autocast
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(f"A captured model lies on one device, this one on {found}")
    return devices.pop()
