"""What other code may do to a model between two calls, at random, to a model here and to one in PEFT that holds the
same numbers: outputs and gradients stay the same, whatever a layer remembers of the call before."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.utils import parametrize
from trust.operations import run_at_random

import peftfast
from peftfast.ops import composed

LEAVES = ("first", "second", "third")
KINDS = {"lora": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}
SMALL = dict(composed.SMALL)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Machine:
    """A model of each library, and the mutations; each returns whether it could be done now."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = self.chance.choice(list(KINDS))
        composed.SMALL = self.chance.choice(({}, SMALL))  # both ways of computing
        self.hooks: list[list[Any]] = []
        self.disabled = False
        self.models = []
        for library in (peftfast, peft):
            torch.manual_seed(seed)
            model = library.get_peft_model(Net().double(), self.config(library))
            model.add_adapter("other", self.config(library))
            self.models.append(model.eval())
        theirs = dict(self.models[1].named_parameters())
        with torch.no_grad():
            for name, parameter in self.models[0].named_parameters():
                if "lora_" in name:
                    theirs[name].add_(self.random(parameter.shape))
                    parameter.copy_(theirs[name])

    def config(self, library: Any) -> Any:
        return library.LoraConfig(r=4, target_modules=list(LEAVES), **KINDS[self.kind])

    def random(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * 0.3

    def each(self, call: Callable[[nn.Module], Any]) -> list[Any]:
        """`call` with the same layer of both models, which sees the same random numbers."""
        leaf, state, found = self.chance.choice(LEAVES), self.generator.get_state(), []
        for model in self.models:
            self.generator.set_state(state)
            found.append(call(model.base_model.model.get_submodule(leaf)))
        return found

    def module(self) -> Callable[[nn.Module], nn.Module]:
        """One of a layer's modules."""
        name, what = self.name(), self.chance.choice(("base", "lora_A", "lora_B", "lora_dropout"))
        return lambda layer: layer.base_layer if what == "base" else getattr(layer, what)[name]

    def name(self) -> str:
        return self.chance.choice(("default", "other"))

    # ---- mutations -------------------------------------------------------------------------------------------------
    def weight(self) -> bool:
        which, how = self.module(), self.chance.choice(("new", "data", "written", "written through data"))

        def change(layer: nn.Module) -> None:
            module = which(layer)
            if not hasattr(module, "weight") or parametrize.is_parametrized(module):
                return
            new, old = self.random(module.weight.shape), module.weight
            if how == "new":
                module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
            elif how == "data":
                old.data = new
            else:
                (old.detach() if how == "written" else old.data).copy_(new)

        self.each(change)
        return True

    def rank(self) -> bool:
        name, r = self.name(), self.chance.choice((1, 2, 6))

        def change(layer: nn.Module) -> None:
            a, b = layer.lora_A[name], layer.lora_B[name]
            if a.bias is None and not (parametrize.is_parametrized(a) or parametrize.is_parametrized(b)):
                a.weight.data = self.random((r, layer.in_features))
                b.weight.data = self.random((layer.out_features, r))

        self.each(change)
        return True

    def replaced(self) -> bool:
        name, slot, bias = self.name(), self.chance.choice(("lora_A", "lora_B")), self.chance.random() < 0.3
        kind, whole = self.chance.choice((nn.Linear, Shifted)), self.chance.random() < 0.3
        bias = bias or self.kind == "bias" and slot == "lora_B"

        def change(layer: nn.Module) -> None:
            held = getattr(layer, slot)
            old = held[name]
            new = kind(*reversed(old.weight.shape), bias=bias).double()
            with torch.no_grad():
                for parameter in new.parameters():
                    parameter.copy_(self.random(parameter.shape))
            new.requires_grad_(any(p.requires_grad for p in old.parameters()))
            if whole:
                setattr(layer, slot, nn.ModuleDict({**held, name: new}))
            else:
                held[name] = new

        self.each(change)
        return True

    def base(self) -> bool:
        kind = self.chance.choice((nn.Linear, Shifted))

        def change(layer: nn.Module) -> None:
            new = kind(layer.in_features, layer.out_features).double().requires_grad_(False)
            for parameter in new.parameters():
                parameter.copy_(self.random(parameter.shape))
            layer.base_layer = new

        self.each(change)
        return True

    def scaling(self) -> bool:
        name, value = self.name(), self.chance.choice((0.0, 0.5, -2.0))
        how = self.chance.choice(("item", "dict", "tensor"))

        def change(layer: nn.Module) -> None:
            if how == "dict":
                layer.scaling = {**layer.scaling, name: value}
            else:
                layer.scaling[name] = value if how == "item" else torch.tensor(value, dtype=torch.float64)

        self.each(change)
        return True

    def dropout(self) -> bool:
        name, make = self.name(), self.chance.choice((nn.Identity, nn.Dropout, lambda: nn.Hardtanh(-0.5, 0.5)))
        self.each(lambda layer: layer.lora_dropout.update({name: make().eval()}))
        return True

    def hook(self) -> bool:
        which, register = self.module(), self.chance.choice(("forward_pre", "forward", "full_backward"))

        def change(layer: nn.Module) -> Any:
            module = which(layer)
            if register == "forward_pre":
                return module.register_forward_pre_hook(lambda m, args: (args[0] * 1.1,))
            if register == "forward":
                return module.register_forward_hook(lambda m, args, out: out * 1.2)
            return module.register_full_backward_hook(lambda m, dx, dy: tuple(None if g is None else g / 2 for g in dx))

        self.hooks.append(self.each(change))
        return True

    def unhook(self) -> bool:
        for handle in self.hooks.pop() if self.hooks else ():
            handle.remove()
        return True

    def patched(self) -> bool:
        which = self.module()

        def change(layer: nn.Module) -> None:
            module = which(layer)
            if "forward" in module.__dict__:
                del module.forward
            else:
                module.forward = lambda x, own=module.forward: own(x) * 1.5

        self.each(change)
        return True

    def parametrised(self) -> bool:
        which = self.module()

        def change(layer: nn.Module) -> None:
            module = which(layer)
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight")
            elif hasattr(module, "weight"):
                parametrize.register_parametrization(module, "weight", Halved())

        self.each(change)
        return True

    def trained(self) -> bool:
        which, flag = self.module(), self.chance.random() < 0.5
        self.each(lambda layer: which(layer).requires_grad_(flag))
        return True

    def switch(self) -> bool:
        name = self.name()
        for model in self.models:
            model.set_adapter(name)
        return True

    def toggle(self) -> bool:
        self.disabled = not self.disabled
        for model in self.models:
            (model.disable_adapter_layers if self.disabled else model.enable_adapter_layers)()
        return True

    # ---- comparing -------------------------------------------------------------------------------------------------
    def compare(self) -> None:
        """Twice: a call may change what the next one finds."""
        for _ in range(2):
            x = self.random(self.chance.choice(((3, 16), (2, 3, 16))))
            how = self.chance.choice(("gradients", "gradients", "no gradients", "inference", "called", "forward mode"))
            if how == "forward mode" and self.hooks:
                how = "no gradients"
            ours, theirs = (self.results(model, x, how) for model in self.models)
            assert ours.keys() == theirs.keys(), f"{how}: only in one {sorted(ours.keys() ^ theirs.keys())}"
            for name, tensor in theirs.items():
                error = ((ours[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)).item()
                assert error < 1e-9, f"{self.kind}, {how}, {name}: relative error {error:.2e}"

    def results(self, model: nn.Module, x: Tensor, how: str) -> dict[str, Tensor]:
        if how == "gradients":
            model.zero_grad()
            x = x.clone().requires_grad_()
            y = model(x)
            y.square().sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return {"y": y.detach(), "x": x.grad, **grads}
        if how == "forward mode":
            return {"y": jvp(model, (x,), (x,))[1].detach()}
        with torch.inference_mode() if how == "inference" else torch.no_grad():
            if how == "called":
                return {"y": functional_call(model, {n: p * 0.9 for n, p in model.named_parameters()}, (x,))}
            return {"y": model(x).clone()}


MUTATIONS = ("weight", "weight", "rank", "replaced", "base", "scaling", "dropout", "hook", "unhook", "unhook",
             "patched", "parametrised", "trained", "switch", "toggle")  # fmt: skip


def run(count: int, seed: int) -> tuple[int, list[str]]:
    try:
        return run_at_random(Machine, MUTATIONS, count, seed, length=12)
    finally:
        composed.SMALL = SMALL
