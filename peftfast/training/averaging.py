"""An exponential moving average of what is trained, to be evaluated and saved in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.config import require_module
from peftfast.errors import PeftWarning, enumerate_some, warn
from peftfast.files.io import read_safetensors, write_safetensors
from peftfast.rules import number
from peftfast.sharding import check_not_partitioned, copy_whole, gathered, is_distributed, to_shards, whole_shape
from peftfast.wrapping.inventory import find_inventory

#: What the callback writes into a checkpoint's folder.
AVERAGE_FILE = "adapter_average.safetensors"

#: The number of updates, beside the averages in a state dict.
_UPDATES = "updates"


class AdapterAverage:
    """The exponential moving average of a model's trainable parameters: adapters, and what trains beside them. ::

        average = peftfast.AdapterAverage(model, decay=0.999)
        ...
        optimizer.step()
        average.update()
        ...
        with average.applied():
            evaluate(model)
            model.save_pretrained("averaged")

    transformers' `Trainer(..., callbacks=[average.callback()])` updates it, and saves and resumes it with its
    checkpoints; Accelerate does the latter after `accelerator.register_for_checkpointing(average)`.

    It is of what is trainable at the first update, in fp32 or wider, because half precision has no numbers for such
    small steps. It begins as the parameters are then, and the n-th update after that keeps min(decay, (1 + n) / (10 +
    n)) of it, so that a short training is not averaged with its beginning. Every process averages its own shards.

    Args:
        model: with adapters, not copied. Made before or after it is sharded or compiled; it is not for ZeRO-3.
        decay: how much of the average every update keeps in the end.

    Attributes:
        updates: how many there were.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        require_module(model)
        self.model = model
        self.decay: float = number(0.0, 1.0).enforce(decay, "decay")
        self.updates = 0
        self._averages: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now: once after every optimizer step.

        Raises:
            ValueError: nothing is trainable. RuntimeError: inside `applied`, under ZeRO-3, or a parameter has another
                size than before (AdaLoRA's `shrink_ranks`).
        """
        if self._is_applied:
            raise RuntimeError(
                "The model has the average in the place of its parameters: update it outside of applied()"
            )
        if not self._averages:
            self._averages = {n: (p, p.detach().to(_wide(p), copy=True)) for n, p in self._trainable().items()}
        else:
            weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
            averages, now = [], []
            for name, (p, average) in self._averages.items():
                if p.shape != average.shape:
                    raise RuntimeError(
                        f"{name} has shape {list(p.shape)} now and had {list(average.shape)} when its average began; "
                        "make another AdapterAverage"
                    )
                if is_distributed(average):
                    average.lerp_(p.to(average.dtype), weight)
                else:
                    averages.append(average)
                    now.append(p.to(average.dtype))
            if averages:
                torch._foreach_lerp_(averages, now, weight)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are their averages; after it they have their own bits back.

        Raises:
            RuntimeError: there is no average yet, or it is applied already. ValueError: adapters are merged, so that
                their parameters have no effect.
        """
        if not self._averages or self._is_applied:
            why = "it is applied already" if self._is_applied else "there is none before the first update()"
            raise RuntimeError(f"The average cannot be applied: {why}")
        inventory, _ = find_inventory(self.model)
        merged = [] if inventory is None else [n for n, layer in inventory.mergeable().items() if layer.merged]
        if merged:
            raise ValueError(f"Adapters are merged into {enumerate_some(merged)}; unmerge first")
        to_shards(self.model)  # FSDP2 would lose what is written now, if it was evaluated with
        kept = [p.detach().clone() for p, _ in self._averages.values()]
        self._is_applied = True
        try:
            # what is exactly zero is pruned by now (AdaLoRA's ranks), or was never another number
            self._write([average * (p != 0) for p, average in self._averages.values()])
            yield
        finally:
            to_shards(self.model)
            self._write(kept)
            self._is_applied = False

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for (p, _), value in zip(self._averages.values(), values, strict=True):
            p.copy_(value.to(p.dtype))

    def _trainable(self) -> dict[str, nn.Parameter]:
        to_shards(self.model)
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not found:
            raise ValueError("The model has no trainable parameters to average; see model.set_adapter")
        check_not_partitioned(found.items(), "average this model", "It works under DDP, FSDP2, ZeRO-1 and 2.")
        return found

    # ---- saved and resumed -------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, and how many updates there were; of a sharded model shards."""
        return {
            _UPDATES: torch.tensor(self.updates),
            **{name: average for name, (_, average) in self._averages.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`, of shards like those here or of whole tensors.

        Raises:
            ValueError: it is of parameters with other names or shapes; nothing was changed.
        """
        present = {name: p for name, (p, _) in self._averages.items()} or self._trainable()
        given = {name: tensor for name, tensor in state_dict.items() if name != _UPDATES}
        if not given and _UPDATES in state_dict:  # of an average that had not begun
            present = {}
        wrong = [n for n in present if n not in given or given[n].shape != whole_shape(present[n])]
        wrong += [n for n in given if n not in present]
        if wrong or _UPDATES not in state_dict:
            raise ValueError(
                f"The state is not of an average of what trains here: {enumerate_some(wrong or [_UPDATES])} are "
                "missing, of another shape or of no trainable parameter"
            )
        averages = {n: (p, p.detach().to(_wide(p), copy=True)) for n, p in present.items()}
        for name, (_, average) in averages.items():
            copy_whole(average, given[name])
        self._averages, self.updates = averages, int(state_dict[_UPDATES])

    def callback(self) -> Any:
        """A callback for transformers' Trainer: `update` after every optimizer step, the average in every checkpoint,
        and there again when the training is resumed from one in `output_dir`, or from `args.resume_from_checkpoint`."""
        from transformers import TrainerCallback

        average = self

        class Averaging(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step:
                    average._resume(args, state)

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                average.update()

            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                tensors = gathered(average.state_dict())
                if args.should_save:
                    path = _checkpoint(args, state) / AVERAGE_FILE
                    write_safetensors(path, {name: t.cpu().contiguous() for name, t in tensors.items()})

        return Averaging()

    def _resume(self, args: Any, state: Any) -> None:
        given = args.resume_from_checkpoint  # which is for scripts, and need not be what `train` was given
        path = Path(given if isinstance(given, str) else _checkpoint(args, state)) / AVERAGE_FILE
        if path.is_file():
            self.load_state_dict(read_safetensors(path))
        else:
            warn(f"There is no {path} to resume the average of the adapters from; it begins anew.", PeftWarning)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder that Trainer saves this step in."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
