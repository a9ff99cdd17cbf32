"""Linears that work together, computed together: those that read one input (q, k, v; gate, up), and gated MLPs.

    blocks = peftfast.fuse_blocks(model)   # attached during the next forward passes, checked against what they replace
    print(blocks.report())
    blocks.remove()                        # every module as before

Nothing is rewritten: siblings are found by watching which adapted layers of one parent are called one after another
with the very same tensor, gated MLPs by their children and by trying. A block is used only for calls that fit (one
plain LoRA per layer, no mixed batch, no hooks in between, nothing merged, not a few tokens on a CPU); all others run as
they would without it.
Names, parameters and files do not change. Speed is the only effect; dropout masks of the three layers stay their own.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftfast.autocast import without_autocast
from peftfast.config import require_module
from peftfast.devices import forked
from peftfast.layers.layer import BaseTunerLayer
from peftfast.modes import without_dropout
from peftfast.ops.blocks import fit_together, gated_mlp, lora_siblings
from peftfast.ops.composed import composes
from peftfast.ops.host_bound import ELEMENTS, host_bound_lora, is_host_bound
from peftfast.ops.lora import by_kernels, lora_part
from peftfast.ops.plan import Part
from peftfast.owner import Owner
from peftfast.sites.bound import BoundLora
from peftfast.sites.site import is_untouched
from peftfast.training.comparing import agree
from peftfast_kernels.gated import ACTIVATIONS

logger = logging.getLogger("peftfast")

#: What gate and up reach in the comparison. Models that limit them do so at about ten.
FAR = 64.0

_uncounted = False  # while something is compared with what it replaces, nobody counts the calls


def bound_of(layer: BaseTunerLayer) -> BoundLora | None:
    """The one product that `layer` computes, None where it is more than a low-rank linear."""
    if layer.control.routing is not None:
        return None
    _, bound = layer.__dict__["_plan"] or layer._make_plan()
    return bound


def part_of(layer: BaseTunerLayer, x: Tensor, dropout: bool = True) -> Part | None:
    """What `layer` would multiply x by, None where that is not all that it does with it."""
    bound = bound_of(layer)
    return None if bound is None else bound.part(x, dropout)


def _parts(layers: Sequence[BaseTunerLayer], xs: Sequence[Tensor], dropout: bool = True) -> list[Part] | None:
    parts = []
    for layer, x in zip(layers, xs, strict=True):
        part = part_of(layer, x, dropout)
        if part is None:
            return None
        parts.append(part)
    return parts if fit_together(parts) else None


def _still(then: tuple[Tensor, Tensor, tuple], layer: BaseTunerLayer, x: Tensor) -> bool:
    """Whether since the first sibling's call, where it had the values `then`, this one kept its adapter, and that its
    values."""
    bound = bound_of(layer)
    look = None if bound is None else bound.found(x)
    if look is None:
        return False
    a, b, rest = look.values()
    return then[0] is a and then[1] is b and then[2] == rest


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@contextmanager
def uncounted() -> Iterator[None]:
    global _uncounted
    _uncounted = True
    try:
        yield
    finally:
        _uncounted = False


class Siblings:
    """Layers that are given the same tensor: the first one called computes all, the others find theirs ready.

    Attributes:
        state: "new", "on", or why it is off.
    """

    kind = "shared input"

    def __init__(self, names: Sequence[str], layers: Sequence[BaseTunerLayer]) -> None:
        self.names = list(names)
        self._layers: list[Callable[[], BaseTunerLayer]] = list(map(weakref.ref, layers))  # see `Owner`
        self.state = "new"
        #: The input, how often it was written to, whether with gradients; of every layer but the first, its output and
        #: the values that went into it.
        self._ready: tuple[Tensor, int, bool, dict[int, tuple[Tensor, tuple]]] | None = None

    @property
    def layers(self) -> list[BaseTunerLayer]:
        return [layer() for layer in self._layers]

    def attach(self) -> None:
        for layer in self.layers:
            layer.__dict__["block"] = self

    def detach(self) -> None:
        self._ready = None
        for layer in filter(None, self.layers):
            if layer.__dict__.get("block") is self:
                layer.__dict__["block"] = None

    def __call__(self, layer: BaseTunerLayer, x: Tensor) -> Tensor | None:
        """The layer's output, None where this call does not fit."""
        if torch.compiler.is_compiling():  # a compiler shares the read by itself
            return None
        ready = self._ready
        if ready is not None:
            if ready[0] is x and ready[1] == x._version and ready[2] is torch.is_grad_enabled():
                y, then = ready[3].pop(id(layer), (None, None))
                if not ready[3]:
                    self._ready = None
                if y is not None and _still(then, layer, x):
                    return y
            else:
                self._ready = None
        if layer is not self._layers[0]() or x.is_inference():
            return None
        parts, values, layers = [], [], self.layers
        for member in layers:
            if member._forward_pre_hooks:  # which may give it another input than the others
                return None
            bound = bound_of(member)
            found = None if bound is None else bound.found(x)
            look = None if found is None else bound.chosen(x, found)
            if look is None:
                return None
            part, way = look
            if member is layer and way is not by_kernels:
                return way(x, part)  # nothing is shared there
            if way is not by_kernels and way is not host_bound_lora:
                return None
            parts.append(part)
            values.append(found.values())
        if not fit_together(parts):
            return None
        if self.state == "new" and not self._check(x):
            return None
        ys = lora_siblings(x, parts)
        others = zip(map(id, layers[1:]), zip(ys[1:], values[1:], strict=True), strict=True)
        self._ready = (x, x._version, torch.is_grad_enabled(), dict(others))
        return ys[0]

    @torch.no_grad()
    def _check(self, x: Tensor) -> bool:
        if _in_backward():  # a recomputation must do what the forward pass did
            return False
        parts = _parts(self.layers, [x] * len(self._layers), dropout=False)
        alone = [lora_part(x, p) for p in parts]
        if all(map(agree, lora_siblings(x, parts), alone)):
            self.state = "on"
            return True
        self.state = "off: its outputs differ from those of the layers"
        logger.warning("peftfast: %s of %s is %s", self.kind, ", ".join(self.names), self.state)
        self.detach()
        return False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ready": None, "_layers": list(map(Owner, self.layers))}


class Watcher:
    """Stands in for a block during the first forward pass, to see which layers are given the same tensor."""

    def __init__(self, blocks: Blocks, names: dict[int, str]) -> None:
        self.blocks, self.names = blocks, names
        self.runs: list[list[weakref.ref[BaseTunerLayer]]] = []
        self.seen: set[int] = set()
        self._last: tuple[weakref.ref, int, str] | None = None

    def __call__(self, layer: BaseTunerLayer, x: Tensor) -> None:
        if torch.compiler.is_compiling() or _in_backward() or _uncounted:
            return
        if id(layer) in self.seen:  # the second pass has begun
            self.blocks.form([[layer() for layer in run] for run in self.runs])
            return
        self.seen.add(id(layer))
        if x.is_inference() or id(layer) not in self.names:
            return
        parent = self.names[id(layer)].rpartition(".")[0]
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2] == parent:
            self.runs[-1].append(weakref.ref(layer))
        else:
            self.runs.append([weakref.ref(layer)])
        self._last = (weakref.ref(x), x._version, parent)

    def __reduce__(self) -> tuple:
        return type(None), ()


class GatedMlp:
    """A module that computes down(act(gate(x)) * up(x)); called in place of its `forward`."""

    kind = "gated MLP"

    def __init__(self, name: str, module: nn.Module, candidates: Sequence[tuple[str, str, str]], act: str) -> None:
        self.names, self.candidates = [name], list(candidates)
        self._module: Callable[[], nn.Module] = weakref.ref(module)  # see `Owner`
        self.act_name, self.act = act, module._modules[act]
        self.activation: str | None = None
        self.state = "new"
        self.in_training = False  # whether it has been compared in training, where a forward may drop something

    def attach(self) -> None:
        self._module().__dict__["forward"] = self.forward

    def detach(self) -> None:
        own = getattr(self._module(), "__dict__", {})  # nothing of a module that is gone
        if getattr(own.get("forward"), "__self__", None) is self:
            del own["forward"]

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        return type(module).forward(module, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, by its own forward where the call does not fit."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        x = args[0]
        if composes(x) or self._waits(x):
            return self._plain(x)
        if self._is_unsure() and not (_in_backward() or x.is_inference()):
            self._check(x)
        if self.state != "on" or self._is_unsure():
            return self._plain(x)
        parts = self._fitting(x, self.candidates[0])
        if parts is None:
            return self._plain(x)
        if all(is_host_bound(x, part.plan) for part in parts[:2]):  # layers by themselves take less of the host's time
            return self._plain(x)
        return gated_mlp(x, *parts, self.activation)

    def _waits(self, x: Tensor) -> bool:
        """Whether `forward` would leave x to the layers in the end, by what they have looked up before."""
        for name in self.candidates[0][:2]:
            layer = self._module()._modules.get(name)
            bound = bound_of(layer) if isinstance(layer, BaseTunerLayer) else None
            plan = None if bound is None else bound.plan
            if plan is None or not is_host_bound(x, plan):
                return False
        return x.numel() <= ELEMENTS  # up to which it is the same with dropout, which may be another by now

    def _is_unsure(self) -> bool:
        return self.state == "new" or self.state == "on" and self._module().training and not self.in_training

    def _fitting(self, x: Tensor, names: tuple[str, str, str], dropout: bool = True) -> list[Part] | None:
        children = self._module()._modules
        act, layers = children.get(self.act_name), [children.get(name) for name in names]
        if act is not self.act or not all(isinstance(child, BaseTunerLayer) for child in layers):
            return None
        for child in children.values():  # a dropout of the module's own is called who knows where
            drops = isinstance(child, nn.Dropout) and child.training and child.p
            if child is not None and (drops or not is_untouched(child)):
                return None
        gate, up, down = layers
        first = _parts((gate, up), (x, x), dropout)
        if first is None:
            return None
        # what reaches the third layer has the products' dtype; its features and values do not matter here
        dtype = first[0].w.dtype
        third = part_of(down, x if x.dtype is dtype else x.new_empty((*x.shape[:-1], 0), dtype=dtype), dropout)
        if third is None or not fit_together([first[0], third]):
            return None
        return [*first, third]

    @torch.no_grad()
    def _check(self, x: Tensor) -> None:
        """Find out which child does what, by comparing with the module's own forward, without the adapters' dropout: at
        x, and as far out as activations go, because some forwards limit what is between the layers."""
        if self._fitting(x, self.candidates[0]) is None or not x.numel():
            return  # not this time
        self.activation = _known_activation(self.act, x.device)
        if self.activation is None:
            self._give_up(f"its activation {type(self.act).__name__} is not known")
            return
        layers = [self._module()._modules[name] for name in self.candidates[0]]
        first = [part for layer in layers if layer.in_features == x.shape[-1] if (part := part_of(layer, x, False))]
        least = min(float(lora_part(x, part).abs().max()) for part in first)
        if not 0.0 < least < math.inf:  # all are alike there
            return
        inputs = [x, x * max(1.0, FAR / least)]
        with without_dropout(*layers), uncounted(), forked(x.device):
            truths = [self._plain(x.clone()) for x in inputs]  # which may write to its input
        for names in self.candidates:
            parts = self._fitting(x, names, dropout=False)
            if parts is not None and all(
                isinstance(truth, Tensor) and agree(gated_mlp(x, *parts, self.activation), truth)
                for x, truth in zip(inputs, truths, strict=True)
            ):
                self.candidates, self.state, self.in_training = [names], "on", self._module().training
                return
        self._give_up("it computes something else")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_module": Owner(self._module())}

    def _give_up(self, why: str) -> None:
        self.state = f"off: {why}"
        logger.info("peftfast: %s %s is %s", self.kind, self.names[0], self.state)
        self.detach()


@torch.no_grad()
def _known_activation(module: nn.Module, device: torch.device) -> str | None:
    """The name of the element-wise function that `module` computes, found by evaluating it, also where limits are."""
    far = 2.0 ** torch.arange(3, 16, device=device)
    probe = torch.cat([-far, torch.linspace(-6, 6, 193, device=device), far])
    with without_autocast(probe):
        try:
            values = module(probe)
        except Exception:
            return None
        for name, known in ACTIVATIONS.items():
            if (
                isinstance(values, Tensor)
                and values.shape == probe.shape
                and torch.allclose(values, known.forward(probe), rtol=1e-5, atol=1e-6)
            ):
                return name
    return None


class Blocks:
    """What `fuse_blocks` found in a model.

    Attributes:
        groups: every block; its `names`, `kind` and `state`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: list[Siblings | GatedMlp] = []
        layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        if not layers:
            raise ValueError(
                f"fuse_blocks: {type(model).__name__} has no adapted layers; add an adapter first (peftfast.patch)"
            )
        taken = [n for n, layer in layers.items() if layer.__dict__.get("block") is not None]
        if taken:
            raise ValueError(f"fuse_blocks: {taken[0]} is part of a block already; remove() those blocks first")
        for name, module in model.named_modules():
            found = _gated_mlp(name, module)
            if found is not None:
                found.attach()
                self.groups.append(found)
        self._names = {id(layer): name for name, layer in layers.items()}
        self._layers = list(map(weakref.ref, layers.values()))
        self._watcher: Watcher | None = Watcher(self, self._names)
        for layer in layers.values():
            layer.__dict__["block"] = self._watcher

    def form(self, runs: Sequence[Sequence[BaseTunerLayer]]) -> None:
        """The first forward pass is over: replace the watcher by blocks of those that shared an input."""
        self._stop_watching()
        for run in runs:
            if len(run) > 1:
                siblings = Siblings([self._names[id(layer)] for layer in run], run)
                siblings.attach()
                self.groups.append(siblings)

    def _stop_watching(self) -> None:
        for layer in filter(None, [layer() for layer in self._layers]):
            if layer.__dict__.get("block") is self._watcher:
                layer.__dict__["block"] = None
        self._watcher = None

    def remove(self) -> None:
        """Every module as it was."""
        self._stop_watching()
        for group in self.groups:
            group.detach()
        self.groups = []

    def report(self) -> str:
        """One line a block: what it is, where, and whether it is used."""
        lines = [f"{group.kind:<13}{group.state:<7} {', '.join(group.names)}" for group in self.groups]
        return "\n".join(lines) or "no blocks yet: siblings are found during the first forward pass"


def _gated_mlp(name: str, module: nn.Module) -> GatedMlp | None:
    """A module whose children are three adapted linears of fitting sizes and one activation, nothing more."""
    children = module._modules
    layers = {n: m for n, m in children.items() if isinstance(m, BaseTunerLayer)}
    others = {n: m for n, m in children.items() if n not in layers and not isinstance(m, (nn.Identity, nn.Dropout))}
    if len(layers) != 3 or len(others) != 1 or not is_untouched(module):
        return None
    ((act, act_module),) = others.items()
    if act_module is None or next(act_module.parameters(), None) is not None or next(act_module.children(), None):
        return None
    shapes = {n: layer.site.weight.shape for n, layer in layers.items()}
    candidates = [
        (gate, up, down)
        for down in shapes
        for gate in shapes
        for up in shapes
        if len({gate, up, down}) == 3 and shapes[gate] == shapes[up] and shapes[down][1] == shapes[gate][0]
    ]
    return GatedMlp(name, module, candidates, act) if candidates else None


def fuse_blocks(model: nn.Module) -> Blocks:
    """Compute linears together that work together. Switched off again by `Blocks.remove`.

    Args:
        model: with LoRA adapters. Gated MLPs are tried at their first call, siblings from the second pass on.

    Raises:
        ValueError: the model has no adapted layers, or blocks already.
    """
    require_module(model)
    return Blocks(model)
