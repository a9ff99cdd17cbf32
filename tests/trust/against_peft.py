"""Random configs and operations, done to a model here and to one in PEFT that holds the same numbers: after every one
names, what trains, which adapters are active, outputs and gradients are the same, and so are files.

What `interop/DIFFERENCES.md` says is different from PEFT is kept out of the configs and operations, or done where it
does not show.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from trust.operations import run_at_random

import peftfast

LIBRARIES = (peftfast, peft)
NAMES = ("default", "a", "b", "c")
KINDS = ("cat", "linear", "svd", "ties", "magnitude_prune", "ties_svd")
#: Base models: linear modules, which some IA3 adapters scale the input of, and what only LoRA adapts.
BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, bool], tuple[str, ...]]] = {
    "llama": (
        partial(oracle.llama, bias=True),
        {"q_proj": False, "o_proj": True, "up_proj": False, "down_proj": True},
        ("embed_tokens",),
    ),
    "gpt2": (oracle.gpt2, {"c_attn": False, "c_fc": True}, ()),
    "net": (oracle.net, {"linear": False, "head": True}, ("conv1", "conv2", "embed")),
}


def _state(model: nn.Module, of: Callable[[nn.Parameter], Any]) -> dict[str, Any]:
    return {n: of(p) for n, p in model.named_parameters()}


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str, within: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys(), f"{what}: only in one {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, tensor in theirs.items():
        close = partial(torch.testing.assert_close, ours[name], tensor, rtol=within, atol=within)
        close(msg=lambda message, name=name: f"{what} {name}: {message}")


class Pair:
    """A model of each library, and the operations; each returns whether it could be done now."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance, self.folder = random.Random(seed), folder
        self.generator = torch.Generator().manual_seed(seed)
        self.base = self.chance.choice(list(BASES))
        self.method = self.chance.choice(("LoraConfig", "LoraConfig", "LoraConfig", "IA3Config"))
        self.saved: dict[str, tuple[Path, Path]] = {}  # adapter -> its folders, of each library
        self.merged = self.disabled = False
        fields = self.fields()
        self.models = [lib.get_peft_model(self.fresh(), self.config(lib, fields)).eval() for lib in LIBRARIES]
        self.give_values("default")

    def fresh(self) -> nn.Module:
        return BASES[self.base][0]().double()

    def config(self, library: Any, fields: dict[str, Any]) -> Any:
        return getattr(library, self.method)(**copy.deepcopy(fields))

    def fields(self) -> dict[str, Any]:
        chance, (_, linear, others) = self.chance, BASES[self.base]
        targets = chance.sample(list(linear), chance.randrange(1, len(linear) + 1))
        if self.method == "IA3Config":
            return {"target_modules": targets, "feedforward_modules": [t for t in targets if linear[t]]}
        leaf = chance.choice(targets)
        fields = {
            "r": chance.choice((1, 2, 4)), "lora_alpha": chance.choice((1, 4, 7)),
            "target_modules": [*targets, *chance.sample(others, chance.randrange(len(others) + 1))],
            "use_rslora": chance.random() < 0.2, "init_lora_weights": chance.choice((True, False, "gaussian")),
            "rank_pattern": chance.choice(({}, {}, {leaf: 3}, {rf"^.*\.1\..*{leaf}": 5, leaf: 2})),
            "alpha_pattern": chance.choice(({}, {}, {leaf: 5}, {rf".*\.0\..*{leaf}": 2})),
        }  # fmt: skip
        more = chance.choice(({}, {}, {"use_dora": True}, {"lora_bias": True}))
        if "lora_bias" in more:  # there is none on tables of rows
            more = {"lora_bias": True, "init_lora_weights": False, "target_modules": targets}
        if chance.random() < 0.2 and self.base != "net":
            more = {**more, "layers_to_transform": chance.choice((0, [1])), "target_modules": targets}
        return {**fields, **more}

    def give_values(self, name: str) -> None:
        """Every tensor of an adapter the same random values in both models."""
        theirs = dict(self.models[1].named_parameters())
        with torch.no_grad():
            for key, parameter in self.models[0].named_parameters():
                if f".{name}" in key and ("lora_" in key or "ia3_" in key):
                    change = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float64)
                    parameter.add_(change * 0.2)
                    theirs[key].copy_(parameter)

    def both(self, call: Callable[[int, nn.Module], Any]) -> list[Any]:
        return [call(i, model) for i, model in enumerate(self.models)]

    @torch.no_grad()
    def settle(self, what: str) -> None:
        """Go on with our numbers in both, where PEFT's are right to fp32 or so."""
        _same(*[{"output": x} for x in self.both(lambda i, m: oracle.logits(m))], what, within=1e-4)
        oracle.copy_parameters(*self.models)

    def names(self) -> list[str]:
        present = sorted(self.models[1].peft_config)
        return self.chance.sample(present, self.chance.randrange(1, len(present) + 1))

    def any_field(self, *fields: str) -> bool:
        return any(getattr(cfg, f, None) for cfg in self.models[1].peft_config.values() for f in fields)

    # ---- operations ------------------------------------------------------------------------------------------------
    def add(self) -> bool:
        free = [n for n in NAMES if n not in self.models[1].peft_config]
        if not free or self.merged or self.disabled:
            return False
        fields = self.fields()
        self.both(lambda i, m: m.add_adapter(free[0], self.config(LIBRARIES[i], fields)))
        self.give_values(free[0])
        return True

    def switch(self) -> bool:
        if self.merged:
            return False
        names, inference = self.names(), self.chance.random() < 0.2
        self.both(lambda i, m: m.base_model.set_adapter(names, inference_mode=inference))
        return True

    def delete(self) -> bool:
        if self.merged or self.disabled or len(self.models[1].peft_config) < 2:
            return False
        name = self.names()[0]
        self.both(lambda i, m: m.delete_adapter(name))
        active = self.models[0].active_adapter
        self.both(lambda i, m: m.set_adapter(active))  # PEFT's layers choose each for itself
        return True

    def toggle(self) -> bool:
        if self.merged:
            return False
        self.disabled = not self.disabled
        call = "disable_adapter_layers" if self.disabled else "enable_adapter_layers"
        self.both(lambda i, m: getattr(m.base_model, call)())
        return True

    def switch_inside(self) -> bool:
        """While all adapters are off."""
        if self.merged or self.disabled:
            return False
        name = self.names()[0]

        def call(i: int, model: nn.Module) -> None:
            with model.disable_adapter():
                model.set_adapter(name)

        self.both(call)
        return True

    def merge(self) -> bool:
        if self.merged or self.disabled:
            return False
        safe = self.chance.random() < 0.5
        self.both(lambda i, m: m.merge_adapter(safe_merge=safe))
        _same(*[_state(m, nn.Parameter.detach) for m in self.models], "merged")
        self.merged = any(layer.merged for layer in self.models[0].base_model.inventory.layers.values())
        return True

    def unmerge(self) -> bool:
        self.both(lambda i, m: m.unmerge_adapter())
        self.settle("unmerged")
        self.merged = False
        return True

    def unload(self) -> bool:
        merged = self.both(lambda i, m: copy.deepcopy(m).merge_and_unload())
        _same(*[_state(m, nn.Parameter.detach) for m in merged], "merged for good")
        return True

    def step(self) -> bool:
        if self.merged or self.disabled or not any(p.requires_grad for p in self.models[1].parameters()):
            return False
        self.both(lambda i, m: (m.zero_grad(), oracle.logits(m).square().mean().backward()))
        _same(*[{n: g for n, g in _state(m, lambda p: p.grad).items() if g is not None} for m in self.models], "grad")
        with torch.no_grad():
            for parameter in [p for m in self.models for p in m.parameters() if p.grad is not None]:
                parameter -= 0.1 * parameter.grad / (1 + parameter.grad.norm())
        return True

    def mix(self) -> bool:
        if self.merged or self.disabled or self.any_field("use_dora") or self.method == "IA3Config":
            return False  # PEFT refuses these, or leaves IA3's layers as they are
        names = [self.chance.choice([*self.models[1].peft_config, "__base__"]) for _ in range(2)]
        with torch.no_grad():
            _same(*[{"out": x} for x in self.both(lambda i, m: oracle.logits(m, adapter_names=names))], "mixed")
        return True

    def combine(self) -> bool:
        free = [n for n in NAMES if n not in self.models[1].peft_config]
        if not free or self.merged or self.disabled or self.method == "IA3Config":
            return False
        names, kind = self.names(), self.chance.choice(KINDS)
        if self.any_field("use_dora", "lora_bias", "use_rslora", "rank_pattern"):
            return False
        if "svd" not in kind and kind != "cat" and len({self.models[1].peft_config[n].r for n in names}) > 1:
            return False
        weights, more = [self.chance.choice((0.5, 1.0, -0.7)) for _ in names], {"combination_type": kind}
        if "ties" in kind or "prune" in kind:
            more["density"] = self.chance.choice((0.4, 1.0))
        self.both(lambda i, m: m.base_model.add_weighted_adapter(names, weights, free[0], **more))
        self.both(lambda i, m: m.set_adapter(free[0]))
        self.settle(f"combined by {kind}")
        return True

    def rescale(self) -> bool:
        if self.merged or self.method == "IA3Config":
            return False
        name, factor = self.names()[0], self.chance.choice((0.5, 2.0))
        self.both(lambda i, m: [x.set_scale(name, factor) for x in m.modules() if hasattr(x, "set_scale")])
        return True

    def save(self) -> bool:
        """Files are the same, and either library makes the same of the other's."""
        if self.merged:
            return False
        folders = [Path(tempfile.mkdtemp(dir=self.folder)) for _ in LIBRARIES]
        self.both(lambda i, m: m.save_pretrained(folders[i]))
        outputs = []
        for name in self.models[1].peft_config:
            at = tuple(f if name == "default" else f / name for f in folders)
            _same(*[load_file(f / "adapter_model.safetensors") for f in at], "file")
            self.saved[name] = at
        for library, folder in zip(LIBRARIES, reversed(at), strict=True):
            loaded = library.PeftModel.from_pretrained(self.fresh(), folder).eval()
            outputs.append({"out": oracle.logits(loaded)})
        _same(*outputs, "loaded")
        return True

    def load(self) -> bool:
        name = next((n for n in NAMES if n not in self.models[1].peft_config), None)
        if self.merged or self.disabled or name is None or not self.saved:
            return False
        at = self.saved[self.chance.choice(sorted(self.saved))]
        self.both(lambda i, m: m.load_adapter(at[1 - i], name))
        return True

    def copies(self) -> bool:
        """Both models go on as copies."""
        if self.chance.random() < 0.5:
            self.models = self.both(lambda i, m: copy.deepcopy(m))
        else:
            self.models = self.both(lambda i, m: pickle.loads(pickle.dumps(m)))
        return True

    def compare(self) -> None:
        ours, theirs = self.models
        assert ours.active_adapters == theirs.active_adapters
        _same(*[_state(m, lambda p: torch.tensor(p.requires_grad)) for m in self.models], "requires_grad")
        with torch.no_grad():
            _same({"out": oracle.logits(ours)}, {"out": oracle.logits(theirs)}, "output")


OPERATIONS = ("add", "add", "switch", "switch", "switch_inside", "delete", "toggle", "merge", "unmerge", "unload",
              "step", "step", "mix", "combine", "rescale", "save", "load", "copies")  # fmt: skip


run = partial(run_at_random, Pair, OPERATIONS, length=20)
