"""Random operations on quantised layers with adapters; after every one outputs, and gradients of every step, are
compared with formulas in fp64 on the weight that the stored bytes stand for."""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantized.support import bnb_weight, clone, stored_bytes
from torch import Tensor, nn
from trust.operations import run_at_random

import peftfast
from peftfast.base.weight import quantizer
from peftfast.many.hotswap import hotswap_adapter

NAMES = ("default", "a", "b", "c")
LAYERS = ("q", "k", "dense")
ROWS = 6
#: What a 4-bit base may be beside its type.
FOUR_BIT = ({}, {"double_quant": True}, {"blocksize": 32}, {"blocksize": 128, "double_quant": True},
            {"quant_storage": torch.bfloat16})  # fmt: skip


class Side(nn.Module):
    """Layers that see the same input, so that no rounding in one shows in another."""

    def __init__(self, kind: str, options: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, n in zip(LAYERS, (48, 24, 32), strict=True):
            layer = nn.Linear(128, n)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(n, 128, generator=g) / 128**0.5)
                layer.bias.copy_(torch.randn(n, generator=g))
            if name != "dense":
                layer = quantizer(kind).module(layer.weight.data, layer.bias.data, **options)
            setattr(self, name, layer)
        self.is_loaded_in_8bit = kind == "int8"
        self.is_loaded_in_4bit = not self.is_loaded_in_8bit

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in LAYERS], dim=-1)


def weight_of(module: nn.Module) -> Tensor:
    """In fp64."""
    return (module.weight.detach() if type(module) is nn.Linear else bnb_weight(module)).double()


# ---- formulas: of a layer's input x, of what its base module gives, and of a weight ----------------------------------
def _lora(x: Tensor, y: Tensor, w: Tensor, bias: Tensor, t: Mapping[str, Any]) -> Tensor:
    return y + t["scale"] * x @ t["lora_A"].t() @ t["lora_B"].t()


def _adalora(x: Tensor, y: Tensor, w: Tensor, bias: Tensor, t: Mapping[str, Any]) -> Tensor:
    return y + t["scale"] / (t["ranknum"] + 1e-5) * (x @ (t["lora_A"] * t["lora_E"]).t()) @ t["lora_B"].t()


def _dora(x: Tensor, y: Tensor, w: Tensor, bias: Tensor, t: Mapping[str, Any]) -> Tensor:
    delta = t["scale"] * t["lora_B"] @ t["lora_A"]
    norm = torch.linalg.vector_norm(w + delta.detach(), dim=1)
    return t["lora_magnitude_vector"] / norm * (y - bias + x @ delta.t()) + bias


def _ia3(x: Tensor, y: Tensor, w: Tensor, bias: Tensor, t: Mapping[str, Any]) -> Tensor:
    return y * t["ia3_l"].flatten()


METHODS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "lora": (_lora, ("lora_A", "lora_B")),
    "dora": (_dora, ("lora_A", "lora_B", "lora_magnitude_vector")),
    "adalora": (_adalora, ("lora_A", "lora_B", "lora_E", "ranknum")),
    "ia3": (_ia3, ("ia3_l",)),
}


class Machine:
    """One model, its base as it was, and the operations; each returns whether it could be done now."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.folder, self.seed = random.Random(seed), folder, seed
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.method = self.chance.choice(list(METHODS))
        self.formula, self.slots = METHODS[self.method]
        self.kind = self.chance.choice(("nf4", "fp4", "int8"))
        self.options = {"threshold": self.chance.choice((0.0, 6.0))} if self.kind == "int8" else {
            "compute_dtype": self.chance.choice((torch.float32, torch.float32, torch.bfloat16)),
            **self.chance.choice(FOUR_BIT),
        }  # fmt: skip
        self.within = 2e-2 if self.options.get("compute_dtype") is torch.bfloat16 else 1e-5
        self.base = self.fresh()  # never adapted; while adapters are merged, what they are merged into
        self.model = peftfast.get_peft_model(self.fresh(), self.config()).eval()
        self.active, self.merged, self.enabled = ["default"], [], True
        self.give_values("default")

    def fresh(self) -> Side:
        return Side(self.kind, self.options, self.seed)

    def config(self) -> peftfast.PeftConfig:
        targets = self.chance.sample(LAYERS, self.chance.randrange(1, 4))
        if self.method == "ia3":
            inputs = [name for name in targets if name != "q"]
            return peftfast.IA3Config(target_modules=targets, feedforward_modules=inputs)
        if self.method == "adalora":
            return peftfast.AdaLoraConfig(
                init_r=self.chance.choice((2, 4)), target_r=2, lora_alpha=self.chance.choice((1, 4)),
                target_modules=targets, total_step=10**7, tinit=10**6,
            )  # fmt: skip
        return peftfast.LoraConfig(
            r=self.chance.choice((1, 2, 4)), lora_alpha=self.chance.choice((1, 4, 7)), target_modules=targets,
            use_rslora=self.chance.random() < 0.3, use_dora=self.method == "dora",
        )  # fmt: skip

    @torch.no_grad()
    def give_values(self, name: str) -> None:
        for key, parameter in self.model.named_parameters():
            if f".{name}" in key and any(slot in key for slot in self.slots) and "ranknum" not in key:
                parameter.add_(torch.randn(parameter.shape, generator=self.generator) * 0.3)

    def layer(self, name: str) -> nn.Module:
        return self.model.base_model.model.get_submodule(name)

    def tensors(self, layer: str, name: str) -> dict[str, Any] | None:
        """Of an adapter at a layer, its Parameters themselves; None where it is not."""
        module = self.layer(layer)
        if name not in getattr(module, "adapters", ()):
            return None
        held = {slot: getattr(module, slot)[name] for slot in self.slots}
        found = {slot: getattr(one, "weight", one) for slot, one in held.items()}
        if self.method != "ia3":
            found["scale"] = module.scaling[name]
        return found

    # ---- what the model must compute -------------------------------------------------------------------------------
    def expected(self, x: Tensor, names: Sequence[str], twins: dict[int, Tensor]) -> Tensor:
        """For x in fp64. Every Parameter that is used gets a twin in fp64, by its id."""
        return torch.cat([self.of_layer(layer, x, names, twins) for layer in LAYERS], dim=-1)

    def of_layer(self, layer: str, x: Tensor, names: Sequence[str], twins: dict[int, Tensor]) -> Tensor:
        module = self.base.get_submodule(layer)
        weight, bias = weight_of(module), module.bias.detach().double()

        def twin(t: Any) -> Any:
            return twins.setdefault(id(t), t.detach().double().requires_grad_()) if isinstance(t, Tensor) else t

        def product(x: Tensor) -> Tensor:
            return x @ weight.t() + bias

        def call(x: Tensor) -> Tensor:
            y = clone(module).train(self.model.training)(x.detach().float())
            return y.detach().double() + (x - x.detach()) @ weight.t()

        # what a module of 8 bits, or of another dtype inside, makes of an input is its own affair
        own = layer != "dense" and self.options.get("compute_dtype") is not torch.float32
        return self.through(layer, x, names, twin, call if own else product, weight, bias)

    def through(
        self,
        layer: str,
        x: Tensor,
        names: Sequence[str],
        twin: Callable[[Any], Any],
        base: Callable[[Tensor], Tensor],
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """What the adapters `names` make of x and of the output of `base`."""
        found = [self.tensors(layer, name) for name in names]
        active = [{k: twin(t) for k, t in one.items()} for one in found if one is not None]
        if self.method == "ia3" and layer != "q":
            for t in active:
                x = x * t["ia3_l"].flatten()
            return base(x)
        y = base(x)
        for t in active:
            y = self.formula(x, y, weight, bias, t)
        return y

    def close(self, found: Tensor, expected: Tensor, what: str) -> None:
        error = ((found.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()
        assert error < self.within, f"{what} {self.kind} {self.options} {self.method}: relative error {error:.2e}"

    def inputs(self) -> Tensor:
        shape = (ROWS, 128) if self.chance.random() < 0.5 else (ROWS, 2, 128)
        return torch.randn(shape, generator=self.generator)

    def in_force(self) -> list[str]:
        return self.active if self.enabled and not self.merged else []

    def compare(self) -> None:
        x = self.inputs()
        with torch.no_grad():
            self.close(self.model(x), self.expected(x.double(), self.in_force(), {}), "output")
            if not self.merged:
                with self.model.disable_adapter():
                    self.close(self.model(x), self.expected(x.double(), [], {}), "disabled")

    # ---- operations ------------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        present = sorted(self.model.peft_config)
        return self.chance.sample(present, self.chance.randrange(1, len(present) + 1))

    def free(self) -> str | None:
        return next((n for n in NAMES if n not in self.model.peft_config), None)

    def add(self) -> bool:
        name = self.free()
        if name is None or self.merged:
            return False
        self.model.add_adapter(name, self.config())
        self.give_values(name)
        return True

    def switch(self) -> bool:
        if self.merged:
            return False
        self.active = self.names()
        self.model.base_model.set_adapter(self.active)
        return True

    def toggle(self) -> bool:
        if self.merged:
            return False
        self.enabled = not self.enabled
        (self.model.enable_adapter_layers if self.enabled else self.model.disable_adapter_layers)()
        return True

    def delete(self) -> bool:
        if self.merged or len(self.model.peft_config) < 2:
            return False
        name = self.names()[0]
        self.model.delete_adapter(name)
        self.active = list(self.model.active_adapters)
        return True

    def train(self) -> bool:
        """A step of SGD, after the gradients have been compared."""
        if self.merged or not self.enabled:
            return False
        self.model.set_requires_grad(self.active, True)
        self.model.train()
        self.model.zero_grad()
        x, twins = self.inputs().requires_grad_(), {}
        exact = x.detach().double().requires_grad_()
        y = self.model(x)
        dy = torch.randn(y.shape, generator=self.generator)
        y.backward(dy)
        self.expected(exact, self.active, twins).backward(dy.double())
        self.close(x.grad, exact.grad, "gradient of the input")
        for name, p in self.model.named_parameters():
            if p.grad is not None or p.requires_grad and id(p) in twins:
                self.close(p.grad, twins[id(p)].grad, f"gradient of {name}")
                with torch.no_grad():
                    p -= 0.05 * p.grad / (1 + p.grad.norm())
        self.model.zero_grad()
        self.model.eval()
        return True

    def rows(self) -> bool:
        """An adapter for every row, with and without gradients."""
        if self.merged or not self.enabled:
            return False
        names = [self.chance.choice([*self.model.peft_config, "__base__"]) for _ in range(ROWS)]
        x = self.inputs()
        with torch.set_grad_enabled(self.chance.random() < 0.5):
            found = self.model(x, adapter_names=names)
        expected = [self.expected(x[[i]].double(), [n] if n != "__base__" else [], {}) for i, n in enumerate(names)]
        self.close(found.detach(), torch.cat(expected).detach(), "mixed batch")
        return True

    def merge(self) -> bool:
        if self.merged or not self.enabled:
            return False
        before = {layer: self.base.get_submodule(layer) for layer in LAYERS}
        self.model.merge_adapter(safe_merge=self.chance.random() < 0.5)
        self.merged, self.base = list(self.active), self.base_now()
        for layer, module in before.items():
            self.check_merged(layer, module, self.base.get_submodule(layer))
        return True

    def base_now(self) -> Side:
        now = copy.deepcopy(self.base)
        for name in LAYERS:
            module = self.layer(name)
            setattr(now, name, clone(getattr(module, "base_layer", module)))
        return now

    @torch.no_grad()
    def check_merged(self, name: str, old: nn.Module, new: nn.Module) -> None:
        """What is stored is what the exact sum is stored as; values on the edge between two codes may be either's."""
        weight, bias = self.merged_exactly(name, old)
        found, expected = weight_of(new), weight
        if name != "dense":
            options = {k: v for k, v in self.options.items() if k != "compute_dtype"}
            stored = quantizer(self.kind).module(weight.float(), None, **options)
            expected = weight_of(stored)
        # codes of the scales as well, where these are in codes
        least = 5e-2 if self.options.get("double_quant") else 1e-5
        off = ((found - expected).abs() > least * expected.abs().max()).sum().item()
        assert off <= 3, f"merging {self.kind} {self.options} {self.method}: {off} values of {name} differ"
        torch.testing.assert_close(new.bias.double(), bias, rtol=self.within, atol=self.within)

    @torch.no_grad()
    def merged_exactly(self, layer: str, old: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer, from what the formulas make of zero and of an identity."""
        weight, bias = weight_of(old), old.bias.double()
        zero, *made = self.through(
            layer,
            torch.cat([torch.zeros(1, 128), torch.eye(128)]).double(),
            self.active,
            lambda t: t.double() if isinstance(t, Tensor) else t,
            lambda x: x @ weight.t() + bias,
            weight,
            bias,
        )
        return (torch.stack(made) - zero).t(), zero

    def unmerge(self) -> bool:
        if not self.merged:
            return False
        self.model.unmerge_adapter()
        self.merged, self.base = [], self.fresh()
        for name in LAYERS:
            module = self.layer(name)
            module = getattr(module, "base_layer", module)
            for (key, now), (_, before) in zip(
                stored_bytes(module), stored_bytes(self.base.get_submodule(name)), strict=True
            ):
                # bitsandbytes itself casts a bias to what it computes in
                assert torch.equal(now, before) or key == "bias" and self.within > 1e-2, f"{key} of {name} changed"
        return True

    def unload(self) -> bool:
        """Of a copy: merged for good, merged into dense weights, or as it was."""
        if self.merged or not self.enabled:
            return False
        how, x = self.chance.choice(("merge", "dequantize", "unload")), self.inputs()
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            if how == "unload":
                self.close(twin.unload()(x), self.expected(x.double(), [], {}), "unloaded")
            elif how == "merge":
                whole = twin.merge_and_unload()
                for name in LAYERS:
                    self.check_merged(name, self.base.get_submodule(name), whole.get_submodule(name))
            else:
                whole = twin.merge_and_unload(dequantize=True)
                exact = [self.merged_exactly(name, self.base.get_submodule(name)) for name in LAYERS]
                expected = torch.cat([x.double() @ w.t() + b for w, b in exact], dim=-1)
                self.close(whole.to(x.dtype)(x), expected, "dequantised")
        return True

    def copies(self) -> bool:
        self.model = copy.deepcopy(self.model)
        if (
            not self.merged
        ):  # bitsandbytes' Parameters are plain ones in a pickle, and do not live through the next copy
            x = self.inputs()
            with torch.no_grad():
                assert torch.equal(pickle.loads(pickle.dumps(self.model))(x), self.model(x)), "pickled"
        return True

    def state(self) -> bool:
        """Tensors of an adapter out, noise on them, and in again."""
        if self.merged:
            return False
        name = self.names()[0]
        state = {k: v.clone() for k, v in peftfast.get_peft_model_state_dict(self.model, adapter_name=name).items()}
        x = self.inputs()
        with torch.no_grad():
            before = self.model(x)
            self.give_values(name)
            peftfast.set_peft_model_state_dict(self.model, state, adapter_name=name)
            assert torch.equal(self.model(x), before)
        return True

    def save_and_reload(self) -> bool:
        if self.merged:
            return False
        self.model.save_pretrained(self.folder)
        first, *rest = sorted(self.model.peft_config)
        where = {n: self.folder if n == "default" else self.folder / n for n in (first, *rest)}
        self.model = peftfast.PeftModel.from_pretrained(self.fresh(), where[first], adapter_name=first)
        for name in rest:
            self.model.load_adapter(where[name], name)
        self.model.base_model.set_adapter(self.active)
        self.model.eval()
        self.enabled = True
        return True

    def combine(self) -> bool:
        name, names = self.free(), self.names()
        if self.method != "lora" or name is None or self.merged:
            return False
        weights = [self.chance.choice((0.5, 1.0, -0.7)) for _ in names]
        self.model.base_model.add_weighted_adapter(names, weights, name, combination_type="cat")
        for layer in LAYERS:
            if (made := self.tensors(layer, name)) is not None:
                parts = [(w, self.tensors(layer, n)) for w, n in zip(weights, names, strict=True)]
                sums = sum(w * t["scale"] * t["lora_B"].double() @ t["lora_A"].double() for w, t in parts if t)
                self.close(made["scale"] * made["lora_B"].double() @ made["lora_A"].double(), sums, "combined")
        return True

    def hotswap(self) -> bool:
        """The numbers of another adapter of the same shapes."""
        if self.method != "lora" or self.merged:
            return False
        name = self.names()[0]
        cfg, folder = self.model.peft_config[name], Path(tempfile.mkdtemp(dir=self.folder))
        other = peftfast.get_peft_model(self.fresh(), copy.deepcopy(cfg), adapter_name="default")
        with torch.no_grad():
            for p in other.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=self.generator) * 0.3)
        other.save_pretrained(folder)
        hotswap_adapter(self.model, folder, name)
        values = peftfast.get_peft_model_state_dict(other)
        found = peftfast.get_peft_model_state_dict(self.model, adapter_name=name)
        assert values.keys() == found.keys() and all(torch.equal(t, found[k]) for k, t in values.items())
        return True


OPERATIONS = ("add", "add", "switch", "switch", "toggle", "delete", "train", "train", "rows", "merge", "unmerge",
              "unload", "copies", "state", "save_and_reload", "combine", "hotswap")  # fmt: skip


run = partial(run_at_random, Machine, OPERATIONS, length=20)
