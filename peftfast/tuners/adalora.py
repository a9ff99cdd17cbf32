"""The model around AdaLoRA adapters: runs the rank schedule by itself, in any training loop.

The right moment is after an optimizer's step, before gradients are cleared. torch calls
`register_optimizer_step_post_hook` callbacks exactly there, for every optimizer, whoever drives it: Trainer, Accelerate
(once per update under gradient accumulation, never for a step that a GradScaler skips) or a plain loop. One callback is
registered while models with such adapters exist; it looks for the optimizer that holds their factors and leaves all
others alone. Nothing of torch, of the optimizer or of a trainer is replaced.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from peftfast.adapter import Adapter
from peftfast.errors import PeftWarning, warn
from peftfast.keys import in_base
from peftfast.methods.adalora import VALUES, AdaLoraConfig
from peftfast.methods.lora.lora import factors
from peftfast.methods.rank_allocator import Allocation, RankAllocator, held_by, put_back, replace
from peftfast.sharding import as_copies, check_not_partitioned, is_stepped_by_deepspeed, put_together, whole_shape
from peftfast.tuners.lora import LoraModel

STATE_FILE = "adalora_state.safetensors"

#: The code in which torch runs a `step` and its callbacks.
_STEP = torch.optim.Optimizer.profile_hook_step(len).__code__

_watched: weakref.WeakSet[AdaLoraModel] = weakref.WeakSet()
_handle: Any = None


@torch._disable_dynamo  # which would make a graph of every step, each with its number
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _handle
    if not _watched and _handle is not None:
        _handle.remove()
        _handle = None
    around = _steps_around()
    for model in list(_watched):
        model._stepped(optimizer, around)


def _steps_around() -> list[torch.optim.Optimizer]:
    """The optimizers in whose `step` the one is that has just ended: a subclass calls that of its base class, and some
    optimizers are made of others. torch calls back for each."""
    steps, frame = [], sys._getframe()
    while frame is not None:
        if frame.f_code is _STEP:
            steps.append(frame.f_locals["self"])
        frame = frame.f_back
    return steps[1:]


def _watch(model: AdaLoraModel) -> None:
    global _handle
    _watched.add(model)
    if _handle is None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        _handle = register_optimizer_step_post_hook(_after_step)


def _is_trial(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], known: bool) -> bool:
    """Whether this step, with a learning rate and gradients of zero, is how torch.distributed.checkpoint gives an
    optimizer the state that it is to save or load.

    Args:
        known: the optimizer has stepped these parameters before; then a rate on a device is not read.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        if isinstance(rate, Tensor) and rate.device.type != "cpu" and known:
            return False
        if rate != 0:
            return False
    gradients = (p.grad for p in parameters if p.grad is not None)
    return not any(put_together(g).any() for g in gradients)


class AdaLoraModel(LoraModel):
    """A model with AdaLoRA adapters.

    Attributes:
        automatic: run the schedule after every optimizer step. The first manual `update_and_allocate` switches this
            off and takes the automatic update of the same step back, so that no step counts twice.
        shrink_after_final: True cuts pruned ranks out of Parameters, gradients and optimizer state once the final ranks
            are chosen, so that the last steps are cheaper. Then whatever else was made for the shapes before no longer
            fits: averages of the weights (EMA), state dicts, other optimizers. False keeps them masked, as PEFT does.
    """

    _checked = False  # whether a forward has found the factors within the schedule's reach
    _said = False  # whether it was said that their importance cannot be known

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(automatic=True, shrink_after_final=False, _allocators={}, _optimizer=None)
        super().__init__(*args, **kwargs)
        _watch(self)  # now, because a graph of a forward cannot hold it

    # ---- schedules ---------------------------------------------------------------------------------------------------
    @property
    def trainable_adapter_name(self) -> str | None:
        """The active adapter that is being trained."""
        for name in self.active_adapters:
            if any(a[VALUES].requires_grad for a in self._adapters(name)):
                return name
        return None

    @property
    def rankallocator(self) -> RankAllocator:
        """The schedule of the adapter that is being trained. AttributeError where none is."""
        name = self.trainable_adapter_name
        if name is None:
            raise AttributeError("rankallocator")
        return self._allocator(name)

    def _adapters(self, name: str) -> list[Adapter]:
        return [a for a in self.inventory.adapters(name) if VALUES in a]  # others may be of another method

    def _allocator(self, name: str) -> RankAllocator:
        allocator, cfg, adapters = self._allocators.get(name), self.peft_config[name], self._adapters(name)
        if allocator is not None and allocator.adapters is None:  # of a copy of the model
            allocator.adapters = adapters
        if allocator is None or allocator.cfg is not cfg or allocator.adapters != adapters:  # deleted, and added anew
            allocator = self._allocators[name] = RankAllocator(cfg, adapters)
        return allocator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self.training and self.automatic and torch.is_grad_enabled():
            if not self._checked or self not in _watched:
                name = self.trainable_adapter_name
                if name is not None:
                    self._check_within_reach(self._adapters(name))
                self._checked = True
                _watch(self)
        return super().forward(*args, **kwargs)

    def _stepped(self, optimizer: torch.optim.Optimizer, around: Sequence[torch.optim.Optimizer]) -> None:
        name = self.trainable_adapter_name if self.automatic else None
        if name is None:
            return
        allocator = self._allocator(name)
        held, first = held_by(optimizer), id(allocator.adapters[0][VALUES])
        if first not in held:
            if self._checked:  # engines step others, or nothing yet, before the first forward
                self._check_within_reach(allocator.adapters)
            return
        if any(first in held_by(outer) for outer in around):
            return  # a part of a step that counts as a whole
        if getattr(optimizer, "found_inf", None):
            return  # a fused optimizer is called by a GradScaler also for a step that it is to skip
        parameters = allocator.parameters()
        if all(p.grad is None for p in parameters):
            return  # a step without us: the adapter was not part of the loss
        known = self._optimizer is not None and self._optimizer() is optimizer
        if _is_trial(optimizer, parameters, known):
            return
        self.__dict__["_optimizer"] = weakref.ref(optimizer)
        gone = sum(p.requires_grad and p.grad is None and id(p) not in held for p in parameters)
        if gone and not allocator.finished:
            if not self._said:
                self._said = True
                warn(
                    f"AdaLoRA prunes nothing: at the step of the optimizer that trains its first lora_E, {gone} of its "
                    f"{len(parameters)} factors, which other optimizers train, have no gradient, so their importance "
                    "cannot be known. Step all optimizers before clearing gradients, or call update_and_allocate(step) "
                    "while the gradients are there.",
                    PeftWarning,
                )
            return
        allocator.remember()
        self._advance(allocator, allocator.step + 1)

    def update_and_allocate(self, global_step: int) -> None:
        """Run the schedule by hand, after `loss.backward()` and before `zero_grad()`, as PEFT wants it. Not needed:
        the schedule runs by itself, and stops doing so with the first call of this."""
        name = self.trainable_adapter_name
        if name is None:
            raise ValueError(
                f"No AdaLoRA adapter is being trained; active: {self.active_adapters}, "
                f"present: {list(self.peft_config)}"
            )
        allocator = self._allocator(name)
        if self.automatic:
            self.automatic = False
            _watched.discard(self)
            if allocator.counts and not allocator.take_back():
                warn(
                    f"AdaLoRA's schedule has run by itself for {allocator.step} steps; manual calls take over now.",
                    PeftWarning,
                )
        self._advance(allocator, global_step)

    def _check_within_reach(self, adapters: Iterable[Adapter]) -> None:
        """RuntimeError where DeepSpeed keeps the factors' gradients and the values that its optimizer steps."""
        if any(is_stepped_by_deepspeed(adapter[VALUES]) for adapter in adapters):
            raise RuntimeError(
                "AdaLoRA cannot choose ranks under DeepSpeed ZeRO, whose optimizer steps copies of the factors: their "
                "gradients are not there to be measured, and what is pruned would come back. Train with DDP, FSDP2 or "
                "in one process; or without pruning, all ranks to the end: model.base_model.automatic = False"
            )

    def _advance(self, allocator: RankAllocator, step: int) -> None:
        self._check_within_reach(allocator.adapters)
        if allocator.advance(step) and self.shrink_after_final:
            optimizer = None if self._optimizer is None else self._optimizer()
            if optimizer is not None:  # without it, its state would not fit any more
                allocator.forget()
                allocator.shrink(optimizer)

    def shrink_ranks(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Cut pruned ranks out of the Parameters, once the final ranks are chosen; whether they are cut now.

        Args:
            optimizer: that trains the adapter, and whose state is cut as well; needed if training goes on.
        """
        name = self.trainable_adapter_name or self.active_adapters[0]
        return self._allocator(name).shrink(optimizer)

    @property
    def history(self) -> list[Allocation]:
        """Every allocation so far of the adapter that is being trained."""
        name = self.trainable_adapter_name
        names = [name] if name is not None else [n for n in self.active_adapters if n in self._allocators]
        return self._allocators[names[0]].history if names and names[0] in self._allocators else []

    def plot_ranks(self, path: str | os.PathLike | None = None) -> Any:
        """A picture of the ranks of every module over the steps; needs matplotlib.

        Args:
            path: saved there. None: only returned, as a matplotlib figure.
        """
        history = self.history
        if not history:
            raise ValueError("No ranks have been allocated yet")
        from matplotlib.figure import Figure

        names = list(history[0].ranks)
        table = torch.tensor([[entry.ranks[n] for n in names] for entry in history], device="cpu").t()
        figure = Figure(figsize=(8, max(3.0, 0.22 * len(names))), layout="constrained")
        axes = figure.subplots()
        steps = [entry.step for entry in history]
        edges = [*steps, steps[-1] + max(1, steps[-1] - steps[-2] if len(steps) > 1 else 1)]
        image = axes.pcolormesh(edges, range(len(names) + 1), table.numpy(), cmap="viridis", vmin=0)
        axes.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("optimizer step")
        axes.set_title("AdaLoRA: rank of every module")
        figure.colorbar(image, ax=axes, label="rank")
        if path is not None:
            figure.savefig(path)
        return figure

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """AdaLoRA's adapters cannot be combined; TypeError."""
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._allocators.pop(adapter_name, None)

    # ---- files -------------------------------------------------------------------------------------------------------
    def before_load(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Make room for tensors that are about to be loaded: factors that another training has cut, or not yet cut."""
        cfg: AdaLoraConfig = self.peft_config[adapter_name]
        adapters = self._adapters(adapter_name)
        before = [(a, a.setting("r"), [(p, p.data) for p in (*factors(a), a[VALUES])]) for a in adapters]
        pattern, allocator = cfg.rank_pattern, self._allocators.get(adapter_name)

        def undo() -> None:
            for adapter, rank, parameters in before:
                for p, values in parameters:
                    replace(p, values)
                adapter.change("r", rank)
            cfg.rank_pattern = pattern
            if allocator is not None:
                self._allocators[adapter_name] = allocator

        ranks = {}
        for key, tensor in tensors.items():
            owner, _, slot = key.rpartition(".")
            if slot == VALUES and tensor.dim() == 2 and {f"{owner}.lora_A", f"{owner}.lora_B"} <= tensors.keys():
                ranks[in_base(owner)] = len(tensor)
        changed = False
        for adapter in adapters:
            rank, present = ranks.get(adapter.key), whole_shape(adapter[VALUES])[0]
            if rank is None or rank > cfg.init_r or rank == present == cfg.rank_of(adapter.key):
                continue
            changed = True
            if rank == present:  # others were pruned here, but only masked
                continue
            check_not_partitioned(
                adapter.parameters().items(),
                f"load {rank} ranks of {adapter.key}",
                "Load the adapter before deepspeed.initialize (Accelerator.prepare, Trainer.train).",
            )
            a, b = factors(adapter)
            for p, shape in ((a, (rank, a.shape[1])), (b, (b.shape[0], rank)), (adapter[VALUES], (rank, 1))):
                replace(p, p.new_empty(shape))
            adapter.change("r", rank)
        if changed:
            self._allocators.pop(adapter_name, None)
            kept = {f"{a.key}.{VALUES}": len(a[VALUES]) for a in adapters}
            full = all(n == cfg.init_r for n in kept.values())
            # which of the ranks were kept is history; how many is what readers of the file go by
            cfg.rank_pattern = None if full else {k: [i < n for i in range(cfg.init_r)] for k, n in kept.items()}
        return undo

    def after_load(self, adapter_name: str, find: Callable[[str], str | None]) -> None:
        """Go on with the schedule that was saved beside the adapter, if it was saved before its ranks were cut."""
        path = find(STATE_FILE)
        if path is not None:
            from peftfast.files.io import read_safetensors

            state = read_safetensors(path)
            if any(name.startswith("pruned.") for name in state):
                put_back(self._adapters(adapter_name), state)
                self._allocators.pop(adapter_name, None)
            allocator = self._allocator(adapter_name)
            allocator.load_state_dict(state)
            if allocator.finished:
                allocator.cfg.rank_pattern = allocator.rank_pattern()

    def save_beside(self, adapter_name: str, folder: str | os.PathLike) -> None:
        """Save the schedule beside the adapter, until its ranks are cut; then the file says everything."""
        path = Path(folder) / STATE_FILE
        state = self._allocator(adapter_name).beside_file() if adapter_name in self._allocators else {}
        if state:
            from peftfast.files.io import write_safetensors

            write_safetensors(path, {k: v.cpu().contiguous() for k, v in state.items()})
        elif path.is_file():
            path.unlink()

    # ---- state dicts ----------------------------------------------------------------------------------------------
    def _packed_schedules(self) -> dict[str, Tensor]:
        return {name: self._allocator(name).packed() for name in sorted(self.peft_config) if self._adapters(name)}

    def get_extra_state(self) -> Tensor:
        """The schedules of all adapters, one after the other.

        What saves a training as a model's and an optimizer's state dict (Lightning, Accelerate, torch's checkpoints, a
        search for a learning rate that starts anew afterwards) knows of no step that a schedule could be given, so the
        schedule has to be in there. Always of the same size, because torch.distributed.checkpoint reads into what the
        model has; and on a mesh where the factors are, because Accelerate takes all of a sharded model for that.
        """
        packed = self._packed_schedules()
        if not packed:
            return torch.empty(0)
        values, first = list(packed.values()), self._adapters(next(iter(packed)))[0]
        return as_copies(torch.cat([p.to(values[0].device) for p in values]), first[VALUES])

    #: By its name in the state dict, which Accelerate reads as an attribute.
    _extra_state = property(get_extra_state)

    def set_extra_state(self, state: Tensor) -> None:
        if state.is_meta:
            return
        state = put_together(state)
        now = self._packed_schedules()
        if len(state) != sum(map(len, now.values())):
            warn(
                "The state dict's AdaLoRA schedule belongs to other adapters or ranks; the schedule here is left as it "
                "is.",
                PeftWarning,
            )
            return
        for name, saved in zip(now, state.split([len(p) for p in now.values()]), strict=True):
            self._allocator(name).unpack(saved)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not any(self._adapters(name) for name in self.peft_config):
            del destination[f"{prefix}{_EXTRA_STATE_KEY_SUFFIX}"]

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}{_EXTRA_STATE_KEY_SUFFIX}"
        if key in missing_keys:  # PEFT's state dicts have no schedule
            missing_keys.remove(key)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_optimizer": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        _watch(self)
