"""The training loop: steps, evaluation, saving, stopping on a signal, continuing where a run was left."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from peftfast.cli import UserError
from peftfast.cli._data import IGNORED, Row, batch_of_step, collate
from peftfast.cli._settings import STATE_FILE
from peftfast.cli._setup import writing
from peftfast.files.atomic import write_atomically
from peftfast.files.state import adapter_entries

WARMUP = 0.05  # share of the steps
CLIP = 1.0


@dataclass
class Run:
    """One training run: what is trained, on what, and how far it has come."""

    model: torch.nn.Module
    rows: Sequence[Row]
    pad: int
    settings: dict[str, Any]
    digest: str
    folder: Path
    step: int = 0
    stopped_by: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    @property
    def device(self) -> str:
        return self.settings["device"]

    def __post_init__(self) -> None:
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        own = {entry.live for name in self.model.peft_config for entry in adapter_entries(self.model, name)}
        # some adapters learn in buffers as well
        self.changing = {**self.trainable, **{n: b for n, b in self.model.named_buffers() if n in own}}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=self.settings["lr"], weight_decay=0.0)
        # Only fp16 has so small a range that gradients vanish without a scale.
        self.scaler = torch.amp.GradScaler(self.device.split(":")[0], enabled=self.settings["dtype"] == "fp16")

    # ---- training ----------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Steps until done or stopped by a signal, which is heeded between two steps."""
        total = self.settings["steps"]
        every = self.settings["save_every"]
        self.model.train()
        synchronize(self.device)
        with self.stop_on_signal(), self.progress(total) as bar:
            while self.step < total and self.stopped_by is None:
                started = time.perf_counter()
                loss = self.one_step()
                synchronize(self.device)
                self.seconds += time.perf_counter() - started
                self.step += 1
                bar.update(1)
                bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens / self.seconds:,.0f} tokens/s", refresh=False)
                if bar.disable and (self.step % max(1, total // 10) == 0 or self.step == total):
                    print(
                        f"  step {self.step}/{total}  loss {loss:.3f}  {self.tokens / self.seconds:,.0f} tokens/s",
                        flush=True,
                    )
                if every and self.step % every == 0 and self.step < total:
                    self.save()

    def one_step(self) -> float:
        rows = batch_of_step(self.rows, self.step, self.settings["batch_size"], self.settings["seed"])
        batch = collate(rows, self.pad, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * self.schedule()
        loss = self.model(**batch).loss
        if not math.isfinite(value := loss.item()):
            raise UserError(
                f"the loss became {value} at step {self.step + 1}; lower --lr (now {self.settings['lr']:g}) or use "
                f"another --dtype (now {self.settings['dtype']})",
                exit_code=1,
            )
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trainable.values(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += sum(len(r.ids) for r in rows)
        return value

    def schedule(self) -> float:
        """Linear up, then linear down to zero."""
        total = self.settings["steps"]
        warmup = max(1, round(total * WARMUP))
        return min((self.step + 1) / warmup, (total - self.step) / max(1, total - warmup))

    def progress(self, total: int) -> tqdm:
        # Without a terminal a bar is noise: lines instead (see train).
        return tqdm(
            total=total, initial=self.step, desc="  training", unit="step", ascii=True, disable=None, file=sys.stderr
        )

    @contextlib.contextmanager
    def stop_on_signal(self) -> Iterator[None]:
        """Ctrl-C or SIGTERM: finish the step, then stop. A second Ctrl-C stops at once."""

        def stop(number: int, frame: Any) -> None:
            self.stopped_by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            signal.signal(signal.SIGINT, signal.default_int_handler)

        previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # Ignored means that whoever started us wanted it ignored (nohup, a shell's background job); and only the
            # main thread may set handlers.
            with contextlib.suppress(ValueError):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ---- state -------------------------------------------------------------------------------------------------------
    def save(self) -> None:
        """The adapter, and beside it what a continuation needs. The state holds the adapter's weights as well, so that
        a run killed between the two files continues from one moment in time."""
        state = {
            "settings": self.settings,
            "data": self.digest,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "weights": {n: p.detach().cpu() for n, p in self.changing.items()},
            "schedule": self.schedule_of_ranks(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_device": random_numbers(self.device),
            "random_own": {n: m.random_state() for n, m in self.samplers()},
        }
        with writing(self.folder):
            self.model.save_pretrained(self.folder)
            write_atomically(self.folder / STATE_FILE, lambda path: torch.save(state, path))

    def schedule_of_ranks(self) -> torch.Tensor | None:
        tuner = self.model.base_model
        return tuner.get_extra_state() if type(tuner).get_extra_state is not torch.nn.Module.get_extra_state else None

    def samplers(self) -> list[tuple[str, Any]]:
        """The adapters' modules that have drawn random numbers for steps to come."""
        return [(n, m) for n, m in self.model.named_modules() if hasattr(type(m), "random_state")]

    def release(self) -> None:
        """Let go of everything large; what was counted stays."""
        del self.model, self.trainable, self.changing, self.optimizer

    def restore(self, state: dict[str, Any]) -> None:
        if state["data"] != self.digest:
            raise UserError(
                f"--resume: --data {self.settings['data']!r} no longer holds what the saved run was trained on"
            )
        if state["weights"].keys() != self.changing.keys():
            raise UserError(f"--resume: {STATE_FILE} was saved for other parameters than this model trains")
        with torch.no_grad():
            for name, p in self.changing.items():
                if state["weights"][name].shape != p.shape:
                    raise UserError(
                        f"--resume: {name} has shape {list(state['weights'][name].shape)} in {STATE_FILE}, "
                        f"{list(p.shape)} in the model"
                    )
                p.copy_(state["weights"][name])
        if state["schedule"] is not None:
            self.model.base_model.set_extra_state(state["schedule"])
        for name, sampler in self.samplers():
            sampler.set_random_state(state["random_own"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        torch.set_rng_state(state["random"])
        set_random_numbers(self.device, state["random_device"])


def load_state(folder: Path) -> dict[str, Any]:
    try:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        return {**state, "settings": dict(state["settings"])}
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise UserError(f"--resume: {str(folder / STATE_FILE)!r} cannot be read: {error}") from None


@torch.no_grad()
def evaluate(model: torch.nn.Module, rows: Sequence[Row], pad: int, batch_size: int, device: str) -> float:
    """Mean loss per predicted token, in nats: of the same tokens for every model.

    A model's own loss may hold more: what a method adds to train by (AdaLoRA), and the first tokens of rows, which
    virtual tokens come before.
    """
    model.eval()
    total = count = 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad, device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def random_numbers(device: str) -> tuple[str, torch.Tensor] | None:
    """The type of a device and where its own random numbers are; None for the CPU, whose are torch's."""
    if device == "cpu":
        return None
    return torch.device(device).type, torch.get_device_module(device).get_rng_state(device)


def set_random_numbers(device: str, kept: tuple[str, torch.Tensor] | None) -> None:
    """Go on where they were, on a device of the type that they are of."""
    if kept is not None and kept[0] == torch.device(device).type:
        torch.get_device_module(device).set_rng_state(kept[1], device)


def synchronize(device: str) -> None:
    """Wait for the device, so that the clock measures work and not its queue."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))
