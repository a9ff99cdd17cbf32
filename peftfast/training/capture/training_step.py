"""Forward and backward of one batch, and the optimizer's step if there is an optimizer, as one recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.many.router import Choice
from peftfast.method import method_for
from peftfast.rows.routing import batch_of, tokens_of
from peftfast.training.capture.captured import Captured
from peftfast.training.capture.gradients import Gradients
from peftfast.training.capture.inputs import buffers_for, check_batch, copy_batch
from peftfast.training.capture.mix import check_routable, chosen_adapters, following
from peftfast.training.capture.recording import Recording


class CapturedTrainingStep(Captured):
    """See `capture_training_step`.

    Attributes:
        inputs: the buffers that batches are copied into, by name.
        index: [B] place of every sample's adapter among `names`, -1 for the base model; None: the active adapters.
        loss: [] the last loss; overwritten by the next call.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None,
        autocast: torch.dtype | str | None,
        loss_function: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None,
        accumulate: bool,
        max_grad_norm: float | None,
        warmup: int,
        on_change: str,
    ) -> None:
        super().__init__(model, autocast, warmup, on_change)
        self.optimizer, self.accumulate, self.max_grad_norm = optimizer, accumulate, max_grad_norm
        self.loss_function = loss_function or _loss_of_output
        if getattr(self.tuner, "router", None) is not None:
            raise ValueError("A router chooses on the host, which a captured step does not ask: set_router(None) first")
        self._check_optimizer()
        batch, choice = _split(batch)
        self.index: Tensor | None = None
        if choice is not None:
            check_routable(model, self.tuner, "adapter_names=")
            self.index = self._chosen(batch, choice)
        self.inputs = buffers_for(batch, self.device)
        self.loss: Tensor | None = None
        self._gradients = Gradients([], accumulate)
        self._start()

    def _check_optimizer(self) -> None:
        if self.optimizer is None:
            if self.max_grad_norm is not None:
                raise ValueError("max_grad_norm is for a captured optimizer; clip before calling optimizer.step()")
            return
        if self.accumulate:
            raise ValueError("accumulate=True adds gradients up over calls: leave the optimizer outside")
        for name in getattr(self.tuner, "active_adapters", ()):
            if hasattr(method_for(self.tuner.peft_config[name]), "loss_term"):
                raise ValueError(
                    f"Adapter {name} has a schedule that follows optimizer.step(): leave the optimizer outside"
                )
        if self._graphs and not all(group.get("capturable") for group in self.optimizer.param_groups):
            raise ValueError(
                f"{type(self.optimizer).__name__} decides on the host, as long as it was not made with "
                "capturable=True; without that, leave it outside and call optimizer.step() after every step"
            )

    def _check_recordable(self) -> None:
        for name in getattr(self.tuner, "active_adapters", ()):
            why = getattr(method_for(self.tuner.peft_config[name]), "uncapturable_training", None)
            if why is not None:
                raise ValueError(f"A training step with adapter {name} cannot be captured: {why}")

    def _start(self) -> None:
        self._check_recordable()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("The model has no trainable parameter; activate an adapter with set_adapter first")
        self._gradients.before_backward()  # what no longer trains has none
        self._gradients = gradients = Gradients(parameters, self.accumulate)
        self._recording = Recording(self._run, self.model, self.device, self.warmup, before=gradients.before_recording)
        if self.optimizer is not None and self._graphs:
            for group in self.optimizer.param_groups:  # schedulers write into it
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
        self._settings = self._optimizer_settings()
        super()._start()

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """What a recording of the optimizer has inside it; the learning rate is a tensor there."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        skipped = ("params", "lr", "initial_lr")
        return [{k: v for k, v in g.items() if k not in skipped and not isinstance(v, Tensor)} for g in groups]

    def _change(self) -> str | None:
        change = super()._change()
        if change is None and self._optimizer_settings() != self._settings:
            return "a setting of the optimizer"
        return change

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the step on `batch`.

        Args:
            batch: as at capture: the same keys, shapes and dtypes, and equal values where they are not tensors. It may
                lie on another device.

        Returns:
            The loss [], a copy.

        Raises:
            ValueError: another key, shape, dtype or constant; nothing has been copied then.
            RuntimeError: the model or the optimizer's settings are not what was captured.
        """
        batch, choice = _split(batch)
        check_batch(self.inputs, batch)
        if (choice is None) != (self.index is None):
            raise ValueError(
                f"adapter_names is {'missing' if choice is None else 'new'}: a step is captured with a choice of "
                "adapters for every sample or without"
            )
        index = None if choice is None else self._chosen(batch, choice)
        self._follow()
        copy_batch(self.inputs, batch)
        if index is not None:
            self.index.copy_(index)
        self._gradients.before_step()
        if self._recording():
            self._gradients.after_replay()
            if self.optimizer is not None:  # a replay writes without anybody noticing
                torch.autograd.graph.increment_version(self._gradients.parameters)
        else:
            self._gradients.after_run()
        return self.loss.clone()

    def _chosen(self, batch: Mapping[str, Any], choice: Choice) -> Tensor:
        first = batch_of((), batch)
        if first is None:
            raise ValueError("adapter_names needs a tensor in the batch, whose first dimension counts the samples")
        return chosen_adapters(self.tuner, first, None, choice, self.device)

    def _following(self) -> AbstractContextManager[None]:
        if self.index is None:
            return nullcontext()
        return following(self.tuner, self.index, tokens_of(batch_of((), self.inputs)), keeps=False)

    def _run(self) -> None:
        self._gradients.before_backward()
        with torch.inference_mode(False), torch.enable_grad():
            with self._autocast(), self._following():
                loss = self.loss_function(self.model, self.inputs)
            loss.backward()
        if self.loss is None:
            self.loss = torch.empty_like(loss, requires_grad=False)
        with torch.no_grad():
            self.loss.copy_(loss)
        if self.optimizer is not None:
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._gradients.parameters, self.max_grad_norm)
            self.optimizer.step()


def _split(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Choice | None]:
    """What is copied, and the choice of adapters, which is worked out on the host."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a dict of the model's keyword arguments, got {batch!r}")
    return {k: v for k, v in batch.items() if k != "adapter_names"}, batch.get("adapter_names")


def _loss_of_output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    output = model(**batch)
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(output).__name__} has no loss: pass labels with the batch, or loss_function=(model, batch) -> loss"
        )
    return loss


def capture_training_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    autocast: torch.dtype | str | None = None,
    loss_function: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    accumulate: bool = False,
    max_grad_norm: float | None = None,
    warmup: int = 3,
    on_change: str = "error",
) -> CapturedTrainingStep:
    """A training step as one CUDA graph: `loss = step(batch)`. Nothing is run yet; the first `warmup` calls are
    ordinary steps, the next one is recorded and replayed, as are all that follow.

    Args:
        model: any, on one device.
        batch: keyword arguments of the model; gives keys, shapes and dtypes, the values do not matter. Anything but a
            tensor is a constant. With `adapter_names`, names or numbers, every sample trains an adapter of its own, and
            one recording serves every mix; which of them are trainable is fixed. One that no sample of a batch has gets
            a gradient of zero from it, which an optimizer with weight decay or momentum does not pass over.
        optimizer: part of the step. On a GPU it must have been made with `capturable=True`; its learning rate becomes
            a tensor, which schedulers write into. None: the caller calls `optimizer.step()` after a step.
        autocast: dtype of autocast inside the step; None: none, whatever the surroundings say.
        loss_function: (model, batch) -> loss []; None: the `loss` of the model's output.
        accumulate: add to the gradients; False: `.grad` holds the gradients of the last batch alone, without
            `zero_grad`.
        max_grad_norm: clip the gradients to this norm before the optimizer's step.
        warmup: steps that run before recording. With `torch.nn.parallel.DistributedDataParallel` at least 11; it has to
            be made inside `with torch.cuda.stream(torch.cuda.Stream())`.
        on_change: what to do when the model is no longer what was captured: "error", or "recapture", with a warm-up.

    Raises:
        ValueError: no trainable parameter, several devices, an optimizer that cannot be captured, a router.
    """
    return CapturedTrainingStep(
        model, batch, optimizer, autocast, loss_function, accumulate, max_grad_norm, warmup, on_change
    )
