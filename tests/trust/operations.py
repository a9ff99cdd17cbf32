"""Random operations on a model with adapters, compared after every one with a plain-torch model that knows nothing of
wrappers: base weights, and factors by adapter and layer, in fp64."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trust.attacks import base, quiet

import peftfast

TARGETS = ("q_proj", "v_proj", "down_proj")
NAMES = ("default", "a", "b", "c")


class Plain:
    """What the model must compute.

    Attributes:
        adapters: name -> layer -> [A, B, scaling].
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model  # weights only
        self.adapters: dict[str, dict[str, list]] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True

    def effective(self) -> list[str]:
        return self.merged if self.merged else self.active

    def logits(self, names: list[str]) -> torch.Tensor:
        def linear(path: str, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            y = x @ module.weight.t() + module.bias
            for name in names:
                if path in self.adapters[name]:
                    a, b, scale = self.adapters[name][path]
                    y = y + scale * (x @ a.t() @ b.t())
            return y

        x = self.model.embed_tokens.weight[base.inputs()]
        for i, block in enumerate(self.model.body.layers):
            q, v, d = (f"body.layers.{i}.{t}" for t in TARGETS)
            x = x + linear(d, block.down_proj, torch.tanh(linear(q, block.q_proj, x)) * linear(v, block.v_proj, x))
        return x @ self.model.head.weight.t() + self.model.head.bias


def _step(gradient: torch.Tensor) -> torch.Tensor:
    """An SGD step of bounded length: with several adapters at once a plain one diverges, in both models."""
    return 0.1 * gradient / (1 + gradient.norm())


class Machine:
    """One model, its plain twin, and the operations."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.folder = random.Random(seed), folder
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.plain = Plain(base.Tiny().double())
        self.model = peftfast.get_peft_model(base.Tiny().double(), self.config()).eval()
        self.remember("default")
        self.plain.active = ["default"]

    def config(self) -> peftfast.LoraConfig:
        targets = self.chance.sample(TARGETS, self.chance.randrange(1, 4))
        return peftfast.LoraConfig(
            r=self.chance.choice((1, 2, 4)), lora_alpha=self.chance.choice((1, 4, 7)), target_modules=targets,
            use_rslora=self.chance.random() < 0.3, init_lora_weights=self.chance.choice((True, "gaussian", False)),
            rank_pattern=self.chance.choice(({}, {"q_proj": 3})), alpha_pattern=self.chance.choice(({}, {"v_proj": 5})),
        )  # fmt: skip

    def remember(self, name: str) -> None:
        """Give a new adapter values, in both models."""
        cfg, twin = self.model.peft_config[name], {}
        for path, layer in self.model.base_model.inventory.layers.items():
            if name not in layer.adapters:
                continue
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            with torch.no_grad():
                for p in (a, b):
                    p.copy_(torch.randn(p.shape, generator=self.generator, dtype=p.dtype) * 0.3)
            leaf = path.rpartition(".")[2]
            rank = {"q_proj": 3}[leaf] if leaf in cfg.rank_pattern else cfg.r
            alpha = cfg.alpha_pattern.get(leaf, cfg.lora_alpha)
            twin[path] = [a.detach().clone(), b.detach().clone(), alpha / (rank**0.5 if cfg.use_rslora else rank)]
        self.plain.adapters[name] = twin

    # ---- operations: each returns whether it could be done now -----------------------------------------------------
    def add(self) -> bool:
        free = [n for n in NAMES if n not in self.plain.adapters]
        if not free:
            return False
        self.model.add_adapter(free[0], self.config())
        self.remember(free[0])
        return True

    def switch(self) -> bool:
        names = self.chance.sample(sorted(self.plain.adapters), self.chance.randrange(1, len(self.plain.adapters) + 1))
        self.model.base_model.set_adapter(names if len(names) > 1 else names[0])
        self.plain.active, self.plain.merged = names, []
        return True

    def train(self) -> bool:
        """One SGD step on the active adapters, the twin with autograd of its own."""
        p = self.plain
        if p.merged or not p.active or not p.enabled:
            return False
        self.model.set_requires_grad(p.active, True)
        self.model.train()
        self.model.zero_grad()
        target = torch.randn(2, 6, base.VOCABULARY, generator=self.generator, dtype=torch.float64)
        (self.model(base.inputs()) - target).square().mean().backward()
        leaves = [t.requires_grad_() for n in p.active for entry in p.adapters[n].values() for t in entry[:2]]
        gradients = torch.autograd.grad((p.logits(p.active) - target).square().mean(), leaves)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.requires_grad_(False)
                leaf -= _step(gradient)
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= _step(parameter.grad)
        self.model.zero_grad()
        self.model.eval()
        return True

    def merge(self) -> bool:
        if self.plain.merged or not self.plain.active:
            return False
        self.model.base_model.merge_adapter(safe_merge=self.chance.random() < 0.5)
        self.plain.merged = list(self.plain.active)
        return True

    def unmerge(self) -> bool:
        if not self.plain.merged:
            return False
        self.model.base_model.unmerge_adapter()
        self.plain.merged = []
        own = dict(self.plain.model.named_parameters())
        for path, layer in self.model.base_model.inventory.layers.items():
            assert torch.equal(layer.base_layer.weight, own[f"{path}.weight"]), f"unmerging changed {path}"
        return True

    def toggle(self) -> bool:
        if self.plain.merged:
            return False
        self.plain.enabled = not self.plain.enabled
        (self.model.enable_adapter_layers if self.plain.enabled else self.model.disable_adapter_layers)()
        return True

    def delete(self) -> bool:
        if len(self.plain.adapters) < 2:
            return False
        name = self.chance.choice(sorted(self.plain.adapters))
        if name in self.plain.merged:
            return False
        self.model.delete_adapter(name)
        del self.plain.adapters[name]
        self.plain.active = [n for n in self.plain.active if n != name] or [min(self.plain.adapters)]
        return True

    def scale(self) -> bool:
        if self.plain.merged:
            return False
        name = self.chance.choice(sorted(self.plain.adapters))
        for path, layer in self.model.base_model.inventory.layers.items():
            if name in layer.adapters and self.plain.adapters[name][path][2]:
                layer.scaling[name] *= 2.0 if self.chance.random() < 0.5 else 0.5
                layer.set_scale(name, 1.0)  # back to what the config says
        return True

    def save_and_reload(self) -> bool:
        """Everything to disk, onto a fresh base."""
        if self.plain.merged:
            return False
        self.model.save_pretrained(self.folder)
        names = sorted(self.plain.adapters)
        where = {n: self.folder if n == "default" else self.folder / n for n in names}
        first, *rest = names
        self.model = peftfast.PeftModel.from_pretrained(base.Tiny().double(), where[first], adapter_name=first)
        for name in rest:
            self.model.load_adapter(where[name], name)
        active = [n for n in self.plain.active if n in names]
        self.model.base_model.set_adapter(active if len(active) > 1 else active[0])
        self.plain.enabled = True
        self.model.eval()
        return True

    def load_again(self) -> bool:
        """The weights on disk over those in the model."""
        if self.plain.merged:
            return False
        name = self.chance.choice(sorted(self.plain.adapters))
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        with torch.no_grad():
            for layer in self.model.base_model.inventory.layers.values():
                if name in layer.adapters:
                    layer.lora_B[name].weight.zero_()
        self.model.load_adapter(self.folder if name == "default" else self.folder / name, name)
        return True

    def refused(self) -> bool:
        """What cannot be done is refused and changes nothing (which the comparison after it sees)."""
        name = next(iter(self.plain.adapters))
        attempt = self.chance.choice((
            lambda: self.model.add_adapter(name, self.config()),
            lambda: self.model.set_adapter("nobody"),
            lambda: self.model.delete_adapter("nobody"),
            lambda: self.model.add_adapter("d", peftfast.LoraConfig(target_modules=["nothing"])),
            lambda: self.model.load_adapter(self.folder / "missing", "d"),
            lambda: self.model.add_adapter("d", peftfast.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        ))  # fmt: skip
        try:
            attempt()
        except (ValueError, peftfast.PeftError, OSError):
            return True
        raise AssertionError("a wrong operation was not refused")

    def compare(self) -> None:
        p = self.plain
        if not p.enabled:
            p.merged = []  # as in PEFT: a forward with adapters disabled takes out what is merged, and it stays out
        names = p.effective() if p.enabled else []
        with torch.no_grad():
            found = self.model(base.inputs())
        expected = p.logits(names)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-10, f"relative error {error:.2e} with {names}"
        inside = {n for layer in self.model.base_model.inventory.layers.values() for n in layer.merged_adapters}
        assert inside == {n for n in p.merged if p.adapters[n]}, f"{inside} merged, expected {p.merged}"
        assert expected.isfinite().all(), "the comparison would say nothing"
        assert sorted(self.model.peft_config) == sorted(p.adapters)
        assert sorted(self.model.base_model.active_adapters) == sorted(p.active)
        if not p.merged:
            with torch.no_grad(), self.model.disable_adapter():
                assert torch.allclose(self.model(base.inputs()), p.logits([]), rtol=1e-10, atol=1e-10)


OPERATIONS = ("add", "switch", "train", "train", "merge", "unmerge", "toggle", "delete", "scale", "save_and_reload",
              "load_again", "refused")  # fmt: skip


def run_at_random(
    make: Callable[[int, Path], Any], operations: Sequence[str], count: int, seed: int, length: int
) -> tuple[int, list[str]]:
    """`count` of the operations, in runs of `length`, each on what `make` gives for a seed and a folder. An operation
    says whether it could be done; after each that was, `compare` is called. Gives (operations done, failures)."""
    done, failures, number = 0, [], 0
    while done < count and len(failures) < 20:
        history: list[str] = []
        name = "starting"
        with quiet(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as root:
            try:
                machine = make(seed * 1_000_003 + number, Path(root))
                machine.compare()
                while len(history) < min(length, count - done):
                    name = machine.chance.choice(operations)
                    if getattr(machine, name)():
                        history.append(name)
                        machine.compare()
            except Exception as e:
                failures.append(f"run {number}: {type(e).__name__}: {e} after {' '.join([*history, name])}")
        done, number = done + max(len(history), 1), number + 1
    return done, failures


run = partial(run_at_random, Machine, OPERATIONS, length=50)
