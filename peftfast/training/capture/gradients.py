"""Gradients that lie still: a recording writes them where it wrote them first, whoever took them away meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftfast.ops.function import set_anew


class Gradients:
    """The gradients of the parameters that a step trains.

    Args:
        accumulate: steps add to what is there; False: every step writes its own.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], accumulate: bool) -> None:
        self.parameters, self.accumulate = parameters, accumulate
        self._kept: dict[Tensor, Tensor] = {}
        _await_anew(parameters)

    @torch.no_grad()
    def before_step(self) -> None:
        """What steps add to, whatever it is now, is put where the recording finds it."""
        if not self.accumulate:
            return
        for p, kept in self._kept.items():
            if p.grad is None:
                kept.zero_()
            elif p.grad is not kept:
                kept.copy_(p.grad)
            p.grad = kept

    def before_backward(self) -> None:
        """Part of the step: without gradients, a backward pass writes them instead of adding to some."""
        if not self.accumulate:
            for p in self.parameters:
                p.grad = None

    def before_recording(self) -> None:
        """Those of the warm-up make room for those in the recording's own memory."""
        _await_anew(self.parameters)
        if not self.accumulate:
            self.before_backward()
            self._kept = {}

    @torch.no_grad()
    def after_run(self) -> None:
        """They stay where the first ones are."""
        for p in self.parameters:
            kept = self._kept.get(p)
            if p.grad is None or p.grad is kept:
                continue
            if kept is None:
                self._kept[p] = p.grad
            else:
                kept.copy_(p.grad)
                p.grad = kept

    def after_replay(self) -> None:
        """They are what the recording wrote, although `optimizer.zero_grad()` may have taken them away."""
        if not self._kept:
            self._kept = {p: p.grad for p in self.parameters if p.grad is not None}
        for p, grad in self._kept.items():
            p.grad = grad


def _await_anew(parameters: Sequence[nn.Parameter]) -> None:
    """Let autograd await gradients on the stream of the next forward pass. As long as the graph of another one is there
    (a loss that nobody has deleted), it would on that one's: the default stream, which no recording may use.

    Not with several processes, whose gradients are reduced by what hangs on where they are awaited now.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return
    for p in parameters:
        if type(p) is nn.Parameter:
            set_anew(p, p.data)
